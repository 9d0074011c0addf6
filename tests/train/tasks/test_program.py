"""Program: samples against a solver that reads them as Python, and beginnings that training never sees."""

import ast
from functools import cache

import numpy as np
import pytest

from powernap.train.evaluation.floors import COPY, Floor
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.program import Program

TASKS = [
    Program(),
    Program(form="words", names=5, modulus=7),
    Program(statements=4, windows=3, questions=3, order="shuffled", binary=0.6, names=6),
    Program(statements=2, windows=5, min_windows=1, asked="end", distractors=0.4, modulus=6, form="words"),
    Program(windows=4, min_windows=2, questions=1, modulus=2, shared=False, recent=3),
    Program(statements=3, windows=4, distractors=0.8, names=4, order="shuffled", form="words"),
]


@cache
def as_python(sentence):
    """(what is told, its expression) of `a + 3 >b` or `there are 3 more pens than cups .`"""
    words = sentence.split()
    if words[-1][0] == ">":
        return words[-1][1:], " ".join(words[:-1])
    assert words[:2] == ["there", "are"] and words[-1] == "."
    match words[2:-1]:
        case [number, x]:
            return x, number
        case [number, "more", x, "than", a]:
            return x, f"{a} + {number}"
        case [number, "fewer", x, "than", a]:
            return x, f"{a} - {number}"
        case [number, "times", "as", "many", x, "as", a]:
            return x, f"{a} * {number}"
        case ["as", "many", x, "as", a, "and", b]:
            return x, f"{a} + {b}"
        case ["as", "many", x, "as", a, "without", b]:
            return x, f"{a} - {b}"


@cache
def parsed(expression):
    """(the names in an expression, its code)."""
    tree = ast.parse(expression, mode="eval")
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)], compile(tree, "", "eval")


class Solved:
    """A sample solved from its text.

    Attributes:
        beginnings: after each window, the formulas of all quantities told so far, written out and sorted.
        asked: (name, value, longest chain) as solved; said: (name, value, depth) as the sample has it.
        needs: for each statement, in the order of solving, the statements that it is computed from.
        of_asked: the statement of each asked quantity.
    """

    def __init__(self, task, sample):
        self.beginnings, self.asked, self.said, self.needs, self.of_asked, self.newest = [], [], [], [], [], []
        names = [task.token_name(token) for token in sample.tokens]
        is_probe = np.zeros(len(names), dtype=bool)
        depths = {int(start): int(depth) for start, _, depth in sample.answers}
        probes = iter(sample.probes.tolist())
        known, formulas, position = {}, [], 0
        for window in range(task.windows):
            text = names[position : position + task.window]
            position += task.window
            self._read([word for word in text if word != "[pad]"], known, formulas, task.modulus)
            if formulas:
                assert len(formulas) % task.statements == 0
                self.beginnings.append(tuple(sorted(formulas)))
            for number in range(task.questions if task.asked == "each" or window == task.windows - 1 else 0):
                start, stop = next(probes)
                assert start == position
                is_probe[start:stop] = True
                *question, value = names[start:stop]
                position = stop
                if not formulas:
                    assert set(names[start:stop]) == {"[pad]"}
                    continue
                (name,) = [word for word in question if word in known]
                assert question == ([name] if task.form == "symbols" else ["how", "many", name, "?"])
                self.asked.append((name, *known[name][:2]))
                self.said.append((name, int(value), depths[stop - 1]))
                self.of_asked.append(known[name][2])
                if not number:
                    self.newest.append((window, known[name][2]))
        assert position == task.sequence_length == len(names) and next(probes, None) is None
        assert len(self.asked) == len(sample.answers)
        # The loss is on the answers, each the last token of a probe.
        assert sample.loss_mask.nonzero()[0].tolist() == sample.answers[:, 0].tolist()
        assert {*(sample.answers[:, 1] - 1)} <= {*(sample.probes[:, 1] - 1)}
        assert is_probe[sample.loss_mask].all()

    def _read(self, words, known, formulas, modulus):
        """Solve a window's statements in an order that works."""
        ends = [i + 1 for i, word in enumerate(words) if word == "." or word[0] == ">"]
        assert not words or ends[-1] == len(words)
        sentences = [" ".join(words[first:stop]) for first, stop in zip([0, *ends], ends, strict=False)]
        waiting = dict(map(as_python, sentences))
        assert len(waiting) == len(sentences)  # no name twice in a window
        while waiting:
            name = next(name for name, text in waiting.items() if not waiting.keys() & {*parsed(text)[0]})
            expression = waiting.pop(name)
            operands, code = parsed(expression)
            values = {operand: known[operand][0] for operand in operands}
            chain = 1 + max(known[operand][1] for operand in operands) if operands else 0
            formula = " ".join(known[w][3] if w in known and w in operands else w for w in expression.split())
            formulas.append(f"({formula})")
            self.needs.append({known[operand][2] for operand in operands})
            known[name] = (eval(code, {}, values) % modulus, chain, len(self.needs) - 1, formulas[-1])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_what_python_computes(task):
    lengths, probes = set(), TASKS[0].sample(np.random.default_rng(0), False).probes
    for seed in range(60):
        sample = task.sample(np.random.default_rng(seed), held_out=seed % 4 == 1)
        assert (sample.tokens.dtype, sample.loss_mask.dtype, sample.answers.dtype) == (np.int32, bool, np.int32)
        solved = Solved(task, sample)
        assert solved.asked == solved.said
        probes = sample.probes if not seed else probes
        assert np.array_equal(sample.probes, probes)
        lengths.add(len(solved.beginnings))
    assert lengths == set(range(task.fewest_windows, task.windows + 1))


