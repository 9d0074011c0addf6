"""Word problems with a chosen number of operations, hidden among distractors (after GSM-Infinite, arXiv 2502.05252).

A problem is a graph of quantities such as "apples in the barn". Each has one statement: a number, or one operation on one
or two other quantities. The question names a quantity that takes exactly `ops` operations; it comes first, so that a
reader could know what matters, but the facts it needs are spread over the context in random order. No steps of a
solution are given.

    question statement statement ... [pad ...]       | [answer] digit ... [end] [pad ...]
    context_length tokens, whole windows             | one window, loss on digits and [end]

Text is split into words and digits, one token each.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.sample import PAD, Candidates, Sample, TaskError, draw_problem

ITEMS = (
    "apples pears plums lemons melons onions carrots beans eggs loaves jars bottles boxes baskets books pencils lamps "
    "chairs hats coats ropes bricks tiles nails wheels horses goats hens ducks bees"
).split()
PLACES = (
    "barn cellar kitchen attic garden orchard market harbor school library temple castle mill forge bakery stable garage "
    "museum station theater clinic office workshop tower bridge village valley forest island quarry"
).split()

# {x}: the quantity that is stated, {a} and {b}: those it is derived from, {n}: a number.
QUESTIONS = ("how many {x} are there ?", "find the number of {x} .", "what is the number of {x} ?")
NUMBER = ("there are {n} {x} .", "the number of {x} is {n} .", "one counts {n} {x} .")
ONE = {  # operation: (function of a and n, templates)
    "more": (
        lambda a, n: a + n,
        ("there are {n} more {x} than {a} .", "the number of {x} is {n} plus the number of {a} ."),
    ),
    "fewer": (
        lambda a, n: a - n,
        ("there are {n} fewer {x} than {a} .", "the number of {x} is the number of {a} minus {n} ."),
    ),
    "times": (
        lambda a, n: a * n,
        ("there are {n} times as many {x} as {a} .", "the number of {x} is {n} times the number of {a} ."),
    ),
}
TWO = {  # operation: (function of a and b, templates)
    "sum": (
        lambda a, b: a + b,
        ("there are as many {x} as {a} and {b} together .", "the number of {x} is the sum of {a} and {b} ."),
    ),
    "difference": (
        lambda a, b: a - b,
        ("the number of {x} is the number of {a} minus the number of {b} .", "{a} exceed {b} by the number of {x} ."),
    ),
}

ANSWER, END = "[answer]", "[end]"
TRIES = 1000

Name = tuple[str, str]  # item, place


@dataclass(frozen=True)
class Statement:
    """The statement of one quantity."""

    of: Name
    operation: str  # "number", or a key of ONE or TWO
    by: tuple[Name, ...]
    number: int | None
    template: str

    def words(self) -> list[str]:
        named = {key: f"{item} in the {place}" for key, (item, place) in zip("ab", self.by, strict=False)}
        item, place = self.of
        number = "" if self.number is None else " ".join(str(self.number))
        return self.template.format(x=f"{item} in the {place}", n=number, **named).split()


class Gsm(Section):
    """Sizes of the word problems; the defaults are near the paper's GSM-Infinite."""

    depth_name: ClassVar[str] = "operations"

    ops: int = Field(8, ge=1, description="most operations an answer takes")
    min_ops: int = Field(1, ge=1, description="fewest operations an answer takes")
    context_length: int = Field(2000, ge=20, description="tokens of question and statements, filled with distractors")
    window: int = Field(2000, ge=1, description="L; divides context_length")
    max_value: int = Field(99, ge=9, le=9999, description="no quantity is larger")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_ops > self.ops:
            raise ValueError(f"min_ops={self.min_ops} must not exceed ops={self.ops}")
        if self.context_length % self.window:
            raise ValueError(
                f"window={self.window} must divide context_length={self.context_length}: "
                f"context_length={-(-self.context_length // self.window) * self.window} would do"
            )
        if self._answer_length > self.window:
            raise ValueError(f"window={self.window} must hold the {self._answer_length} tokens of an answer")
        needed = LONGEST * (2 * self.ops + 2)  # the question, and at most 2 * ops + 1 statements
        if needed > self.context_length:
            raise ValueError(f"ops={self.ops} may take {needed} tokens: write context_length={needed} or more")
        return self

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY)

    @property
    def sequence_length(self) -> int:
        return self.context_length + self._answer_length

    @property
    def _answer_length(self) -> int:
        """[answer], the digits, [end]."""
        return len(str(self.max_value)) + 2

    def token_name(self, token: int) -> str:
        """A token's name for display."""
        return VOCABULARY[token]

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """Draw a problem, held out or not."""
        ops = int(rng.integers(self.min_ops, self.ops + 1))
        words, answer = draw_problem(
            lambda: self._draw(ops, rng), lambda drawn: _ids(drawn[0]), held_out, f"gsm with ops={ops}"
        )
        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        tokens[: len(words)] = _ids(words)
        reply = _ids([ANSWER, *str(answer), END])
        start, stop = self.context_length + 1, self.context_length + len(reply)
        tokens[start - 1 : stop] = reply
        loss_mask[start:stop] = True
        return Sample(tokens, loss_mask, np.array([(start, stop, ops)], dtype=np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """A number from the text: the first, last, commonest, largest, or one beside the quantity asked for."""
        words = [VOCABULARY[token] for token in sample.tokens[: self.context_length] if token != PAD]
        sentences = " ".join(words).replace("?", ".").split(" . ")
        asked = re.search(r"\S+ in the \S+", sentences[0].replace("number of ", "").replace("what is the ", ""))
        numbers = _numbers(" ".join(sentences[1:]))
        if not numbers or not asked:
            return {}
        beside = [number for sentence in sentences[1:] if asked[0] in sentence for number in _numbers(sentence)]
        guesses = {
            "first number": numbers[0],
            "last number": numbers[-1],
            "commonest number": Counter(numbers).most_common(1)[0][0],
            "largest number": max(numbers, key=int),
            "number beside the asked": (beside or numbers)[0],
        }
        return {name: [[tuple(_ids([*number, END]))]] * len(sample.answers) for name, number in guesses.items()}

    def _draw(self, ops: int, rng: np.random.Generator) -> tuple[list[str], int]:
        """Question and statements as words, and the answer."""
        for _ in range(TRIES):
            problem = _Problem(self.max_value, rng)
            asked = problem.add(ops)
            if asked is not None:
                break
        else:
            raise TaskError(f"gsm: no problem of {ops} operations with max_value={self.max_value}: choose a larger one")
        question = _pick(rng, QUESTIONS).format(x=f"{asked[0]} in the {asked[1]}").split()
        room = self.context_length - len(question) - sum(len(s.words()) for s in problem.statements)
        while room >= LONGEST and problem.names_left:
            problem.add_distractor()
            room -= len(problem.statements[-1].words())
        values = solve(problem.statements)
        assert values == problem.values and operations(problem.statements, asked) == ops
        order = rng.permutation(len(problem.statements))
        return question + [word for i in order for word in problem.statements[i].words()], values[asked]


class _Problem:
    """The statements so far, and their quantities' values."""

    def __init__(self, max_value: int, rng: np.random.Generator):
        self.statements: list[Statement] = []
        self.values: dict[Name, int] = {}
        self._max_value, self._rng = max_value, rng
        self._names = iter(rng.permutation(len(ITEMS) * len(PLACES)).tolist())
        self.names_left = len(ITEMS) * len(PLACES)

    def add(self, ops: int) -> Name | None:
        """Add a quantity that takes exactly `ops` operations, and all it needs; None if a value is out of range."""
        if ops == 0:
            return self._state("number", (), int(self._rng.integers(1, self._max_value // 3 + 1)))
        if self._rng.random() < 0.5:
            first = self.add(ops - 1)
            return first and self._operate_on(first)
        ops_of_first = int(self._rng.integers(ops))
        first, second = self.add(ops_of_first), self.add(ops - 1 - ops_of_first)
        return first and second and self._combine(first, second)

    def add_distractor(self) -> None:
        """Add a quantity that nothing so far needs; half of them are derived from others."""
        known = list(self.values)
        for _ in range(4):
            kind = self._rng.random()
            first, second = (known[int(i)] for i in self._rng.integers(len(known), size=2))
            if kind < 0.25 and self._operate_on(first):
                return
            if 0.25 <= kind < 0.5 and first != second and self._combine(first, second):
                return
        self.add(0)

    def _operate_on(self, first: Name) -> Name | None:
        operation = _pick(self._rng, tuple(ONE))
        number = int(self._rng.integers(2, 5 if operation == "times" else 10))
        return self._state(operation, (first,), number)

    def _combine(self, first: Name, second: Name) -> Name | None:
        return self._state(_pick(self._rng, tuple(TWO)), (first, second), None)

    def _state(self, operation: str, by: tuple[Name, ...], number: int | None) -> Name | None:
        value = _value(operation, [self.values[name] for name in by], number)
        if not 0 <= value <= self._max_value:
            return None
        place, item = divmod(next(self._names), len(ITEMS))
        self.names_left -= 1
        name = (ITEMS[item], PLACES[place])
        self.statements.append(Statement(name, operation, by, number, _pick(self._rng, _templates(operation))))
        self.values[name] = value
        return name


def solve(statements: list[Statement]) -> dict[Name, int]:
    """The value of every quantity, from the statements alone, in any order.

    Raises:
        TaskError: if a quantity is stated twice or cannot be reached: there would be two answers, or none.
    """
    by_name = {statement.of: statement for statement in statements}
    if len(by_name) < len(statements):
        raise TaskError("gsm: a quantity is told twice")
    values: dict[Name, int] = {}
    waiting = list(by_name.values())
    while waiting:
        ready = [statement for statement in waiting if all(name in values for name in statement.by)]
        if not ready:
            raise TaskError("gsm: quantities are told by each other")
        for statement in ready:
            values[statement.of] = _value(
                statement.operation, [values[name] for name in statement.by], statement.number
            )
        waiting = [statement for statement in waiting if statement.of not in values]
    return values


def operations(statements: list[Statement], asked: Name) -> int:
    """How many operations the quantity `asked` takes: the statements it depends on that are not plain numbers."""
    by_name = {statement.of: statement for statement in statements}
    needed, open_names = set(), [asked]
    while open_names:
        name = open_names.pop()
        if name not in needed:
            needed.add(name)
            open_names += by_name[name].by
    return sum(by_name[name].operation != "number" for name in needed)


def _value(operation: str, values: list[int], number: int | None) -> int:
    if operation == "number":
        assert number is not None
        return number
    return ONE[operation][0](values[0], number) if operation in ONE else TWO[operation][0](*values)


def _templates(operation: str) -> tuple[str, ...]:
    return NUMBER if operation == "number" else (ONE | TWO)[operation][1]


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]


def _all_templates() -> Iterator[str]:
    yield from (*QUESTIONS, *NUMBER)
    for _, templates in (ONE | TWO).values():
        yield from templates


def _vocabulary() -> list[str]:
    """[pad], the digits, the marks, then all words in alphabetical order."""
    words = {word for template in _all_templates() for word in template.split() if "{" not in word}
    return ["[pad]", *"0123456789", ANSWER, END, *sorted({*words, *ITEMS, *PLACES, "in", "the"})]


VOCABULARY = _vocabulary()
_NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}
# Tokens of the longest statement: a quantity is four words, a number at most four digits.
LONGEST = max(
    len(template.format(x="x " * 4, a="a " * 4, b="b " * 4, n="n " * 4).split()) for template in _all_templates()
)


def _numbers(text: str) -> list[str]:
    """Every number in a text with blanks between its digits."""
    return [number.replace(" ", "") for number in re.findall(r"\b\d(?: \d)*\b", text)]


def _ids(words: list[str]) -> list[int]:
    return [_NUMBERS[word] for word in words]
