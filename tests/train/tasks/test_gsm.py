"""The word problems, read back as text by a solver of its own: values as forms c + k x in the number asked for."""

import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest

from powernap.train.data.vocabulary import depth_name_of, described_by
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.gsm import Gsm
from powernap.train.tasks.gsm_problem import Problem, Relation, operations, solve
from powernap.train.tasks.gsm_words import SETTINGS, VOCABULARY, ids
from powernap.train.tasks.sample import Sample, TaskError

SMALL = {"ops": 8, "context_length": 480, "window": 60}
THING = r"(?:\w+ per )?\w+ in the \w+"
# What a sentence says, without "the number of" and "the average number of": its value from numbers and things.
PATTERNS = [
    (re.compile(pattern), kind)
    for pattern, kind in [
        (rf"there are (\d+) (?P<x>{THING})", "number"),
        (rf"(?P<x>{THING}) is (\d+)", "number"),
        (rf"one counts (\d+) (?P<x>{THING})", "number"),
        (rf"there are some (?P<x>{THING})", "unknown"),
        (rf"(?P<x>{THING}) is unknown", "unknown"),
        (rf"there are (\d+) more (?P<x>{THING}) than (?P<a>{THING})", "plus"),
        (rf"(?P<x>{THING}) is (\d+) plus (?P<a>{THING})", "plus"),
        (rf"there are (\d+) fewer (?P<x>{THING}) than (?P<a>{THING})", "less"),
        (rf"(?P<x>{THING}) is (?P<a>{THING}) minus (\d+)", "less"),
        (rf"there are (\d+) times as many (?P<x>{THING}) as (?P<a>{THING})", "times"),
        (rf"(?P<x>{THING}) is (\d+) times (?P<a>{THING})", "times"),
        (rf"there are as many (?P<x>{THING}) as (?P<a>{THING}) and (?P<b>{THING}) together", "sum"),
        (rf"(?P<x>{THING}) is the sum of (?P<a>{THING}) and (?P<b>{THING})", "sum"),
        (rf"(?P<x>{THING}) is (?P<a>{THING}) minus (?P<b>{THING})", "difference"),
        (rf"(?P<a>{THING}) exceed (?P<b>{THING}) by (?P<x>{THING})", "difference"),
    ]
]
WORDS_OF_TOTALS, WORDS_OF_PARTS = ["things", "schools", "films"], ["tags", "teachers", "nominations"]
SINGULAR = {plural: singular for setting in SETTINGS for plural, singular in setting.kinds.items()}


def text_of(sample, task):
    """The context, with the digits of a number together."""
    context = sample.tokens[: task.context_length]
    words = " ".join(VOCABULARY[token] for token in context[context > 0])
    return re.sub(r"(?<=\d) (?=\d)", "", words)


@dataclass
class Told:
    """What a text says."""

    asked: str
    sentences: list[str]  # in order
    numbers: dict[str, int] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    derived: dict[str, tuple[str, int, list[str]]] = field(default_factory=dict)  # kind, number, things

    def derivation(self, thing):
        """How a thing follows from others: told, or implied by its name; None if it does not."""
        if thing in self.derived:
            return self.derived[thing]
        what, place = thing.split(" in the ")
        if what not in WORDS_OF_TOTALS + WORDS_OF_PARTS:
            return None
        known = [thing.split(" in the ") for thing in (*self.numbers, *self.unknown, *self.derived)]
        kinds = [kind for kind, where in known if where == place and kind in SINGULAR]
        if what in WORDS_OF_TOTALS:
            return "total", 0, [f"{kind} in the {place}" for kind in kinds]
        pairs = [(f"{kind} in the {place}", f"{what} per {SINGULAR[kind]} in the {place}") for kind in kinds]
        return "parts", 0, [thing for pair in pairs for thing in pair]


def read(text):
    question, rest = re.fullmatch(r"(.*?[?.]) (.*)", text).groups()
    told = Told(re.search(THING, question.replace("number of ", ""))[0], rest.removesuffix(" .").split(" . "))
    for sentence in told.sentences:
        short = re.sub("the (average )?number of ", "", sentence)
        ((match, kind),) = [(m, kind) for pattern, kind in PATTERNS if (m := pattern.fullmatch(short))]
        named = match.groupdict()
        number = next((int(group) for group in match.groups() if group.isdigit()), 0)
        things = [named[key] for key in "ab" if key in named]
        place = {"number": told.numbers, "unknown": told.unknown}.get(kind, told.derived)
        assert named["x"] not in place
        if kind == "unknown":
            told.unknown.add(named["x"])
        else:
            place[named["x"]] = number if kind == "number" else (kind, number, things)
    return told


