"""Program: what is a quantity worth, when each was computed from those before it, window by window?

Straight-line arithmetic modulo a small number, told in the order in which it is computed: GSM-Infinite's problems (arXiv
2502.05252) without the search for what matters. At N=1 a hybrid is a linear recurrence over windows; here each window needs
a non-linear step on what the earlier ones left.

    [pad ...] statement ...  | question value | question value | statement ...  | question value | ...
    window of L tokens       | probe          | probe          | window         | probe

A statement gives a quantity a number, or computes it from one or two others. form=symbols writes `0 + 3 >a`, `a * 2 >b`,
`b - a >c`: a name has one token where it is read, and another, with >, where it is told. form=words writes the same program
as sentences, one token a word, with pads at the window's end: `there are 2 times as many pens as cups .`

A question is a probe of its own: no answer is an input of what follows, not even of the next question. The first one after
a window asks for the newest quantity, the others for any that is known. The loss is on the values. An answer's depth is the
longest chain of operations that it needs; at depth 0 its value is stated. Shorter programs are padded on the left by whole
windows and probes.

Names return in an order that is drawn for each sample: the last `names` quantities are known, older ones overwritten.
Distractors are a second story, alike in all but that nothing is asked about it.

Held out is how a program begins: the first whole windows with SPLIT statements, whatever the names and their order. No test
program begins like a training program, at any number of windows. Training and test share what is shorter: what is asked
before SPLIT statements, and the few operations that a single answer may need from the middle of a program.
"""

import math
import re
import zlib
from collections import Counter
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.sample import PAD, Candidates, Sample, draw_problem

SPLIT = 3  # statements: a shorter beginning is in training and test alike, there being too few

Form = Literal["symbols", "words"]

# {x}: the quantity that is told, {a} and {b}: those it is computed from, {n}: a number.
STATEMENTS: dict[Form, dict[str, str]] = {
    "symbols": {
        "number": "0 + {n} >{x}",
        "plus": "{a} + {n} >{x}",
        "minus": "{a} - {n} >{x}",
        "times": "{a} * {n} >{x}",
        "sum": "{a} + {b} >{x}",
        "difference": "{a} - {b} >{x}",
    },
    "words": {
        "number": "there are {n} {x} .",
        "plus": "there are {n} more {x} than {a} .",
        "minus": "there are {n} fewer {x} than {a} .",
        "times": "there are {n} times as many {x} as {a} .",
        "sum": "there are as many {x} as {a} and {b} .",
        "difference": "there are as many {x} as {a} without {b} .",
    },
}
LONGEST = {form: max(len(text.split()) for text in texts.values()) for form, texts in STATEMENTS.items()}  # in tokens
QUESTION: dict[Form, str] = {"symbols": "{x}", "words": "how many {x} ?"}
NAMES: dict[Form, tuple[str, ...]] = {
    "symbols": tuple("abcdefghijklmnopqrstuvwxyzABCDEF"),
    "words": tuple(
        "apples bags balls beds bells birds boats bowls brooms buttons cakes candles cards clocks coins cups dolls doors "
        "drums flags forks gloves kites knives maps masks pens rings rugs shirts spoons stamps".split()
    ),
}
MOST_NAMES = len(NAMES["symbols"])

UNARY, BINARY = ("plus", "minus", "times"), ("sum", "difference")  # kinds of statements, by their operands
VALUES = {  # of the operands a and b and the number n
    "number": lambda a, b, n: n,
    "plus": lambda a, b, n: a + n,
    "minus": lambda a, b, n: a - n,
    "times": lambda a, b, n: a * n,
    "sum": lambda a, b, n: a + b,
    "difference": lambda a, b, n: a - b,
}


class Statement(NamedTuple):
    """How a quantity comes about. Quantities are counted in the order of their statements."""

    kind: str  # a key of VALUES
    operands: tuple[int, ...] = ()  # quantities
    number: int = 0
    asked: bool = True  # whether a question may need it; False: a distractor


