"""Parity: read rows of bits, then answer for each row how many of its first t bits are set, modulo 2.

    row row row                      | [bits t] answer answer answer
    rows windows of L = width tokens | the window that answers

The depth of an answer is t. No test row is in a training sample.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from powernap import Sample, Section, draw_problem

ZERO, ONE, FIRST_QUERY = 1, 2, 3  # token 0 is the pad


class Parity(Section):
    """Sizes of the task; each is a `key=value` of `powernap data build`."""

    depth_name: ClassVar[str] = "bits"

    rows: int = Field(2, ge=1, description="rows of bits, a window each")
    width: int = Field(8, ge=2, description="bits of a row")

    @property
    def vocab_size(self) -> int:
        return FIRST_QUERY + self.width

    @property
    def window(self) -> int:
        return self.width

    @property
    def context_length(self) -> int:
        return self.rows * self.width

    @property
    def sequence_length(self) -> int:
        return self.context_length + 1 + self.rows

    def token_name(self, token: int) -> str:
        return ["[pad]", "0", "1"][token] if token < FIRST_QUERY else f"[bits {token - FIRST_QUERY + 1}]"

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        bits = np.stack([self._row(rng, held_out) for _ in range(self.rows)])
        depth = int(rng.integers(1, self.width + 1))
        answers = bits[:, :depth].sum(axis=1) % 2
        tokens = np.concatenate([ZERO + bits.ravel(), [FIRST_QUERY + depth - 1], ZERO + answers]).astype(np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        start, stop = self.context_length + 1, self.sequence_length
        loss_mask[start:stop] = True
        return Sample(tokens, loss_mask, np.array([(start, stop, depth)], dtype=np.int32))

    def _row(self, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """A row of the test split or of the training split, by its hash."""
        return draw_problem(lambda: rng.integers(2, size=self.width), lambda row: row, held_out, "parity")
