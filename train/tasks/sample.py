"""What every task hands out, and which problems are kept for the test."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from powernap.model.errors import PowernapError

PAD = 0
GENERATOR = 2  # raised where the same fields and seed give other samples than before; older shards can still be read
HELD_OUT_ONE_IN = 5  # a fifth of all problems is never trained on
MAX_DRAWS = 1000

Problem = TypeVar("Problem")

# Of a surface guess: for each answer of a sample the answers it draws from, each equally likely.
Candidates = list[list[tuple[int, ...]]]


class TaskError(PowernapError):
    """Sizes of a task that allow no sample: one line."""


@dataclass(frozen=True)
class Sample:
    """One sequence with what is asked in it."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]: True at tokens that are targets
    answers: np.ndarray  # int32 [n, 3]: rows (start, stop, depth): tokens[start:stop], its number of hops or steps


def is_held_out(problem: Iterable[int]) -> bool:
    """Whether a problem, written as numbers, belongs to the test: the same for every seed, machine and Python."""
    return zlib.crc32(np.asarray(problem, dtype="<i4").tobytes()) % HELD_OUT_ONE_IN == 0


def draw_problem(
    draw: Callable[[], Problem], canonical: Callable[[Problem], Iterable[int]], held_out: bool, name: str
) -> Problem:
    """Draw until a problem falls on the wanted side of the held-out split.

    Raises:
        TaskError: if none does, which happens only where there are a handful of problems in all.
    """
    for _ in range(MAX_DRAWS):
        problem = draw()
        if is_held_out(canonical(problem)) == held_out:
            return problem
    raise TaskError(f"{name}: too few different problems to keep some of them for the test: choose larger sizes")