def solved(task, count, held_out=False, seed=0):
    generator = np.random.default_rng(seed)
    return [Solved(task, task.sample(generator, held_out)) for _ in range(count)]


@pytest.mark.parametrize(
    ("sizes", "first"),  # first: windows that decide
    [({}, 3), ({"statements": 2, "order": "shuffled", "recent": 1, "numbers": 0}, 2), ({"min_windows": 1}, 3)],
    ids=str,
)
def test_a_test_program_begins_as_no_training_program_does(sizes, first):
    short, long = Program(windows=4, **sizes), Program(windows=6, **sizes)
    trained, tested = solved(short, 800), [*solved(short, 200, True, 1), *solved(long, 50, True, 2)]
    for length in range(first, 5):
        seen, unseen = (
            {tuple(s.beginnings[:length]) for s in side if len(s.beginnings) >= length} for side in (trained, tested)
        )
        assert len(seen) > 150 and len(unseen) > 50 and not seen & unseen
    shorter = [{s.beginnings[0] for s in side} for side in (trained, tested)]
    assert shorter[0] == shorter[1] if not sizes else shorter[0] & shorter[1]  # as the docstring says


def test_a_fifth_of_all_beginnings_is_held_out():
    numbers = Program(windows=3, numbers=1)  # three numbers in any order
    trained, tested = ({s.beginnings[-1] for s in solved(numbers, 300, held_out)} for held_out in (False, True))
    assert len(trained | tested) == 35 and 0.1 < len(tested) / 35 < 0.35


@pytest.mark.parametrize("changes", [{"form": "words"}, {"order": "shuffled"}], ids=str)
def test_forms_and_orders_tell_the_same_programs(changes):
    sizes = {"statements": 2, "windows": 4, "min_windows": 2, "distractors": 0.2}
    one, other = Program(**sizes), Program(**sizes, **changes)
    texts = 0
    for seed in range(30):
        samples = [task.sample(np.random.default_rng(seed), seed % 2 == 1) for task in (one, other)]
        a, b = (Solved(task, sample) for task, sample in zip((one, other), samples, strict=True))
        assert [said[1:] for said in a.said] == [said[1:] for said in b.said]
        plain = [f.replace("0 + ", "") for f in a.beginnings[-1]], [f.replace("0 + ", "") for f in b.beginnings[-1]]
        assert sorted(plain[0]) == sorted(plain[1])
        texts += not np.array_equal(samples[0].tokens, samples[1].tokens)
    assert texts > 20


