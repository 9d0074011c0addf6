"""What this rank has enqueued for other ranks, and which of them have not: c10d's flight recorder, compared between ranks.

On NCCL a collective returns when it is enqueued. A rank that waits stands later, where it reads a result from the device, and
its stack does not say for whom.

The recorder keeps the last 2,000 operations of a process, unless TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE says
another number. torch (2.8 to 2.13) has one for NCCL and one for gloo. That of gloo has no sends and receives: for those the
notes of parallel/schedule.py say which stage is waited for.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from powernap.parallel.grid import Grid, first_three

BESIDE_TRAINING = "beside training"  # c10d's description of a group that a thread may wait in while training continues

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # the first in builds with NCCL alone
_PEER = re.compile(r"send \d+->(\d+)|recv \d+<-(\d+)")


class Operation(NamedTuple):
    """A collective, or a message to or from one rank."""

    group: str  # c10d's name for it, the same on all its ranks
    ranks: list[int]  # of the group
    number: int  # in the group, from 1; collectives and messages count apart
    name: str  # "all_reduce"; "recv 0<-1" between ranks of the group
    tensors: str
    noted: str | None  # what the rank was doing when it enqueued this

    @property
    def key(self) -> tuple[str, int, str]:
        """The same on all ranks of a collective."""
        return self.group, self.number, self.name if self.peer is not None else ""

    @property
    def peer(self) -> int | None:
        """The other rank of a message."""
        match = _PEER.fullmatch(self.name)
        return self.ranks[int(match[1] or match[2])] if match else None

    def describe(self, grid: Grid) -> str:
        group = grid.describe_group(self.ranks)
        return f"{self.name} number {self.number} of {group} (c10d's group {self.group}, {self.tensors})"


class Enqueued(NamedTuple):
    """What one rank has enqueued."""

    pending: Operation | None  # the first that is not done
    last: dict[str, int]  # c10d's name of a group -> number of its last collective

    @classmethod
    def from_json(cls, value: list) -> "Enqueued":
        pending, last = value
        return cls(pending and Operation(*pending), last)


def enqueued(noted_at: Callable[[int], str | None]) -> Enqueued | None:
    """What this rank has enqueued; None if the recorder has nothing.

    Args:
        noted_at: what the rank was doing at a time, in nanoseconds since the epoch.
    """
    entries = _entries()
    if not entries:
        return None
    last = {e["process_group"][0]: e["collective_seq_id"] for e in entries if not e["is_p2p"]}
    pending = _first_pending(entries)
    return Enqueued(_operation(pending, noted_at) if pending else None, last)


def _entries() -> list[dict[str, Any]]:
    """All that the recorders have, in the order in which it was enqueued."""
    dumps = (getattr(torch._C._distributed_c10d, name, None) for name in _DUMPS)
    entries = [entry for dump in dumps if dump for entry in json.loads(dump()).get("entries", ())]
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def _first_pending(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first operation that is not done; of those beside training only if there is no other.

    gloo retires what is done. Operations that NCCL sends off together have an entry each, which stays as it is, and a last
    one for all, of the same number, which is done when they are.
    """
    first: dict[tuple, dict[str, Any]] = {}
    done = set()
    for entry in entries:
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        key = entry["process_group"][0], entry["is_p2p"], number
        first.setdefault(key, entry)
        if entry["retired"] or entry["state"] == "completed":
            done.add(key)
    pending = [entry for key, entry in first.items() if key not in done]
    return min(pending, key=lambda entry: entry["process_group"][1] == BESIDE_TRAINING, default=None)


def _operation(entry: dict[str, Any], noted_at: Callable[[int], str | None]) -> Operation:
    name = entry["process_group"][0]
    tensors = [
        f"{dtype} {list(size)}" for dtype, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    ]
    return Operation(
        name,
        dist.get_process_group_ranks(torch._C._distributed_c10d._resolve_process_group(name)),
        entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        entry["profiling_name"].partition(":")[2],
        first_three(tensors) or "no tensor",
        noted_at(entry["time_created_ns"]),
    )


def explain(rank: int, of: Mapping[int, Enqueued], doing: Mapping[int, str], grid: Grid) -> tuple[list[str], set[int]]:
    """What `rank` waits for and who has not enqueued it; then what others wait for, if that names further ranks.

    Args:
        of, doing: by rank, of those that answered, `rank` itself among them.

    Returns:
        sentences, and the ranks that they say have not enqueued something, with `rank`.
    """
    own, sentences, named = of[rank].pending, [], {rank}
    if own:
        noted = f", enqueued in {own.noted}" if own.noted else ""
        sentences.append(f"it waits for {own.describe(grid)}{noted}")
        sentences += _of_its_ranks(own, of, doing, grid)
        named.update(_lacking(own, of))
    for operation, waiting in _waited_for(of)[:3]:
        if not (own and operation.key == own.key) and not named.issuperset(lacking := _lacking(operation, of)):
            who = f"rank {waiting[0]} waits" if len(waiting) == 1 else f"ranks {first_three(waiting)} wait"
            sentences.append(f"{who} for {operation.describe(grid)}")
            sentences += _of_its_ranks(operation, of, doing, grid)
            named.update(lacking)
    return sentences, named


def _waited_for(of: Mapping[int, Enqueued]) -> list[tuple[Operation, list[int]]]:
    """The operations that ranks wait for, and these ranks. First those for which a rank is late that itself waits for nobody."""
    pending: dict[tuple, tuple[Operation, list[int]]] = {}
    for rank, (operation, _) in sorted(of.items()):
        if operation:
            pending.setdefault(operation.key, (operation, []))[1].append(rank)
    return sorted(pending.values(), key=lambda found: all(of[rank].pending for rank in _lacking(found[0], of)))


def _lacking(operation: Operation, of: Mapping[int, Enqueued]) -> list[int]:
    """Ranks of a collective that have not enqueued it."""
    if operation.peer is not None:
        return []
    return [rank for rank in operation.ranks if rank in of and of[rank].last.get(operation.group, 0) < operation.number]


def _of_its_ranks(
    operation: Operation, of: Mapping[int, Enqueued], doing: Mapping[int, str], grid: Grid
) -> Iterator[str]:
    """What is to say of the ranks of an operation."""
    if operation.peer is not None:
        if operation.peer in doing:
            yield f"on its other side is {grid.describe_rank(operation.peer)}: {doing[operation.peer]}"
        return
    lacking = _lacking(operation, of)
    for rank in lacking[:3]:
        yield f"{grid.describe_rank(rank)} has not enqueued it: {doing[rank]}"
    if len(lacking) > 3:
        yield f"nor have {len(lacking) - 3} more"
    for rank in operation.ranks:
        other = of[rank].pending if rank in of else None
        if other and other.key == operation.key and _differ(other, operation):
            yield f"{grid.describe_rank(rank)} has enqueued {other.name} ({other.tensors}) in its place"
    if not lacking and all(rank in of for rank in operation.ranks):
        yield "all of them have enqueued it"


def _differ(one: Operation, other: Operation) -> bool:
    return one.name != other.name or (one.name == "all_reduce" and one.tensors != other.tensors)