def form(thing, told, x, seen):
    """c and k of a thing's value c + k x; `seen` takes the derived things, each with its operations."""
    derivation = told.derivation(thing)
    if thing == x:
        return Fraction(0), Fraction(1)
    if derivation is None:
        return Fraction(told.numbers[thing]), Fraction(0)
    kind, n, things = derivation
    seen[thing] = {"total": len(things) - 1, "parts": len(things) - 1}.get(kind, 1)
    (c, k), *rest = (form(other, told, x, seen) for other in things)
    if kind == "plus":
        return c + n, k
    if kind == "less":
        return c - n, k
    if kind == "times":
        return c * n, k * n
    if kind == "difference":
        return c - rest[0][0], k - rest[0][1]
    if kind == "parts":
        forms = [(c, k), *rest]
        products = [(c * d, c * m + k * d) for (c, k), (d, m) in zip(forms[::2], forms[1::2], strict=True) if not k * m]
        assert 2 * len(products) == len(forms)  # none is quadratic
        return sum(c for c, _ in products), sum(k for _, k in products)
    return c + sum(c for c, _ in rest), k + sum(k for _, k in rest)


def height(thing, told):
    """The longest chain of derivations to a thing."""
    derivation = told.derivation(thing)
    return 0 if derivation is None else 1 + max(height(other, told) for other in derivation[2])


def chain_down(last, told, x):
    """The longest chain of derivations to x, where the value of `last` is told."""
    level, thing = 0, last
    while thing != x:
        things = told.derivation(thing)[2]
        (lower,) = [other for other in things if other == x or form(other, told, x, {})[1]]
        level = 1 + max([level, *(height(other, told) for other in things if other != lower)])
        thing = lower
    return level


def answered(told):
    """The answer, its operations by derived thing, its chain, and whether it was found backward."""
    x = told.asked
    if x not in told.unknown:
        seen = {}
        value, slope = form(x, told, None, seen)
        assert slope == 0
        return value, seen, height(x, told), False
    found = []
    for last in told.numbers:
        if told.derivation(last) is None:
            continue
        seen = {}
        try:
            c, k = form(last, told, x, seen)
        except KeyError:  # the unknown of another problem
            continue
        if k:
            found.append(((told.numbers[last] - c) / k, seen, chain_down(last, told, x), True))
    (only,) = found
    return only


def needed(told):
    """All things that the answer rests on."""
    _, seen, _, backward = answered(told)
    return {told.asked, *seen, *(thing for derived in seen for thing in told.derivation(derived)[2])}


def answer_of(sample):
    ((start, stop, depth),) = sample.answers.tolist()
    *digits, end = (VOCABULARY[token] for token in sample.tokens[start:stop])
    assert end == "[end]" and VOCABULARY[sample.tokens[start - 1]] == "[answer]"
    return int("".join(digits)), depth


def texts(count, seed=0, **fields):
    """Samples and what their texts say; every other one is held out."""
    task = Gsm(**{**SMALL, **fields})
    for number in range(count):
        sample = task.sample(np.random.default_rng([seed, number]), number % 2 == 1)
        yield sample, read(text_of(sample, task))


@pytest.mark.parametrize("mode", ["forward", "reverse", "both"])
@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_every_answer_follows_from_the_text(difficulty, mode):
    by_chain = Gsm(**SMALL, difficulty=difficulty, mode=mode, depth="chain")
    depths, backward, shared = Counter(), 0, 0
    for number, (sample, told) in enumerate(texts(40, seed=1, difficulty=difficulty, mode=mode)):
        value, seen, chain, was_backward = answered(told)
        assert answer_of(sample) == (value, sum(seen.values())) and 0 <= value <= 99
        again = by_chain.sample(np.random.default_rng([1, number]), number % 2 == 1)
        assert np.array_equal(sample.tokens, again.tokens) and answer_of(again) == (value, chain)
        depths[sum(seen.values())] += 1
        backward += was_backward
        shared += max(Counter(thing for one in seen for thing in told.derivation(one)[2]).values()) > 1
    assert set(depths) >= set(range(2, 8)) <= set(range(1, 9)) and shared > 3
    assert {"forward": backward == 0, "reverse": backward == 40, "both": 8 < backward < 32}[mode]