class Program(Section):
    """Sizes of program."""

    depth_name: ClassVar[str] = "chain"

    statements: int = Field(1, ge=1, description="statements a window")
    windows: int = Field(8, ge=1, description="most windows of a program")
    min_windows: int | None = Field(
        None, ge=1, description="fewest windows of a program, a length is drawn for each sample; null: always `windows`"
    )
    modulus: int = Field(5, ge=2, le=100, description="values are 0 .. modulus - 1")
    names: int = Field(
        16, ge=2, le=MOST_NAMES, description="names, used in turn: so many quantities are known at a time"
    )
    recent: int = Field(
        2, ge=1, description="first operands are among so many newest quantities; 1: the longest chains"
    )
    numbers: float = Field(0.15, ge=0, le=1, description="share of statements that give a number")
    binary: float = Field(0.3, ge=0, le=1, description="share of the others that have a second operand, any known one")
    shared: bool = Field(True, description="false: a quantity is an operand once at most, so that programs are trees")
    distractors: float = Field(0.0, ge=0, lt=1, description="share of statements that no question needs")
    questions: int = Field(2, ge=1, description="questions after a window, each a probe")
    asked: Literal["each", "end"] = Field("each", description="each: after every window; end: after the last one only")
    form: Form = Field("symbols", description="symbols: 4 tokens a statement; words: a sentence of up to 10")
    order: Literal["story", "shuffled"] = Field("story", description="of the statements within a window")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fewest_windows > self.windows:
            raise ValueError(f"min_windows={self.min_windows} must not exceed windows={self.windows}")
        if self.names <= self.statements:
            raise ValueError(
                f"names={self.names} must exceed statements={self.statements}, or a window overwrites what it needs: write "
                + (f"names={self.statements + 1}" if self.statements < MOST_NAMES else f"statements={MOST_NAMES - 1}")
            )
        if self.windows * self.statements < SPLIT:
            raise ValueError(
                f"windows={self.windows} of statements={self.statements} make too few programs to hold some out: write "
                f"windows={-(-SPLIT // self.statements)} or more"
            )
        return self

    @property
    def fewest_windows(self) -> int:
        return self.min_windows or self.windows

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    @property
    def window(self) -> int:
        return self.statements * LONGEST[self.form]

    @property
    def context_length(self) -> int:
        return self.window * (1 if self.asked == "each" else self.windows)

    @property
    def sequence_length(self) -> int:
        asked_after = self.windows if self.asked == "each" else 1
        return self.windows * self.window + asked_after * self.questions * self._probe

    def token_name(self, token: int) -> str:
        return self._words[token]

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """A program that belongs to the test (`held_out`) or to the training, with questions."""
        windows = int(rng.integers(self.fewest_windows, self.windows + 1))
        program = self._draw_program(windows, rng, held_out)
        values, depths = _solve(program, self.modulus)
        drawn = rng.permutation(self.names).tolist()
        names = [NAMES[self.form][drawn[i % self.names]] for i in range(len(program))]

        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        answers = []
        for window in range(windows):
            first, stop = window * self.statements, (window + 1) * self.statements
            order = rng.permutation(self.statements).tolist()
            place = self.windows - windows + window
            told = [first + i for i in (order if self.order == "shuffled" else sorted(order))]
            self._write(tokens, self._start(place), " ".join(self._tell(program, i, names) for i in told))
            known = [i for i in range(max(0, stop - self.names), stop) if program[i].asked]
            for start, asked in zip(self._probe_starts(place), self._draw_questions(known, rng), strict=False):
                end = self._write(tokens, start, QUESTION[self.form].format(x=names[asked]) + f" {values[asked]}")
                loss_mask[end - 1] = True
                answers.append((end - 1, end, depths[asked]))
        starts = np.array([start for place in range(self.windows) for start in self._probe_starts(place)])
        probes = np.stack([starts, starts + self._probe], axis=1)
        return Sample(tokens, loss_mask, np.array(answers, dtype=np.int32), probes.astype(np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """Any value; one of the numbers told so far; what the last window gives where all that it does not tell is 0."""
        text = [self._words[token] for token in sample.tokens.tolist()]
        any_value: list[tuple[int, ...]] = [(self._ids[str(value)],) for value in range(self.modulus)]
        guesses: dict[str, Candidates] = {}
        told: dict[str, dict[str, str]] = {}  # the newest statement of each name
        last_window: dict[str, dict[str, str]] = {}
        numbers: list[str] = []
        place = 0
        for answer in sample.answers[:, 0].tolist():
            while place < self.windows and (start := self._start(place)) < answer:
                statements = self._read(text[start : start + self.window])
                last_window = {statement["x"]: statement for statement in statements}
                told |= last_window
                numbers += [statement["n"] for statement in statements if "n" in statement]
                place += 1
            (asked,) = (word for word in text[answer - self._probe + 1 : answer] if word in told)
            drawn = {
                "any value": None,
                "the commonest number": Counter(numbers).most_common(1)[0][0] if numbers else None,
                "the last number": numbers[-1] if numbers else None,
                "the number of its statement": told[asked].get("n"),
                "the number of its operand's statement": told.get(told[asked].get("a", ""), {}).get("n"),
                "the last window alone": str(self._value(asked, last_window)),
            }
            for name, number in drawn.items():
                guesses.setdefault(name, []).append(any_value if number is None else [(self._ids[number],)])
        return guesses

    # Where things are. Token ids: pad, the numbers, the other words of statements and questions.

    @property
    def _words(self) -> tuple[str, ...]:
        return _vocabulary(self.form, self.names, self.modulus)

    @property
    def _ids(self) -> dict[str, int]:
        return _ids(self.form, self.names, self.modulus)

    @property
    def _probe(self) -> int:
        """Tokens of a question and its value."""
        return len(QUESTION[self.form].split()) + 1

    def _start(self, place: int) -> int:
        """The first token of a window."""
        return place * (self.window + (self.questions * self._probe if self.asked == "each" else 0))

    def _probe_starts(self, place: int) -> list[int]:
        """The first token of each probe after a window."""
        if self.asked == "end" and place < self.windows - 1:
            return []
        return [self._start(place) + self.window + question * self._probe for question in range(self.questions)]

    # Drawing. The random numbers are the same for both forms and orders.

    def _draw_program(self, windows: int, rng: np.random.Generator, held_out: bool) -> list[Statement]:
        """Of programs with SPLIT statements or more, a fifth of all beginnings is never trained on."""

        def draw() -> list[Statement]:
            return self._draw_statements(windows * self.statements, rng)

        if windows * self.statements < SPLIT:
            return draw()
        beginning = math.ceil(SPLIT / self.statements) * self.statements
        name = f"program with modulus={self.modulus}, numbers={self.numbers}"
        return draw_problem(draw, lambda program: _canonical(program[:beginning]), held_out, name)

    def _draw_statements(self, count: int, rng: np.random.Generator) -> list[Statement]:
        program: list[Statement] = []
        operands: set[int] = set()
        for i, (story, *luck) in enumerate(rng.random((count, 7)).tolist()):
            # What the whole window still knows at its end: nothing in it depends on the order within.
            known = range(max(0, (i // self.statements + 1) * self.statements - self.names), i)
            # There is always a quantity to ask for.
            asked = story >= self.distractors or not any(program[j].asked for j in known)
            pool = [j for j in known if program[j].asked == asked and (self.shared or j not in operands)]
            program.append(self._draw_statement(pool, luck)._replace(asked=asked))
            operands |= {*program[i].operands}
        return program

    def _draw_statement(self, pool: list[int], luck: list[float]) -> Statement:
        """A statement about quantities in `pool`, from six numbers in [0, 1)."""

        def pick(choices: list, share: float):
            return choices[int(share * len(choices))]

        is_number, is_binary, first, second, kind, number = luck
        if not pool or is_number < self.numbers:
            return Statement("number", (), pick([*range(self.modulus)], number))
        a = pick(pool[-self.recent :], first)
        if is_binary < self.binary and len(pool) > 1:
            return Statement(pick([*BINARY], kind), (a, pick([j for j in pool if j != a], second)))
        # A product by a unit keeps all values equally likely.
        units = [n for n in range(2, self.modulus) if math.gcd(n, self.modulus) == 1]
        operation = pick([name for name in UNARY if name != "times" or units], kind)
        return Statement(operation, (a,), pick(units if operation == "times" else [*range(1, self.modulus)], number))

    def _draw_questions(self, known: list[int], rng: np.random.Generator) -> list[int]:
        """The newest quantity, then any others; one returns only if there are too few."""
        *others, newest = known
        drawn = rng.permutation(others or known).tolist() * self.questions
        return [newest, *drawn[: self.questions - 1]]

    # Writing and reading.

    def _tell(self, program: list[Statement], i: int, names: list[str]) -> str:
        """The text of statement i."""
        kind, operands, number, _ = program[i]
        named = dict(zip("ab", (names[j] for j in operands), strict=False))
        return STATEMENTS[self.form][kind].format(x=names[i], n=number, **named)

    def _write(self, tokens: np.ndarray, start: int, text: str) -> int:
        """Write words from `start` on; returns the end."""
        ids = self._ids
        written = [ids[word] for word in text.split()]
        tokens[start : start + len(written)] = written
        return start + len(written)

    def _read(self, words: list[str]) -> list[dict[str, str]]:
        """The statements in a window: kind, x and those of a, b and n that the kind has."""
        text = " ".join(word for word in words if word != "[pad]")
        return [
            {"kind": kind, **found.groupdict()}
            for sentence in re.findall(r"\S.*? >\S+|\S.*? \.", text)
            for kind, pattern in _patterns(self.form).items()
            if (found := pattern.fullmatch(sentence))
        ]

    def _value(self, name: str, told: dict[str, dict[str, str]]) -> int:
        """The value of a name from the statements in `told`; 0 if none tells it."""
        if name not in told:
            return 0
        statement = told[name]
        a, b = (self._value(statement[of], told) if of in statement else 0 for of in "ab")
        return VALUES[statement["kind"]](a, b, int(statement.get("n", 0))) % self.modulus


def _solve(program: list[Statement], modulus: int) -> tuple[list[int], list[int]]:
    """The value of each quantity, and the longest chain of operations that it needs."""
    values: list[int] = []
    depths: list[int] = []
    for kind, operands, number, _ in program:
        a, b, *_ = (*(values[j] for j in operands), 0, 0)
        values.append(VALUES[kind](a, b, number) % modulus)
        depths.append(1 + max(depths[j] for j in operands) if operands else 0)
    return values, depths


def _canonical(program: list[Statement]) -> list[int]:
    """The same numbers for every naming and every order of the same statements."""
    digests: list[int] = []
    for kind, operands, number, _ in program:
        content = (kind, number, *(digests[j] for j in operands))
        digests.append(zlib.crc32(repr(content).encode()) >> 1)  # fits a signed 32-bit number
    return sorted(digests)


@lru_cache
def _vocabulary(form: Form, names: int, modulus: int) -> tuple[str, ...]:
    words = " ".join([*STATEMENTS[form].values(), QUESTION[form]]).split()
    plain = dict.fromkeys(word for word in words if "{" not in word and not word.isdigit())
    tokens = ["[pad]", *map(str, range(modulus)), *plain, *NAMES[form][:names]]
    return (*tokens, *(f">{name}" for name in NAMES[form][:names] if form == "symbols"))


@lru_cache
def _ids(form: Form, names: int, modulus: int) -> dict[str, int]:
    return {word: token for token, word in enumerate(_vocabulary(form, names, modulus))}


@lru_cache
def _patterns(form: Form) -> dict[str, re.Pattern]:
    """An expression for each kind of statement, with the groups x, a, b and n."""
    patterns = {}
    for kind, template in STATEMENTS[form].items():
        pattern = re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)")
        patterns[kind] = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>[A-Za-z]+)", pattern))
    return patterns
