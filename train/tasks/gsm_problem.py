"""Word problems as relations between quantities: how they are drawn, and how they are solved.

A text holds many problems. One of them is asked for. The others distract, and are drawn alike, so that nothing but the
question tells which quantities matter. Two problems may share a number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np

from powernap.train.tasks.gsm_words import PLACES, SENTENCES, Name, Setting, fitting, ids, say
from powernap.train.tasks.sample import TaskError

Values = Sequence[int]
# The quantity that is told of, from those that it is derived from and a number. Each is affine in each quantity.
OPERATIONS: dict[str, Callable[[Values, int], int]] = {
    "number": lambda by, n: n,
    "more": lambda by, n: by[0] + n,
    "fewer": lambda by, n: by[0] - n,
    "times": lambda by, n: by[0] * n,
    "sum": lambda by, n: by[0] + by[1],
    "difference": lambda by, n: by[0] - by[1],
    "total": lambda by, n: sum(by),  # of a place's kinds
    "total of parts": lambda by, n: sum(x * y for x, y in zip(by[::2], by[1::2], strict=True)),  # kinds and averages
}
IMPLIED = ("total", "total of parts")  # no sentence says these
USED_TWICE = 0.25  # how often an operation with two quantities takes one that the other is derived from, where it can
SHARED = 0.1  # how often a number is another problem's: rarely, as one that two problems use is needed twice as often
TOTALS = 0.25  # how often a derived quantity is a total, where that is possible
LARGEST_PLACE = 4  # kinds in a place that has a total


class Exhausted(Exception):
    """No name is left."""


@dataclass(frozen=True)
class Relation:
    """An equation: `of` is the operation on `by` and `number`. "unknown" is none: it says that the quantity exists."""

    of: Name
    operation: str
    by: tuple[Name, ...] = ()
    number: int | None = None
    template: str = ""  # of its sentence; empty if it is implied

    @property
    def operations(self) -> int:
        """Additions, subtractions and multiplications."""
        return max(1, len(self.by) - 1) if self.by else 0

    @cached_property
    def words(self) -> list[str]:
        """Its sentence; empty if it is implied."""
        return say(self.template, (self.of, *self.by), self.number) if self.template else []

    def value(self, by: Values) -> int:
        return OPERATIONS[self.operation](by, self.number or 0)

    def solved_for(self, name: Name, values: Mapping[Name, int]) -> int:
        """The value of `name`, which is `of` or one of `by`, from those of the others.

        Raises:
            TaskError: if there is no such value, or any would do.
        """
        if name == self.of:
            return self.value([values[other] for other in self.by])
        at = [self.value([trial if other == name else values[other] for other in self.by]) for trial in (0, 1)]
        slope = at[1] - at[0]
        if slope == 0 or (values[self.of] - at[0]) % slope:
            raise TaskError(f"gsm: {' '.join(self.words)} leaves {name} open")
        return (values[self.of] - at[0]) // slope


@dataclass(frozen=True)
class Found:
    """A quantity's value, the relation that gives it, and how many quantities on the longest way to it are derived."""

    value: int
    relation: Relation
    chain: int

    @property
    def others(self) -> list[Name]:
        """The quantities that the relation gives it from, and itself."""
        return [self.relation.of, *self.relation.by]


def solve(relations: Sequence[Relation]) -> dict[Name, Found]:
    """All quantities, from the relations alone, in any order and direction.

    Raises:
        TaskError: if a quantity has two values, or none.
    """
    found: dict[Name, Found] = {}
    waiting = [relation for relation in relations if relation.operation != "unknown"]
    chain = 0
    while waiting:
        values = {name: one.value for name, one in found.items()}
        new: dict[Name, Found] = {}
        left = []
        for relation in waiting:
            missing = {relation.of, *relation.by} - values.keys()
            if len(missing) > 1 or (chain == 0 and relation.by):
                left.append(relation)
                continue
            if not missing or missing & new.keys():
                raise TaskError(f"gsm: {relation.of} is stated twice")
            (name,) = missing
            new[name] = Found(relation.solved_for(name, values), relation, chain)
        if not new and chain:
            raise TaskError("gsm: quantities are stated by each other")
        found |= new
        waiting = left
        chain += 1
    return found


def operations(found: Mapping[Name, Found], asked: Name) -> int:
    """How many operations the quantity `asked` takes; a shared result is counted once."""
    needed, open_names = set(), [asked]
    while open_names:
        name = open_names.pop()
        if name not in needed:
            needed.add(name)
            open_names += found[name].others
    return sum(found[name].relation.operations for name in needed)


