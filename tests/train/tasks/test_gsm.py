"""The word problems, read back as text by a solver of its own."""

import re
from collections import Counter

import numpy as np
import pytest

from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.gsm import LONGEST, TWO, VOCABULARY, Gsm, Statement, operations, solve
from powernap.train.tasks.sample import TaskError

SMALL = Gsm(ops=8, context_length=480, window=60)
THING = r"\w+ in the \w+"
PATTERNS = [  # what each sentence says: (pattern, how its numbers and things give the value)
    (rf"there are (\d+) (?P<x>{THING})", lambda n: n),
    (rf"the number of (?P<x>{THING}) is (\d+)", lambda n: n),
    (rf"one counts (\d+) (?P<x>{THING})", lambda n: n),
    (rf"there are (\d+) more (?P<x>{THING}) than (?P<a>{THING})", lambda n, a: a + n),
    (rf"the number of (?P<x>{THING}) is (\d+) plus the number of (?P<a>{THING})", lambda n, a: a + n),
    (rf"there are (\d+) fewer (?P<x>{THING}) than (?P<a>{THING})", lambda n, a: a - n),
    (rf"the number of (?P<x>{THING}) is the number of (?P<a>{THING}) minus (\d+)", lambda n, a: a - n),
    (rf"there are (\d+) times as many (?P<x>{THING}) as (?P<a>{THING})", lambda n, a: a * n),
    (rf"the number of (?P<x>{THING}) is (\d+) times the number of (?P<a>{THING})", lambda n, a: a * n),
    (rf"there are as many (?P<x>{THING}) as (?P<a>{THING}) and (?P<b>{THING}) together", lambda a, b: a + b),
    (rf"the number of (?P<x>{THING}) is the sum of (?P<a>{THING}) and (?P<b>{THING})", lambda a, b: a + b),
    (rf"the number of (?P<x>{THING}) is the number of (?P<a>{THING}) minus the number of (?P<b>{THING})", lambda a, b: a - b),
    (rf"(?P<a>{THING}) exceed (?P<b>{THING}) by the number of (?P<x>{THING})", lambda a, b: a - b),
]  # fmt: skip


def text_of(sample, task):
    """The context, with the digits of a number together."""
    context = sample.tokens[: task.context_length]
    words = " ".join(VOCABULARY[token] for token in context[context > 0])
    return re.sub(r"(?<=\d) (?=\d)", "", words)


def read(text):
    """The thing asked for, and thing -> (how its value follows, numbers, things)."""
    question, rest = re.fullmatch(r"(.*?[?.]) (.*)", text).groups()
    asked = re.search(THING, question.replace("number of ", "").replace("what is the ", ""))[0]
    told = {}
    for sentence in rest.removesuffix(" .").split(" . "):
        (found,) = [(m, rule) for pattern, rule in PATTERNS if (m := re.fullmatch(pattern, sentence))]
        match, rule = found
        named = match.groupdict()
        numbers = [int(group) for group in match.groups() if group.isdigit()]
        assert named["x"] not in told
        told[named["x"]] = (rule, numbers, [named[key] for key in "ab" if key in named])
    return asked, told


def value(thing, told):
    """The value of a thing, and the things told by others that it rests on."""
    rule, numbers, things = told[thing]
    parts = [value(other, told) for other in things]
    needed = set().union(*(part[1] for part in parts), {thing} if things else set())
    return rule(*numbers, *(part[0] for part in parts)), needed


def answer_of(sample):
    ((start, stop, ops),) = sample.answers.tolist()
    *digits, end = (VOCABULARY[token] for token in sample.tokens[start:stop])
    assert end == "[end]" and VOCABULARY[sample.tokens[start - 1]] == "[answer]"
    return int("".join(digits)), ops


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_follows_from_the_text(held_out):
    rng, operations_seen, sentences = np.random.default_rng(1), Counter(), Counter()
    for _ in range(150):
        sample = SMALL.sample(rng, held_out)
        asked, told = read(text_of(sample, SMALL))
        found, needed = value(asked, told)
        assert (found, len(needed)) == answer_of(sample)
        assert 0 <= found <= 99
        operations_seen[len(needed)] += 1
        sentences[len(told)] += 1
    assert set(operations_seen) == set(range(1, 9)) and min(operations_seen.values()) > 5
    assert min(sentences) > 25  # most of them distract


def test_the_papers_size_is_filled_to_the_last_statement():
    task = Gsm()
    assert (task.context_length, task.window, task.sequence_length) == (2000, 2000, 2004)
    for seed in range(5):
        sample = task.sample(np.random.default_rng(seed), False)
        assert task.context_length - LONGEST < (sample.tokens[: task.context_length] > 0).sum() <= task.context_length
        asked, told = read(text_of(sample, task))
        assert value(asked, told)[0] == answer_of(sample)[0]


def test_what_matters_is_spread_over_the_context():
    """Where the first and the last statement that the answer needs stand, as a share of the context."""
    places = []
    for seed in range(60):
        sample = Gsm(min_ops=4, ops=4, context_length=480, window=60).sample(np.random.default_rng(seed), False)
        asked, told = read(text_of(sample, SMALL))
        order = list(told)
        needed = [order.index(thing) / len(order) for thing in value(asked, told)[1]]
        places += [min(needed), max(needed)]
    assert np.mean(places[::2]) < 0.35 and np.mean(places[1::2]) > 0.65


def test_train_and_test_never_share_a_problem():
    rng = np.random.default_rng(0)
    tiny = Gsm(ops=1, context_length=120, window=60)
    train, test = ({tuple(tiny.sample(rng, held_out).tokens) for _ in range(300)} for held_out in (False, True))
    assert not train & test


def test_a_graph_without_one_answer_is_refused():
    number = Statement(("apples", "barn"), "number", (), 3, "")
    circle = [
        Statement(("hens", "barn"), "sum", (("goats", "barn"), ("apples", "barn")), None, TWO["sum"][1][0]),
        Statement(("goats", "barn"), "more", (("hens", "barn"),), 2, ""),
    ]
    with pytest.raises(TaskError, match="told by each other"):
        solve([number, *circle])
    with pytest.raises(TaskError, match="told twice"):
        solve([number, number])
    assert operations([number], number.of) == 0


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
    ],
)
def test_sizes_that_allow_no_problem(fields, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        check(Gsm, fields)
