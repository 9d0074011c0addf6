"""Automata: a row of bits, then windows of commands, each "advance the row": which bit is in a cell now?

Every command needs the row that the last one left, and a step that is not linear. At N=1 a hybrid is a linear recurrence
over windows; with N >= 2 a later pass writes what an earlier one has read from the fast weights.

    [pad ...] case>bit * 8  | cell=bit * width | ? | [next cell] * width | ? | [next cell] * width | ? ...
    the rule, if it varies  | the row          |   | a command           |   | the next            |

Each ? is a probe of [cell x] bit [cell y] bit ..., which is read, answered and forgotten: no answer helps a later one. All
windows have L = width tokens. The loss is on the answers.

Rows merge as they advance: of the 256 rows of width=8, 45 are left after eight steps of Rule 110, 115 of rule 30. So rows that
start no training sample can follow a row that does; only numbers of commands never trained on test the rest. Test shards with
more commands, or other rules, are a second build: tokens mean the same.
"""

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.elementary import after, best_cell, equivalents
from powernap.train.tasks.sample import PAD, Candidates, Sample, draw_problem

CASES = 8  # values of a cell and its neighbours
FIRST_BIT, FIRST_CELL = 1, 3  # tokens: pad, the answers 0 and 1, each cell with 0 and with 1, ...
ALL_RULES = 256

Rule = Annotated[int, Field(ge=0, lt=ALL_RULES)]