@dataclass(frozen=True)
class Problem:
    """A problem before it is asked."""

    asked: Name
    relations: list[Relation]  # of its own
    shared: list[Relation]  # numbers of other problems that it uses
    length: int  # of its own sentences, in words

    def canonical(self) -> list[int]:
        """The problem as numbers, whatever the order and wording of its sentences, and whatever stands beside it."""
        relations = [
            [
                list(SENTENCES).index(one.operation),
                one.number or 0,
                *_ids(one.of),
                *(n for by in one.by for n in _ids(by)),
            ]
            for one in (*self.relations, *self.shared)
            if one.operation in SENTENCES
        ]
        return [*_ids(self.asked), *(number for relation in sorted(relations) for number in relation)]


def _ids(name: Name) -> list[int]:
    return ids([*name[0].split(), name[1]])


class Problems:
    """The problems of a text.

    Args:
        totals: whether quantities may be the total of a place's kinds.
        products: whether quantities may be multiples, averages, and totals of parts.
        most: the largest value.
    """

    def __init__(self, setting: Setting, *, totals: bool, products: bool, most: int, random: np.random.Generator):
        self.relations: list[Relation] = []
        self.setting, self.products, self.most, self.random = setting, products, most, random
        places = [PLACES[place] for place in random.permutation(len(PLACES))]
        half = len(places) // 2 if totals else len(places)
        self.open = places[:half]
        self.closed = places[half:]  # each has the kinds of its total, and no other
        self.taken: set[Name] = set()
        self.to_share: list[Relation] = []  # numbers that no second problem uses yet

    def draw(self, ops: int, backward: bool) -> Problem:
        """A problem that takes exactly `ops` operations. It is not of the text until it is added.

        Args:
            backward: the value of the last quantity is told, and a number that it is derived from is asked for.

        Raises:
            Exhausted: if the names do not suffice.
        """
        while True:
            before = set(self.taken), list(self.closed)
            draft = _Draft(self)
            try:
                last = draft.derive(ops)
                asked = draft.turn_round(last) if backward else last
            except Exhausted:
                self.taken, self.closed = before
                raise
            length = sum(len(relation.words) for relation in draft.relations)
            self.taken, self.closed = before
            if asked is not None:
                return Problem(asked, draft.relations, draft.shared, length)

    def add(self, problem: Problem) -> None:
        self.relations += problem.relations
        self.to_share = [number for number in self.to_share if number not in problem.shared]
        told_twice = [one.of for one in problem.relations if one.by]
        for one in problem.relations:
            self.taken |= {one.of}
            if one.operation in IMPLIED:
                self.closed.remove(one.of[1])
            if one.operation == "number" and one.of not in told_twice:
                self.to_share.append(one)


