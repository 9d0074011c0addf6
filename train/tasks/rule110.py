"""Rule 110: random rows of bits, then the first bit of each row after t steps of the cellular automaton on a ring.

    row row row row            | [steps t] bit bit bit bit
    rows windows of L = width  | the answer window begins with a query token, so that no row's window holds a label

The loss is on the answer bits. A label depends on its own row alone, so the split is by row: no test row occurs in any
training sample.
"""

from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.elementary import after, best_cell
from powernap.train.tasks.sample import Candidates, Sample, draw_problem

RULE = 110
FIRST_BIT = 1  # token of bit 0; bit 1 is the next
FIRST_QUERY = 3

Steps = Annotated[int, Field(ge=1)]


class Rule110(Section):
    """Sizes of Rule 110; the defaults are those of arXiv 2605.26099."""

    depth_name: ClassVar[str] = "steps"

    rows: int = Field(4, ge=1, description="independent rows, one per window")
    width: int = Field(24, ge=3, description="bits of a row, a ring")
    steps: Steps | Annotated[list[Steps], Field(min_length=1)] = Field(
        32, description="t, from 1; a list: t is drawn from it for every sample"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.rows > self.width:
            raise ValueError(f"rows={self.rows} must not exceed width={self.width}: their answers share one window")
        if len(set(self.step_choices)) < len(self.step_choices):
            raise ValueError(f"steps={self.step_choices} must name each t once")
        return self

    @property
    def step_choices(self) -> list[int]:
        return self.steps if isinstance(self.steps, list) else [self.steps]

    @property
    def vocab_size(self) -> int:
        return FIRST_QUERY + len(self.step_choices)

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
        """A token's name for display."""
        if token >= FIRST_QUERY:
            return f"[steps {self.step_choices[token - FIRST_QUERY]}]"
        return str(token - FIRST_BIT) if token >= FIRST_BIT else "[pad]"

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """Draw rows that are all held out, or all not."""
        rows = [
            draw_problem(
                lambda: rng.integers(2, size=self.width, dtype=np.int32),
                lambda row: row,
                held_out,
                f"rule110 with width={self.width}",
            )
            for _ in range(self.rows)
        ]
        cells = np.stack(rows)
        choice = int(rng.integers(len(self.step_choices)))
        steps = self.step_choices[choice]
        answer = after(cells, steps, RULE)[:, 0]

        tokens = np.concatenate([FIRST_BIT + cells.ravel(), [FIRST_QUERY + choice], FIRST_BIT + answer])
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        start, stop = self.context_length + 1, self.sequence_length
        loss_mask[start:stop] = True
        return Sample(tokens.astype(np.int32), loss_mask, np.array([(start, stop, steps)], dtype=np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """The likeliest bit given one cell of a row, the most informative one."""
        cells = sample.tokens[: self.context_length].reshape(self.rows, self.width) - FIRST_BIT
        guesses = []
        for _, _, steps in sample.answers.tolist():
            cell, bits = best_cell(self.width, steps, RULE)
            guesses.append([tuple(FIRST_BIT + bits[bit] for bit in cells[:, cell].tolist())])
        return {"likeliest bit after one cell": guesses}
