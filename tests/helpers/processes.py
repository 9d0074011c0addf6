"""Processes for functions that need several, with gloo between them; benchmarks use them, too."""

import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from powernap.model.megatron import ProcessGroupCollection
from tests.helpers import warm

ROOT = Path(__file__).parents[2]


def in_processes(function: Callable, world_size: int, *arguments) -> list:
    """Call `function(rank, store, *arguments)` in `world_size` processes of one thread; return their results.

    `store` is a key-value store they share, to meet in. The first process to fail takes the others down.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "call").write_bytes(pickle.dumps((function, store.port, arguments)))
        packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": packages}
        command = [warm.python(), "-m", "tests.helpers.processes", folder]
        ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world_size)]
        try:
            while any(rank.poll() is None for rank in ranks):
                _raise_if_failed(ranks)
                time.sleep(0.02)
            _raise_if_failed(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _raise_if_failed(ranks: list[subprocess.Popen]) -> None:
    if failed := {rank: process.returncode for rank, process in enumerate(ranks) if process.returncode}:
        raise RuntimeError(f"rank -> exit code: {failed}; stderr has the reason")


def _call(folder: Path, rank: int) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    function, port, arguments = pickle.loads((folder / "call").read_bytes())
    gc.freeze()  # what is imported by now: each of _run's collections would visit it again
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
    results = []
    for number, (size, case) in enumerate(cases):
        own_store = dist.PrefixStore(f"case {number}", store)
        results.append(compare(case, rank=rank, world_size=size, store=own_store) if rank < size else None)
        gc.collect()  # cycles that hold process groups: each group has threads of gloo that wake 100 times a second
    return results


def single_rank_groups() -> ProcessGroupCollection:
    """Groups in which this rank is a model of its own; all ranks of the world call it together."""
    own = dist.new_subgroups(group_size=1)[0]
    return ProcessGroupCollection(tp=own, pp=own, mp=own, cp=own, dp=own, embd=own)


if __name__ == "__main__":
    _call(Path(sys.argv[1]), int(sys.argv[2]))