def test_questions_ask_for_the_newest_and_for_others():
    for task in (Program(questions=3), Program(questions=3, names=4, windows=10)):
        for s in solved(task, 40):
            assert s.newest == [(window, window) for window in range(task.windows)]
            for window in range(task.windows):
                _, *others = s.of_asked[3 * window : 3 * window + 3]
                known = range(max(0, window + 1 - task.names), window + 1)
                assert {*others} <= {*known} and (window not in others or not window)
                assert len({*others}) == min(2, max(1, window))
    assert any(s.of_asked[-1] < 8 - 4 for s in solved(Program(), 40))  # not only recent ones


def test_chains_are_as_long_as_recent_makes_them():
    line = Program(recent=1, numbers=0, binary=0, questions=1)
    assert all([depth for _, _, depth in s.said] == [*range(8)] for s in solved(line, 20))
    wide = Program(recent=8, numbers=0, binary=0, questions=1)
    assert np.mean([s.said[-1][2] for s in solved(wide, 200)]) < 3


def test_distractors_are_a_story_of_their_own():
    task = Program(distractors=0.4, numbers=0, windows=12, names=12, questions=3)
    shares = []
    for s in solved(task, 100):
        stories = []  # statements that hang together
        for number, needs in enumerate(s.needs):
            joined = [story for story in stories if story & needs]
            stories = [story for story in stories if not story & needs] + [{number}.union(*joined)]
        assert len(stories) <= 2
        (asked,) = [story for story in stories if story & {*s.of_asked}]  # never of the other
        shares.append(1 - len(asked) / 12)
    assert np.mean(shares) == pytest.approx(0.4, abs=0.06)


def test_quantities_are_shared_unless_programs_are_trees():
    counts = []
    for shared in (True, False):
        needed = [sorted(n for needs in s.needs for n in needs) for s in solved(Program(shared=shared, numbers=0), 50)]
        counts.append(sum(len(n) - len({*n}) for n in needed))
    assert counts[0] > 50 and counts[1] == 0


def shares(task, count):
    floor, generator = Floor(task), np.random.default_rng(3)
    for _ in range(count):
        sample = task.sample(generator, False)
        floor.add_all(sample.tokens[None], [sample.answers], [tuple(probe) for probe in sample.probes.tolist()])
    return floor.shares(floor.counts)


def test_no_surface_guess_gets_past_a_stated_number():
    guesses = shares(Program(recent=1), 500)
    assert len(guesses) == 8 and guesses["any value"] == pytest.approx(dict.fromkeys(guesses[COPY], 0.2))
    for depth in range(1, 6):
        best = max(guess[depth] for guess in guesses.values())
        assert 0.2 <= best < 0.29, (depth, best)
    assert guesses["the number of its statement"][0] == 1  # nothing is computed there
    assert shares(Program(names=3), 40)["the number of its statement"][0] == 1  # of the newest with its name


def test_the_last_window_alone_solves_what_it_tells():
    one_window = Program(statements=4, windows=1, form="words", order="shuffled")
    assert set(shares(one_window, 40)["the last window alone"].values()) == {1}
    line = Program(numbers=0, binary=0, questions=1)  # a window: a operation n >x, x value
    sample = line.sample(np.random.default_rng(0), False)
    names = [line.token_name(token) for token in sample.tokens]
    guesses = [line.token_name(guess[0][0]) for guess in line.surface_guesses(sample)["the last window alone"]]
    of_zero = {"+": lambda n: n, "-": lambda n: -n % 5, "*": lambda n: 0}
    assert guesses == [str(of_zero[names[at + 1]](int(names[at + 2]))) for at in range(0, 48, 6)]
    two = shares(Program(statements=4, windows=2, recent=1, numbers=0.05), 150)["the last window alone"]
    assert two[1] > 0.5 and max(two[depth] for depth in (5, 6)) < 0.35


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"min_windows": 9}, "min_windows=9 must not exceed windows=8"),
        ({"statements": 16}, "write names=17"),
        ({"statements": 32, "names": 32}, "write statements=31"),
        ({"windows": 1, "statements": 2}, "write windows=2 or more"),
        ({"modulus": 1}, "modulus"),
        ({"names": 33}, "names"),
        ({"form": "prose"}, "words"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(RecipeError, match=words) as refused:
        check(Program, sizes)
    assert "\n" not in str(refused.value)