def test_difficulty_adds_totals_and_then_products():
    kinds = {}
    for difficulty in ("easy", "medium", "hard"):
        seen = Counter()
        for _, told in texts(40, difficulty=difficulty):
            rests_on = needed(told)
            seen.update(told.derivation(thing)[0] for thing in rests_on if told.derivation(thing))
            seen["average"] += any(" per " in thing for thing in rests_on)
        kinds[difficulty] = set(+seen)
    easy = {"plus", "less", "sum", "difference"}
    assert kinds == {"easy": easy, "medium": easy | {"total"}, "hard": easy | {"total", "times", "parts", "average"}}


def test_all_three_settings_are_drawn():
    seen = Counter(
        setting.parts
        for _, told in texts(60)
        for setting in SETTINGS
        if any(thing.split(" in ")[0] in setting.kinds for thing in told.numbers)
    )
    assert len(seen) == 3 and min(seen.values()) > 8 and sum(seen.values()) == 60


def test_the_papers_size_is_filled():
    task = Gsm()
    assert (task.context_length, task.window, task.sequence_length) == (2000, 2000, 2004)
    for seed in range(5):
        sample = task.sample(np.random.default_rng(seed), False)
        filled = (sample.tokens[: task.context_length] > 0).sum()
        assert task.context_length - 60 < filled <= task.context_length
        value, seen, _, _ = answered(read(text_of(sample, task)))
        assert (value, sum(seen.values())) == answer_of(sample)


def test_what_matters_is_spread_over_the_context():
    """Where the first and the last sentence that the answer needs stand, as a share of the context."""
    places = []
    for _, told in texts(60, min_ops=4, ops=4):
        rests_on = needed(told)
        at = [n / len(told.sentences) for n, about in enumerate(map(things_of, told.sentences)) if rests_on & about]
        places += [min(at), max(at)]
    assert np.mean(places[::2]) < 0.3 and np.mean(places[1::2]) > 0.7


def things_of(sentence):
    return set(re.findall(THING, re.sub("the (average )?number of ", "", sentence)))


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_nothing_but_the_question_tells_what_matters(difficulty):
    """Needed quantities and distractors are mentioned, told as numbers and placed alike.

    In generator 2 the first ratio is 2.3, and others are derived from a needed quantity 3.9 times as often.
    """
    mentions, plain, places = defaultdict(list), defaultdict(list), defaultdict(list)
    for _, told in texts(100, difficulty=difficulty, context_length=960):
        rests_on = needed(told)
        about = [things_of(sentence) for sentence in told.sentences]
        for thing, count in Counter(thing for things in about for thing in things).items():
            mentions[thing in rests_on].append(count)
        for place, (sentence, things) in enumerate(zip(told.sentences, about, strict=True)):
            matters = things <= rests_on
            plain[matters].append(len(things) == 1 and any(map(str.isdigit, sentence)))
            places[matters].append(place / len(about))
    assert np.mean(mentions[True]) / np.mean(mentions[False]) == pytest.approx(1, abs=0.1)
    assert np.mean(np.array(mentions[True]) > 2) == pytest.approx(np.mean(np.array(mentions[False]) > 2), abs=0.06)
    assert np.mean(plain[True]) == pytest.approx(np.mean(plain[False]), abs=0.08)
    assert np.mean(places[True]) == pytest.approx(np.mean(places[False]), abs=0.04)


def test_a_problem_is_held_out_whatever_its_words_and_distractors():
    three = Relation(("apples", "barn"), "number", (), 3, "there are {n} {x} .")
    more = Relation(("hens", "barn"), "more", (three.of,), 2, "{X} is {n} plus {A} .")
    problem = Problem(more.of, [three, more], [], 0).canonical()
    other = Relation(three.of, "number", (), 3, "{X} is {n} .")
    assert Problem(more.of, [more, other], [], 99).canonical() == problem
    assert Problem(more.of, [more], [other], 99).canonical() == problem  # whoever told the number
    four = Relation(three.of, "number", (), 4, "{X} is {n} .")
    assert Problem(more.of, [more, four], [], 0).canonical() != problem
    assert Problem(three.of, [more, three], [], 0).canonical() != problem
    tiny = {"ops": 1, "context_length": 120, "difficulty": "easy"}
    sides = defaultdict(set)
    for number, (_, told) in enumerate(texts(300, **tiny)):
        sides[number % 2].add((told.asked, *sorted((thing, told.numbers.get(thing)) for thing in needed(told))))
    assert not sides[0] & sides[1]


