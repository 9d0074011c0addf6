"""Automata: every answer against rules read as text, facts of the literature, and rows and rules that training never sees."""

import numpy as np
import pytest

from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.automata import Automata
from powernap.train.tasks.elementary import after, equivalents

TASKS = [
    Automata(),
    Automata(rules=[30], width=5, commands=3, steps=2, questions=3),
    Automata(rules="all", width=9, commands=4, questions=5),
    Automata(rules="all", hold_out="rules", commands=2),
    Automata(rules=[90, 184], commands=16, questions=1),
]


def advanced(row, table, steps):
    """Rows as text, a rule as a table of three letters -> one: another algorithm than the task's."""
    for _ in range(steps):
        ring = row[-1] + row + row[0]
        row = "".join(table[ring[start : start + 3]] for start in range(len(row)))
    return row


def table_of(rule):
    """Wolfram's numbering: the outputs for 111, 110, ..., 000 are the rule in binary."""
    return {f"{case:03b}": output for case, output in zip(range(7, -1, -1), f"{rule:08b}", strict=True)}


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_the_cells_of_the_row(task):
    depths, rules, cells = set(), set(), set()
    for seed in range(60):
        sample = task.sample(np.random.default_rng(seed), held_out=seed % 2 == 1)
        names = [task.token_name(token) for token in sample.tokens]
        assert len(names) == task.sequence_length
        table, start = table_of(task.rule_choices[0]), 0
        if len(task.rule_choices) > 1:
            said = names[: task.width]
            assert said[: task.width - 8] == ["[pad]"] * (task.width - 8)
            table, start = dict(name.split(">") for name in said[-8:]), task.width
        rules.add("".join(table[f"{case:03b}"] for case in range(7, -1, -1)))
        stated = [name.split("=") for name in names[start : start + task.width]]
        assert [int(cell) for cell, _ in stated] == list(range(1, task.width + 1))
        row, place, expected, probes = "".join(bit for _, bit in stated), start + task.width, [], []
        for command in range(1 + task.commands):
            if command:
                window = names[place : place + task.width]
                assert window == [f"[next {cell}]" for cell in range(1, task.width + 1)]
                row, place = advanced(row, table, task.steps), place + task.width
            probe = names[place : place + 2 * task.questions]
            asked = [int(name.removeprefix("[cell ").removesuffix("]")) for name in probe[::2]]
            assert len(set(asked)) == task.questions
            assert probe[1::2] == [row[cell - 1] for cell in asked]
            probes.append([place, place + len(probe)])
            expected += [[place + at, place + at + 1, command * task.steps] for at in range(1, len(probe), 2)]
            place += len(probe)
            cells |= set(asked)
        assert place == len(names)
        assert sample.probes.tolist() == probes
        assert sample.answers.tolist() == expected
        assert sample.loss_mask.nonzero()[0].tolist() == [at for at, _, _ in expected]
        depths |= {depth for _, _, depth in expected}
    assert depths == {task.steps * command for command in range(task.commands + 1)}
    assert cells == set(range(1, task.width + 1))
    assert {int(rule, 2) for rule in rules} <= set(task.rule_choices)
    assert len(rules) == len(task.rule_choices) if len(task.rule_choices) < 3 else len(rules) > 20


def test_the_vocabulary_depends_on_no_number_of_commands_or_questions():
    names = [[task.token_name(token) for token in range(task.vocab_size)] for task in (
        Automata(rules="all", commands=2, questions=1), Automata(rules=[3, 5], commands=32, questions=4, steps=2)
    )]  # fmt: skip
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])
    alone = Automata(rules=[3])
    assert names[0][: alone.vocab_size] == [alone.token_name(token) for token in range(alone.vocab_size)]


def test_rule_110_draws_its_picture():
    """From a single 1, its left neighbours grow: Wolfram, A New Kind of Science, page 32."""
    picture = ["       #", "      ##", "     ###", "    ## #", "   #####", "  ##   #", " ###  ##", "## # ###"]
    row = np.array([[0] * 15 + [1]])
    for steps, line in enumerate(picture):
        text = "".join(" #"[bit] for bit in after(row, steps, 110)[0])
        assert text == line.rjust(16)


def test_known_rules():
    rows = np.random.default_rng(0).integers(2, size=(200, 11))
    left, right = np.roll(rows, 1, axis=1), np.roll(rows, -1, axis=1)
    assert np.array_equal(after(rows, 1, 90), left ^ right)
    assert np.array_equal(after(rows, 1, 30), left ^ (rows | right))
    assert np.array_equal(after(rows, 1, 204), rows)
    assert np.array_equal(after(rows, 2, 170), np.roll(rows, -2, axis=1))  # a shift to the left
    traffic = after(rows, 7, 184)
    assert np.array_equal(traffic.sum(axis=1), rows.sum(axis=1)) and not np.array_equal(traffic, rows)


@pytest.mark.parametrize(("rule", "left"), [(110, 45), (30, 115), (90, 1)])
def test_rows_merge(rule, left):
    rows = {advanced(f"{number:08b}", table_of(rule), 8) for number in range(256)}
    assert len(rows) == left
    assert len(np.unique(after(np.arange(256)[:, None] >> np.arange(8) & 1, 8, rule), axis=0)) == left


