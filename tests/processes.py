"""Cases that need several real processes each: all share one set, with gloo between them."""

from collections.abc import Callable

import torch.distributed as dist

from benchmarks.common import in_processes


def run_cases(compare: Callable, cases: dict[str, object], ranks: Callable[[object], int] | None = None) -> dict:
    """Call `compare(case, rank=, world_size=, store=)` on the first ranks that each case needs.

    Large cases run first: at stage 3 DeepSpeed numbers the modules of all engines a process ever had and wants the same
    numbers on every rank, so none may have sat a case out before.

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
