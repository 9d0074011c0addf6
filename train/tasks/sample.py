"""The samples that tasks draw, and the problems that are held out for the test."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from powernap.model.errors import PowernapError

PAD = 0
GENERATOR = 3  # incremented when the same fields and seed give other samples; older shards can still be read
HELD_OUT_ONE_IN = 5  # a fifth of all problems is never trained on
MAX_DRAWS = 1000

Problem = TypeVar("Problem")

# For each answer of a sample, the answers that a surface guess draws from, all equally likely.
Candidates = list[list[tuple[int, ...]]]


class TaskError(PowernapError):
    """Sizes of a task that allow no sample: one line."""


@dataclass(frozen=True)
class Sample:
    """One sequence and the answers in it."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]: True at tokens that are targets
    answers: np.ndarray  # int32 [n, 3]: rows (start, stop, depth): tokens[start:stop], its number of hops or steps
    # int32 [p, 2]: rows (start, stop) in rising order: tokens[start:stop] are read, answered and then forgotten
    probes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))
    # bool [T]: tokens at which fast weights and attention begin anew, each the first of a window; None: the first alone
    document_starts: np.ndarray | None = None


def probes_of(sample: Sample) -> list[tuple[int, int]]:
    """(start, stop) of each probe."""
    return [(start, stop) for start, stop in sample.probes.tolist()]


def is_held_out(problem: Iterable[int]) -> bool:
    """Whether a problem, written as numbers, is held out: the same for every seed, machine and Python."""
    return zlib.crc32(np.asarray(problem, dtype="<i4").tobytes()) % HELD_OUT_ONE_IN == 0


def draw_problem(
    draw: Callable[[], Problem], canonical: Callable[[Problem], Iterable[int]], held_out: bool, name: str
) -> Problem:
    """Draw until a problem falls on the given side of the held-out split.

    Raises:
        TaskError: if none does, which happens only if there are just a handful of problems.
    """
    for _ in range(MAX_DRAWS):
        problem = draw()
        if is_held_out(canonical(problem)) == held_out:
            return problem
    raise TaskError(f"{name}: too few different problems to keep some of them for the test: choose larger sizes")