def test_equivalent_rules_differ_in_names_of_sides_and_bits():
    assert equivalents(110) == {110, 124, 137, 193}
    assert len({min(equivalents(rule)) for rule in range(256)}) == 88  # Wolfram's number of different rules
    rows = np.random.default_rng(0).integers(2, size=(50, 9))
    assert np.array_equal(after(rows[:, ::-1], 3, 124)[:, ::-1], after(rows, 3, 110))
    assert np.array_equal(1 - after(1 - rows, 3, 137), after(rows, 3, 110))


def rows_and_rules(task, held_out, samples):
    """The first rows and the rules of samples, as a model reads them."""
    names = [task.token_name(token) for token in range(task.vocab_size)]
    rows, rules, random = set(), set(), np.random.default_rng(0)
    for _ in range(samples):
        context = [names[token] for token in task.sample(random, held_out).tokens[: task.context_length]]
        rows.add("".join(name[-1] for name in context[-task.width :]))
        rules.add("".join(name[-1] for name in context[: -task.width] if name != "[pad]"))
    return rows, rules


def test_no_rotation_of_a_test_row_is_trained_on():
    task = Automata(commands=1, questions=1)
    trained, tested = (rows_and_rules(task, held_out, 1500)[0] for held_out in (False, True))
    assert len(trained) + len(tested) == 256  # every row is on one side, and all are found
    assert 0.1 < len(tested) / 256 < 0.3
    assert not trained & {row[turn:] + row[:turn] for row in tested for turn in range(8)}


def test_rules_are_held_out_with_their_equivalents():
    by_rows = Automata(rules="all", commands=1, questions=1)
    assert rows_and_rules(by_rows, True, 1500)[1] & rows_and_rules(by_rows, False, 1500)[1]
    task = Automata(rules="all", commands=1, questions=1, hold_out="rules")
    (rows, rules), (test_rows, test_rules) = (rows_and_rules(task, held_out, 1800) for held_out in (False, True))
    assert len(rules) + len(test_rules) == 256
    assert 0.1 < len(test_rules) / 256 < 0.3
    alike = {f"{same:08b}" for rule in test_rules for same in equivalents(int(rule, 2))}
    assert alike == test_rules and not alike & rules
    assert not rows & test_rows


def test_a_row_is_on_one_side_whatever_the_number_of_commands():
    """Test shards with more commands hold no row that was trained on with fewer."""
    short, long = Automata(commands=2, questions=1), Automata(commands=5, questions=1)
    assert not rows_and_rules(short, False, 400)[0] & rows_and_rules(long, True, 400)[0]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_surface_guesses(task):
    """Each guess, computed from the text of a sample."""
    sample = task.sample(np.random.default_rng(3), held_out=True)
    names = [task.token_name(token) for token in sample.tokens]
    context = names[: task.context_length]
    row = "".join(name[-1] for name in context[-task.width :])
    table = dict(name.split(">") for name in context[: -task.width] if name != "[pad]") or table_of(task.rules[0])
    guesses = {
        name: [task.token_name(token) for ((token,),) in candidates]
        for name, candidates in task.surface_guesses(sample).items()
    }
    asked = [int(names[start - 1].removeprefix("[cell ").removesuffix("]")) - 1 for start in sample.answers[:, 0]]
    truth = [names[start] for start in sample.answers[:, 0]]
    once = advanced(row, table, task.steps)
    assert guesses["the first row"] == [row[cell] for cell in asked]
    assert guesses["one command"] == [once[cell] for cell in asked]
    assert guesses["one command"][task.questions : 2 * task.questions] == truth[task.questions : 2 * task.questions]
    likeliest = guesses["likeliest bit after one cell"]
    assert likeliest[: task.questions] == truth[: task.questions]  # before any command the cell itself tells all


def test_the_likeliest_bit_is_the_best_guess_from_one_cell():
    task = Automata(width=7, commands=3, questions=4)
    samples = [task.sample(np.random.default_rng(seed), held_out=seed % 2 == 0) for seed in range(600)]
    right = {depth: [] for depth in range(4)}
    for sample in samples:
        guesses = task.surface_guesses(sample)["likeliest bit after one cell"]
        for (start, _, depth), (guess,) in zip(sample.answers.tolist(), guesses, strict=True):
            right[depth].append(guess == (int(sample.tokens[start]),))
    rows = [f"{number:07b}" for number in range(128)]
    for depth in range(4):
        ends = [advanced(row, table_of(110), depth)[0] for row in rows]
        best = max(
            sum(max(sum(row[cell] == value and end == bit for row, end in zip(rows, ends, strict=True)) for bit in "01")
                for value in "01")
            for cell in range(7)
        )  # fmt: skip
        assert np.mean(right[depth]) == pytest.approx(best / 128, abs=0.05)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"questions": 5}, "write questions=4, or width=9"),
        ({"rules": [110, 110]}, "must name each rule once"),
        ({"rules": []}, "rules"),
        ({"rules": [256]}, "256"),
        ({"rules": "some"}, "all"),
        ({"rules": "all", "width": 7}, "width=7 must be 8 or more"),
        ({"hold_out": "rules"}, "write rules=all"),
        ({"width": 2}, "width=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes, words):
    with pytest.raises(RecipeError, match=words) as error:
        check(Automata, sizes)
    assert "\n" not in str(error.value)
