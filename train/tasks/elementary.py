"""Elementary cellular automata on a ring, by Wolfram's number: rule 110 and 255 others. No torch here."""

from functools import cache

import numpy as np

MOST_CELLS = 2**21  # in the rows that a guess is counted on


def after(cells: np.ndarray, steps: int, rule: int) -> np.ndarray:
    """Rows of bits, [rows, width], after `steps` steps.

    A cell with its left neighbour l and right neighbour r becomes bit 4l + 2c + r of the rule's number.
    """
    columns = np.arange(cells.shape[1])
    left, right = columns - 1, (columns + 1) % len(columns)
    outputs = (rule >> np.arange(8) & 1).astype(cells.dtype)
    for _ in range(steps):
        cells = outputs[4 * cells[:, left] + 2 * cells + cells[:, right]]
    return cells


def equivalents(rule: int) -> set[int]:
    """The rules that differ from `rule` only in which side is left, or in which bit is called 1."""
    mirror = sum((rule >> case & 1) << ((case & 1) << 2 | case & 2 | case >> 2) for case in range(8))
    return {rule, mirror} | {sum((~number >> case & 1) << (7 - case) for case in range(8)) for number in (rule, mirror)}


@cache
def best_cell(width: int, steps: int, rule: int) -> tuple[int, tuple[int, int]]:
    """The cell of a row that tells most about its first bit after `steps`, and the likelier bit if it is 0 and if 1.

    Counted on all rows, or on random ones if there are too many.
    """
    if width * 2**width <= MOST_CELLS:
        rows = np.arange(2**width)[:, None] >> np.arange(width) & 1
    else:
        rows = np.random.default_rng(0).integers(2, size=(MOST_CELLS // width, width))
    rows = rows.astype(np.uint8)
    ends = after(rows, steps, rule)[:, 0]
    ones = np.stack([ends[rows[:, cell] == value].mean() for value in (0, 1) for cell in range(width)]).reshape(
        2, width
    )
    cell = int(np.maximum(ones, 1 - ones).sum(axis=0).argmax())
    return cell, (int(ones[0, cell] > 0.5), int(ones[1, cell] > 0.5))