class _Draft:
    """A problem that is being drawn."""

    def __init__(self, text: Problems):
        self.relations: list[Relation] = []
        self.shared: list[Relation] = []
        self._values: dict[Name, int] = {}
        self._text, self._random = text, text.random

    def derive(self, ops: int, most: int | None = None, name: Name | None = None) -> Name:
        """Add a quantity that takes exactly `ops` operations, and all it needs.

        Args:
            most: its largest value.
            name: its name; None: any.
        """
        most = self._text.most if most is None else most
        if ops == 0:
            return self._number(most, name)
        ways: list[Callable[[int, int, Name | None], Name]] = [self._one, self._two]
        if name is None and most > 1 and self._text.closed and self._random.random() < TOTALS:
            ways = [self._total, self._total_of_parts] if self._text.products else [self._total]
        return pick(self._random, ways)(ops, most, name)

    def turn_round(self, last: Name) -> Name | None:
        """Tell the value of the last quantity instead of a number that decides it. Returns its name; None: none does."""
        users: dict[Name, list[Relation]] = {}
        for relation in self.relations:
            for name in relation.by:
                users.setdefault(name, []).append(relation)
        numbers = [one for one in self.relations if one.operation == "number" and self._decides(one.of, last, users)]
        if not numbers:
            return None
        number = pick(self._random, numbers)
        self.relations.remove(number)
        self._say("unknown", number.of)
        self._say("number", last, (), self._values[last])
        return number.of

    def _decides(self, name: Name, last: Name, users: Mapping[Name, list[Relation]]) -> bool:
        """Whether the last quantity depends on this one along one path, on which nothing is multiplied with zero."""
        while name != last:
            if len(users[name]) > 1:
                return False
            (relation,) = users[name]
            if relation.operation == "total of parts":
                place = relation.by.index(name)
                if self._values[relation.by[place ^ 1]] == 0:
                    return False
            name = relation.of
        return True

    def _number(self, most: int, name: Name | None) -> Name:
        if name is None and self._random.random() < SHARED:
            numbers = [one for one in self._text.to_share if one not in self.shared and (one.number or 0) <= most]
            if numbers:
                number = pick(self._random, numbers)
                self.shared.append(number)
                self._values[number.of] = number.number
                return number.of
        return self._state("number", (), int(self._random.integers(1, -(-most // 3) + 1)), name)

    def _one(self, ops: int, most: int, name: Name | None) -> Name:
        """An operation with a number."""
        return self._operate(self.derive(ops - 1, most), most, name)

    def _operate(self, first: Name, most: int, name: Name | None) -> Name:
        value = self._values[first]
        ways = [("more", n) for n in range(1, 10) if value + n <= most]
        ways += [("fewer", n) for n in range(1, 10) if value >= n]
        if self._text.products:
            ways += [("times", n) for n in range(2, 5) if value * n <= most for _ in range(2)]  # as often as the others
        operation, number = pick(self._random, ways)
        return self._state(operation, (first,), number, name)

    def _two(self, ops: int, most: int, name: Name | None) -> Name:
        """A sum or difference of two quantities."""
        if ops > 1 and self._random.random() < USED_TWICE:
            return self._add_again(ops, most, name)
        ops_of_first = int(self._random.integers(ops))
        first, second = self.derive(ops_of_first, most), self.derive(ops - 1 - ops_of_first, most)
        one, other = self._values[first], self._values[second]
        ways = [("sum", first, second)] if one + other <= most else []
        ways.append(("difference", first, second) if one >= other else ("difference", second, first))
        operation, first, second = pick(self._random, ways)
        return self._state(operation, (first, second), None, name)

    def _add_again(self, ops: int, most: int, name: Name | None) -> Name:
        """The sum of a quantity and one that it is derived from. In their difference the latter might cancel out."""
        begun = len(self.relations)
        first = self.derive(ops - 1, most)
        used = [by for one in self.relations[begun:] for by in one.by]
        small = [by for by in used if self._values[by] + self._values[first] <= most]
        if not small:
            return self._operate(first, most, name)
        return self._state("sum", (first, pick(self._random, small)), None, name)

    def _total(self, ops: int, most: int, name: Name | None) -> Name:
        """The sum of a place's kinds, which the text does not tell."""
        count = int(self._random.integers(2, min(LARGEST_PLACE, ops + 1, most) + 1))
        place, kinds = self._close_a_place(count)
        parts = self._split(ops - (count - 1), count)
        by = [self.derive(n, most // count, (kind, place)) for n, kind in zip(parts, kinds, strict=True)]
        return self._imply("total", by, (self._text.setting.all_kinds, place))

    def _total_of_parts(self, ops: int, most: int, name: Name | None) -> Name:
        """The sum over a place's kinds of their number times their average, which the text does not tell."""
        setting = self._text.setting
        count = int(self._random.integers(1, min(LARGEST_PLACE - 1, (ops + 1) // 2, most) + 1))
        place, kinds = self._close_a_place(count)
        parts = iter(self._split(ops - (2 * count - 1), 2 * count))
        by: list[Name] = []
        for kind in kinds:
            average = self.derive(next(parts), isqrt(most // count), setting.average(kind, place))
            rest = most // count // max(1, self._values[average])
            by += [self.derive(next(parts), rest, (kind, place)), average]
        return self._imply("total of parts", by, (setting.parts, place))

    def _split(self, ops: int, parts: int) -> list[int]:
        return self._random.multinomial(ops, [1 / parts] * parts).tolist()

    def _close_a_place(self, count: int) -> tuple[str, list[str]]:
        """A place with no name taken in it, and `count` kinds."""
        closed, kinds = self._text.closed, list(self._text.setting.kinds)
        place = closed.pop(int(self._random.integers(len(closed))))
        return place, [kinds[kind] for kind in self._random.permutation(len(kinds))[:count]]

    def _state(self, operation: str, by: tuple[Name, ...], number: int | None, name: Name | None) -> Name:
        name = name or self._free_name()
        relation = self._say(operation, name, by, number)
        self._values[name] = relation.value([self._values[other] for other in by])
        return name

    def _say(self, operation: str, of: Name, by: tuple[Name, ...] = (), number: int | None = None) -> Relation:
        template = pick(self._random, fitting(SENTENCES[operation], (of, *by)))
        self.relations.append(Relation(of, operation, by, number, template))
        return self.relations[-1]

    def _imply(self, operation: str, by: list[Name], name: Name) -> Name:
        relation = Relation(name, operation, tuple(by))
        self.relations.append(relation)
        self._values[name] = relation.value([self._values[other] for other in by])
        return name

    def _free_name(self) -> Name:
        """A kind in an open place or, with products, a quarter of the time an average there."""
        text, kinds = self._text, list(self._text.setting.kinds)
        averages = text.products and self._random.random() < 0.25
        for _ in range(100):
            kind, place = pick(self._random, kinds), pick(self._random, text.open)
            name = text.setting.average(kind, place) if averages else (kind, place)
            if name not in text.taken:
                text.taken.add(name)
                return name
        raise Exhausted


def pick(random: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(random.random() * len(choices))]