A, B, C = ("apples", "barn"), ("beans", "barn"), ("coats", "barn")


@pytest.mark.parametrize(
    ("relations", "message"),
    [
        ([("number", A, (), 3), ("sum", B, (A, C), None), ("more", C, (B,), 2)], "stated by each other"),
        ([("number", A, (), 3), ("number", A, (), 3)], "stated twice"),
        ([("number", A, (), 3), ("more", B, (A,), 1), ("fewer", B, (A,), 1)], "stated twice"),
        ([("number", A, (), 0), ("total of parts", B, (A, C), None), ("number", B, (), 0)], "leaves .* open"),
        ([("times", B, (A,), 2), ("number", B, (), 3)], "leaves .* open"),
    ],
)
def test_relations_without_one_answer_are_refused(relations, message):
    with pytest.raises(TaskError, match=message):
        solve([Relation(of, operation, by, number) for operation, of, by, number in relations])


def test_relations_are_solved_in_any_direction():
    relations = [
        Relation(A, "number", (), 3),
        Relation(B, "unknown"),
        Relation(("things", "barn"), "total", (A, B)),
        Relation(C, "times", (("things", "barn"),), 2),
        Relation(C, "number", (), 20),
    ]
    found = solve(relations)
    assert (found[B].value, found[B].chain, operations(found, B)) == (7, 2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_ops": 3, "ops": 2}, "min_ops=3 must not exceed ops=2"),
        (
            {"context_length": 700, "window": 300},
            "window=300 must divide context_length=700: context_length=900 would do",
        ),
        ({"context_length": 100, "window": 50}, "ops=8 may take 432 tokens: write context_length=432 or more"),
        ({"window": 2, "context_length": 2000}, "window=2 must hold the 4 tokens of an answer"),
        ({"difficulty": "symbolic"}, "difficulty"),
    ],
)
def test_sizes_that_allow_no_problem(fields, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        check(Gsm, fields)


def test_the_smallest_sizes_allow_problems():
    for seed in range(20):
        task = Gsm(ops=1 + seed % 8, context_length=24 * (2 * (1 + seed % 8) + 2), window=24, max_value=9)
        assert task.sample(np.random.default_rng(seed), seed % 2 == 1).loss_mask.sum() == 2


def test_texts_that_no_names_suffice_for_are_padded():
    task = Gsm(ops=2, context_length=40_000, window=40_000, difficulty="medium")
    sample = task.sample(np.random.default_rng(0), False)
    assert 15_000 < (sample.tokens[: task.context_length] > 0).sum() < 30_000
    value, seen, _, _ = answered(read(text_of(sample, task)))
    assert (value, sum(seen.values())) == answer_of(sample)


def test_shards_of_generator_2_are_read():
    """Their tokens stand for the same words, and their manifests for a task with guesses."""
    fields = {"ops": 8, "min_ops": 1, "context_length": 480, "window": 60, "max_value": 99}
    task = described_by({"task": "gsm", "generator": 2, "fields": fields, "vocab_size": 100})
    names = [task.token_name(token) for token in range(100)]
    assert zlib.crc32(" ".join(names).encode()) == 1916260510
    text = "how many hens in the mill are there ? there are 2 more hens in the mill than bees in the barn . " \
        "one counts 1 7 bees in the barn ."  # fmt: skip
    tokens = np.zeros(task.sequence_length, dtype=np.int32)
    tokens[: len(text.split())] = ids(text.split())
    guesses = task.surface_guesses(Sample(tokens, tokens > 0, np.array([[481, 483, 1]])))
    spelled = {name: " ".join(names[token] for token in drawn[0][0]) for name, drawn in guesses.items()}
    assert spelled["number beside the asked"] == "2 [end]" and spelled["largest number"] == "1 7 [end]"
    assert spelled["number beside the most mentioned"] == "2 [end]"  # of the bees, which two sentences name
    tokens[: len(text.split())] = 0
    assert task.surface_guesses(Sample(tokens, tokens > 0, np.array([[481, 483, 1]]))) == {}


def test_the_depth_has_a_name():
    assert [Gsm(depth=depth).depth_name for depth in ("ops", "chain")] == ["operations", "steps"]
    assert depth_name_of({"task": "gsm", "fields": {"depth": "chain"}}) == "steps"
