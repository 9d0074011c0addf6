"""Tests of several real processes: one function on every rank, gloo between them."""

import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing


def run(function: Callable, world_size: int, *arguments) -> list:
    """Call `function(rank, store, *arguments)` in `world_size` fresh processes; what each returned.

    `store` is a key-value store they share, to meet in. `function` must be importable; what it returns goes through
    JSON.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _call, (function, store.port, Path(folder), arguments), nprocs=world_size, start_method="spawn"
        )
        return [json.loads((Path(folder) / f"returned-{rank}").read_text()) for rank in range(world_size)]


def _call(rank, function, port, folder, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    returned = function(rank, store, *arguments)
    (folder / f"returned-{rank}").write_text(json.dumps(returned))
