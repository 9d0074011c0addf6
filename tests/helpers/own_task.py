"""A task as a user writes one, for tests that break it."""

import numpy as np
from pydantic import Field

from powernap import Sample, Section, draw_problem


class Copy(Section):
    """[letter] * 4 | [again] and the letters, of which those count that were read; ten tokens."""

    letters: int = Field(8, ge=2, description="different letters")

    @property
    def vocab_size(self) -> int:
        return 2 + self.letters  # the pad, [again]

    window = context_length = property(lambda self: 4)
    sequence_length = property(lambda self: 10)

    def token_name(self, token: int) -> str:
        return ["[pad]", "[again]"][token] if token < 2 else chr(ord("a") + token - 2)

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        word = draw_problem(lambda: rng.integers(2, self.vocab_size, 4), lambda word: word, held_out, "copy")
        tokens = np.array([*word, 1, *word, 0], dtype=np.int32)
        loss_mask = np.isin(np.arange(10), range(5, 9))
        return Sample(tokens, loss_mask, np.array([(5, 9, 4)], dtype=np.int32))
