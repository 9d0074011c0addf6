"""Fresh processes for functions that need several, with gloo between them; benchmarks use them, too."""

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from powernap.model.megatron import ProcessGroupCollection

# Imported before processes are forked: each would need six seconds for it.
IMPORTED = ["powernap.launch.commands.train", "powernap.train.trainer", "powernap.train.evaluation.evaluate", "mlflow"]


def in_processes(function: Callable, world_size: int, *arguments) -> list:
    """Call `function(rank, store, *arguments)` in `world_size` fresh processes of one thread; return their results.

    `store` is a key-value store they share, to meet in. The first process to fail takes the others down.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert all(map(find_spec, IMPORTED))  # the fork server silently skips a name that it cannot import
    multiprocessing.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        call = function, store.port, Path(folder), dict(os.environ), arguments
        start_processes(_call, call, world_size, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _call(rank, function, port, folder, environment, arguments):
    os.environ.clear()  # the fork server's, from when it started
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    (folder / str(rank)).write_bytes(pickle.dumps(function(rank, store, *arguments)))


def run_cases(compare: Callable, cases: dict[str, object], ranks: Callable[[object], int] | None = None) -> dict:
    """Call `compare(case, rank=, world_size=, store=)` on the first ranks that each case needs; one set of ranks for all.

    Large cases run first: at stage 3 DeepSpeed numbers the modules of all engines a process ever had and requires the
    same numbers on every rank, so no rank may have skipped an earlier case.

    Args:
        ranks: how many a case needs; by default case.world_size.

    Returns:
        case name -> what each of its ranks returned
    """
    sizes = {name: ranks(case) if ranks else case.world_size for name, case in cases.items()}
    order = sorted(cases, key=lambda name: -sizes[name])
    per_rank = in_processes(_run, max(sizes.values()), compare, [(sizes[name], cases[name]) for name in order])
    return {name: list(found)[: sizes[name]] for name, found in zip(order, zip(*per_rank, strict=True), strict=True)}


def _run(rank: int, store: dist.Store, compare: Callable, cases: list[tuple[int, object]]) -> list:
    """This rank's results, None for a case that does not need it: it waits for the next one."""
    return [
        compare(case, rank=rank, world_size=size, store=dist.PrefixStore(f"case {number}", store))
        if rank < size
        else None
        for number, (size, case) in enumerate(cases)
    ]


def single_rank_groups() -> ProcessGroupCollection:
    """Groups in which this rank is a model of its own; all ranks of the world call it together."""
    own = dist.new_subgroups(group_size=1)[0]
    return ProcessGroupCollection(tp=own, pp=own, mp=own, cp=own, dp=own, embd=own)