class Automata(Section):
    """Sizes of automata."""

    depth_name: ClassVar[str] = "steps"

    rules: Literal["all"] | Annotated[list[Rule], Field(min_length=1)] = Field(
        [110],
        description="Wolfram's numbers; several: one is drawn for every sample and said in a window of its own; all: 0 to 255",
    )
    width: int = Field(8, ge=3, description="bits of the row, a ring")
    commands: int = Field(8, ge=1, description="windows that advance the row")
    steps: int = Field(1, ge=1, description="steps of the automaton that a command advances")
    questions: int = Field(4, ge=1, description="cells asked for after each window, none twice")
    hold_out: Literal["rows", "rules"] = Field(
        "rows", description="rows: the test has rows never trained on; rules: and rules never trained on"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if 2 * self.questions - 1 > self.width:
            raise ValueError(
                f"questions={self.questions} read {2 * self.questions - 1} tokens and must fit a window of width={self.width}: "
                f"write questions={(self.width + 1) // 2}, or width={2 * self.questions - 1}"
            )
        if len(set(self.rule_choices)) < len(self.rule_choices):
            raise ValueError(f"rules={self.rules} must name each rule once")
        if self.says_rule and self.width < CASES:
            raise ValueError(f"width={self.width} must be {CASES} or more, so that a rule's {CASES} bits fit a window")
        if self.hold_out == "rules" and not self.says_rule:
            raise ValueError(f"hold_out=rules needs more rules than rules={self.rules}: write rules=all")
        return self

    @property
    def rule_choices(self) -> list[int]:
        return list(range(ALL_RULES)) if self.rules == "all" else self.rules

    @property
    def says_rule(self) -> bool:
        return len(self.rule_choices) > 1

    @property
    def vocab_size(self) -> int:
        return self._first_case + 2 * CASES * self.says_rule

    @property
    def window(self) -> int:
        return self.width

    @property
    def context_length(self) -> int:
        return self.width * (1 + self.says_rule)

    @property
    def sequence_length(self) -> int:
        return self.context_length + self.commands * self.width + (1 + self.commands) * 2 * self.questions

    def token_name(self, token: int) -> str:
        """A token as a person reads it; cells are numbered from 1."""
        if token == PAD:
            return "[pad]"
        if token < FIRST_CELL:
            return str(token - FIRST_BIT)
        if token < self._first_command:
            cell, bit = divmod(token - FIRST_CELL, 2)
            return f"{cell + 1}={bit}"
        if token < self._first_question:
            return f"[next {token - self._first_command + 1}]"
        if token < self._first_case:
            return f"[cell {token - self._first_question + 1}]"
        case, bit = divmod(token - self._first_case, 2)
        return f"{case:03b}>{bit}"

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """A row that is held out or not, under a rule, advanced by every command."""
        rule = self._draw_rule(rng, held_out)
        rows = [
            draw_problem(
                lambda: rng.integers(2, size=(1, self.width)),
                _first_rotation,
                held_out,
                f"automata with width={self.width}",
            )
        ]
        for _ in range(self.commands):
            rows.append(after(rows[-1], self.steps, rule))
        cells = np.concatenate(rows)
        columns = np.tile(np.arange(self.width), (1 + self.commands, 1))
        windows = self._first_command + columns
        windows[0] = FIRST_CELL + 2 * columns[0] + cells[0]
        asked = rng.permuted(columns, axis=1)[:, : self.questions]
        bits = np.take_along_axis(cells, asked, axis=1)
        probes = np.stack([self._first_question + asked, FIRST_BIT + bits], axis=2).reshape(1 + self.commands, -1)
        tokens = np.concatenate([windows, probes], axis=1).ravel()
        if self.says_rule:
            tokens = np.concatenate([self._say(rule), tokens])

        done = np.arange(1 + self.commands)
        starts = self.context_length + done * (self.width + 2 * self.questions)  # of the probes
        places = (starts[:, None] + 1 + 2 * np.arange(self.questions)).ravel()
        answers = np.stack([places, places + 1, np.repeat(done * self.steps, self.questions)], axis=1)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        loss_mask[places] = True
        where = np.stack([starts, starts + 2 * self.questions], axis=1)
        return Sample(tokens.astype(np.int32), loss_mask, answers.astype(np.int32), where.astype(np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """The cell as it was at first, or after one command; the likeliest bit given one cell of the first row."""
        tokens = sample.tokens
        first = (tokens[self.context_length - self.width : self.context_length] - FIRST_CELL) % 2
        rule = self._said(tokens) if self.says_rule else self.rule_choices[0]
        second = after(first[None], self.steps, rule)[0]
        unchanged, one_command, likeliest = [], [], []
        for start, _, depth in sample.answers.tolist():
            cell = int(tokens[start - 1]) - self._first_question
            unchanged.append(first[cell])
            one_command.append(second[cell])
            informative, likelier = best_cell(self.width, depth, rule)
            likeliest.append(likelier[first[(cell + informative) % self.width]])
        guesses = {
            "the first row": unchanged,
            "one command": one_command,
            "likeliest bit after one cell": likeliest,
        }
        return {name: [[(FIRST_BIT + int(bit),)] for bit in bits] for name, bits in guesses.items()}

    # Token ids: pad, the answers, cells with their bits, [next x] and [cell x] for each cell, cases of a rule with their bits.

    @property
    def _first_command(self) -> int:
        return FIRST_CELL + 2 * self.width

    @property
    def _first_question(self) -> int:
        return self._first_command + self.width

    @property
    def _first_case(self) -> int:
        return self._first_question + self.width

    def _say(self, rule: int) -> np.ndarray:
        """The window that states a rule: its bits from case 111 to 000, as Wolfram writes them."""
        cases = np.arange(CASES)[::-1]
        return np.concatenate([np.full(self.width - CASES, PAD), self._first_case + 2 * cases + (rule >> cases & 1)])

    def _said(self, tokens: np.ndarray) -> int:
        """The rule that a sample states."""
        cases, bits = np.divmod(tokens[self.width - CASES : self.width] - self._first_case, 2)
        return int((bits << cases).sum())

    def _draw_rule(self, rng: np.random.Generator, held_out: bool) -> int:
        def draw() -> int:
            return self.rule_choices[int(rng.integers(len(self.rule_choices)))]

        if self.hold_out == "rows":
            return draw()
        return draw_problem(draw, lambda rule: [min(equivalents(rule))], held_out, f"automata with rules={self.rules}")


def _first_rotation(row: np.ndarray) -> list[int]:
    """The same for every rotation of a row: asked for another cell, a rotated row has the same answers."""
    bits = row.ravel().tolist()
    return min(bits[cell:] + bits[:cell] for cell in range(len(bits)))
