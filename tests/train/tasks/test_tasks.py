"""Tasks: the exact formats, right answers, and a held-out fifth that training never sees."""

import shutil
import sys
from collections import Counter

import numpy as np
import pytest

from powernap.launch import cli
from powernap.train.data.build import build_task
from powernap.train.data.vocabulary import described_by
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks import TASKS
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.elementary import after
from powernap.train.tasks.rule110 import Rule110
from powernap.train.tasks.sample import TaskError, draw_problem, is_held_out
from tests.helpers import own_task

ENDS = Depo(nodes=8, max_hop=4, queries=18, names="ends")
WORDS = Depo(nodes=12, max_hop=5, queries=2, alphabet=4)


def rng(seed=0):
    return np.random.default_rng(seed)


def read_word(tokens, position, alphabet):
    """The name at `position`: tokens up to and including the first marked one."""
    stop = position + 1
    while tokens[stop - 1] <= alphabet:
        stop += 1
    assert all(1 <= token <= alphabet for token in tokens[position : stop - 1])
    assert alphabet < tokens[stop - 1] <= 2 * alphabet
    return tuple(tokens[position:stop]), stop


def test_a_task_in_the_current_folder_is_found_by_the_processes_that_build_too(tmp_path, monkeypatch, capsys):
    shutil.copy(own_task.__file__, tmp_path / "letters_again.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    build = [
        "data",
        "build",
        "letters_again:Copy",
        "data",
        "--train-samples",
        "8",
        "--test-samples",
        "4",
        "--samples-per-shard",
        "4",
    ]
    assert cli.main([*build, "--workers", "2"]) == 0
    assert sys.path[-1] == str(tmp_path)
    assert cli.main(["data", "inspect", "data", "--samples", "1"]) == 0
    assert "[again] *" in capsys.readouterr().out
    assert cli.main(["data", "build", "nowhere:Copy", "data"]) == 2
    assert "run the command in the folder of its module" in capsys.readouterr().err
    assert cli.main(["data", "build", "nowhere:Copy", "--help"]) == 2
    assert capsys.readouterr().out == ""


def test_the_defaults_are_the_papers_sizes():
    depo, rule110 = Depo(), Rule110()
    assert (depo.context_length, depo.sequence_length, depo.window) == (300, 360, 75)
    assert depo.vocab_size == 1 + 50 + 50 + 16 + 1
    assert (rule110.context_length, rule110.sequence_length, rule110.window, rule110.vocab_size) == (96, 101, 24, 4)


def test_the_demos_sizes():
    assert (ENDS.window, ENDS.sequence_length, ENDS.vocab_size) == (18, 72, 21)


@pytest.mark.parametrize("task", [ENDS, WORDS, Depo(), Rule110(), Rule110(rows=2, width=5, steps=[1, 3])])
def test_samples_have_the_promised_shapes(task):
    for seed in range(20):
        sample = task.sample(rng(seed), held_out=seed % 2 == 1)
        assert sample.tokens.shape == sample.loss_mask.shape == (task.sequence_length,)
        assert (sample.tokens.dtype, sample.loss_mask.dtype, sample.answers.dtype) == (np.int32, bool, np.int32)
        assert 0 <= sample.tokens.min() and sample.tokens.max() < task.vocab_size
        assert not sample.loss_mask[: task.context_length + 1].any()
        assert task.context_length % task.window == 0
        if task is not ENDS:  # whose questions fill several windows, each a whole number of them
            assert task.sequence_length - task.context_length - 1 <= task.window
        in_answers = np.zeros(task.sequence_length, dtype=bool)
        for start, stop, _ in sample.answers:
            in_answers[start:stop] = True
        assert np.array_equal(in_answers, sample.loss_mask)
    again = task.sample(rng(3), held_out=True)
    assert np.array_equal(again.tokens, task.sample(rng(3), held_out=True).tokens)


def test_a_delay_is_pads_between_cycle_and_questions():
    """The same draw, moved: nothing else differs."""
    plain, late = (
        Depo(nodes=8, max_hop=4, queries=6, names="ends", delay=delay).sample(np.random.default_rng(1), False)
        for delay in (0, 54)
    )
    assert len(late.tokens) == len(plain.tokens) + 54 and not late.tokens[18:72].any()
    for name in ("tokens", "loss_mask"):
        found, expected = getattr(late, name), getattr(plain, name)
        assert (np.delete(found, slice(18, 72)) == expected).all()
    assert (late.answers[:, :2] == plain.answers[:, :2] + 54).all()
    with pytest.raises(ValueError, match="delay=3 is for names=ends"):
        Depo(delay=3)


def test_ends_token_by_token():
    depths = set()
    for seed in range(30):
        sample = ENDS.sample(rng(seed), held_out=False)
        tokens, answers = sample.tokens.tolist(), sample.answers.tolist()
        assert tokens[:2] == [0, 0]  # 16 of the 18 tokens of the window are needed
        sources, destinations = tokens[2:18:2], tokens[3:18:2]
        assert sorted(sources) == list(range(1, 9)) and sorted(destinations) == list(range(9, 17))
        follow = {source: destination - 8 for source, destination in zip(sources, destinations, strict=True)}
        for query, (start, stop, depth) in enumerate(answers):
            hop, node, answer = tokens[18 + 3 * query : 21 + 3 * query]
            assert (start, stop, depth) == (20 + 3 * query, 21 + 3 * query, hop - 16)
            for _ in range(depth):
                node = follow[node]
            assert answer == node
            depths.add(depth)
        assert len(answers) == 18
    assert depths == {1, 2, 3, 4}


@pytest.mark.parametrize("task", [WORDS, Depo()], ids=["small", "paper"])
def test_words_token_by_token(task):
    hops, lengths = set(), set()
    for seed in range(30):
        sample = task.sample(rng(seed), held_out=False)
        tokens, position = sample.tokens.tolist(), 0
        while tokens[position] == 0:
            position += 1
        follow = {}
        while position < task.context_length:
            source, position = read_word(tokens, position, task.alphabet)
            follow[source], position = read_word(tokens, position, task.alphabet)
        assert position == task.context_length and len(follow) == task.nodes
        assert set(follow.values()) == set(follow)
        lengths |= {len(name) for name in follow}
        for start, stop, depth in sample.answers.tolist():
            assert tokens[position] == 2 * task.alphabet + depth  # hop 1 follows the last marked token
            name, position = read_word(tokens, position + 1, task.alphabet)
            assert tokens[position] == task.vocab_size - 1  # [ans]
            answer, position = read_word(tokens, position + 1, task.alphabet)
            assert tuple(tokens[start:stop]) == answer and stop == position
            for _ in range(depth):
                name = follow[name]
            assert answer == name
            hops.add(depth)
        assert len(sample.answers) == task.queries
        assert not any(tokens[position:])
        node, met = next(iter(follow)), set()
        while node not in met:
            met.add(node)
            node = follow[node]
        assert len(met) == task.nodes  # one cycle, not several
    assert hops == set(range(1, task.max_hop + 1)) and lengths == {1, 2}


def test_edges_come_in_random_order_and_cycles_may_be_shorter():
    task = Depo(nodes=9, min_nodes=5, max_hop=4, queries=2, names="ends")
    sizes, following = set(), 0
    for seed in range(100):
        tokens = task.sample(rng(seed), False).tokens[: task.context_length]
        sizes.add(int((tokens > 0).sum()) // 2)
        edges = tokens[tokens > 0].reshape(-1, 2)
        following += sum(edges[:-1, 1] - task.nodes == edges[1:, 0])
        assert not tokens[: len(tokens) - (tokens > 0).sum()].any()  # padded on the left
    assert sizes == {5, 6, 7, 8, 9}
    assert 50 < following < 150  # an edge is followed by the next one of the cycle once a sample, by chance


@pytest.mark.parametrize("task", [ENDS, WORDS, Depo(), Depo(nodes=6, max_hop=2, queries=12, names="ends")])
def test_no_question_is_asked_twice_in_a_sequence(task):
    hops = set()
    for seed in range(40):
        sample, asked = task.sample(rng(seed), held_out=seed % 2 == 1), []
        for start, _, hop in sample.answers.tolist():
            asked.append((tuple(sample.tokens[start - 4 : start][-1 if task.names == "ends" else 0 :]), hop))
            hops.add(hop)
        if task.names == "ends":  # the names there are one token: starts can be counted
            assert len(set(asked)) == task.queries
            starts = [name for name, _ in asked]
            assert max(map(starts.count, starts)) == -(-task.queries // task.nodes)  # all others come first
        else:
            starts = [task._asked(sample.tokens.tolist(), start) for start, _, _ in sample.answers.tolist()]
            assert len(set(starts)) == task.queries
    assert hops == set(range(1, task.max_hop + 1))


def test_more_questions_than_there_are_are_refused_when_shards_are_built_and_no_sooner(tmp_path, capsys):
    task = Depo(nodes=4, max_hop=3, queries=13, names="ends")  # a manifest may still say so
    with pytest.raises(
        TaskError, match="queries=13 exceed the 12 different questions of 4 nodes .* queries=12 or fewer"
    ):
        build_task("depo", task, tmp_path / "d", train_samples=1, test_samples=1, samples_per_shard=1, seed=0)
    assert not list(tmp_path.iterdir())
    assert described_by({"task": "depo", "fields": {"nodes": 4, "max_hop": 3, "queries": 13, "names": "ends"}}) == task


def test_short_lengths_are_physicslm4s():
    """n from 3 to N with p ~ 1 / (n + sqrt(N)), hops that go round, and tests at N."""
    task = Depo(nodes=6, max_hop=8, queries=4, names="ends", lengths="short")
    lengths, round_trips = Counter(), 0
    for seed in range(1000):
        sample = task.sample(rng(seed), held_out=False)
        context = sample.tokens[: task.context_length]
        edges = context[context > 0].reshape(-1, 2)
        follow = {int(u): int(v) - task.nodes for u, v in edges}
        lengths[len(follow)] += 1
        for start, _, hop in sample.answers.tolist():
            node = int(sample.tokens[start - 1])
            for _ in range(hop):
                node = follow[node]
            assert sample.tokens[start] == node
            round_trips += hop >= len(follow)
    weights = {n: 1 / (n + 6**0.5) for n in (3, 4, 5, 6)}
    shares = {n: lengths[n] / 1000 for n in weights}
    assert shares == pytest.approx({n: weight / sum(weights.values()) for n, weight in weights.items()}, abs=0.05)
    assert round_trips > 1000
    tests = [task.sample(rng(seed), held_out=True).tokens[: task.context_length] for seed in range(20)]
    assert {int((context > 0).sum()) for context in tests} == {12}


def problem_of(task, sample):
    """What the held-out split is about: the cycle or a row, not the questions."""
    tokens = sample.tokens[: task.context_length]
    if isinstance(task, Rule110):
        return [tuple(row) for row in (tokens - 1).reshape(task.rows, task.width).tolist()]
    edges = tokens[tokens > 0].reshape(-1, 2)
    follow = {int(u): int(v) - task.nodes for u, v in edges}
    cycle = [min(follow)]
    while len(cycle) < len(follow):
        cycle.append(follow[cycle[-1]])
    return [tuple(cycle)]


@pytest.mark.parametrize(
    "task",
    [Depo(nodes=6, max_hop=2, queries=1, names="ends"), Rule110(rows=4, width=6, steps=1)],
    ids=["depo", "rule110"],
)
def test_the_held_out_problems_are_a_fifth_and_never_trained_on(task):
    generator = rng(1)
    train, test = (
        {
            problem
            for _ in range(800 if isinstance(task, Depo) else 100)
            for problem in problem_of(task, task.sample(generator, held_out))
        }
        for held_out in (False, True)
    )
    assert train.isdisjoint(test)
    every = 120 if isinstance(task, Depo) else 64  # 5! cycles of 6 nodes; 2^6 rows, each by itself
    assert len(train) + len(test) == every  # nothing is in neither
    assert 0.1 < len(test) / every < 0.3


def test_the_held_out_share_and_hash_never_change():
    share = np.mean([is_held_out(bits) for bits in rng().integers(2, size=(20000, 24))])
    assert abs(share - 0.2) < 0.01
    assert [i for i in range(12) if is_held_out([i])] == [2, 10]


def test_too_few_problems_to_hold_some_out():
    assert is_held_out([2])
    with pytest.raises(TaskError, match="depo with nodes=3: too few different problems"):
        draw_problem(lambda: [2], list, held_out=False, name="depo with nodes=3")


def rule110_by_table(row, steps):
    """Another implementation: Wolfram's number 110 as a table of eight cases."""
    for _ in range(steps):
        row = [110 >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % len(row)]) & 1 for i in range(len(row))]
    return row


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_rule110_follows_the_table(steps):
    cells = rng(steps).integers(2, size=(50, 24))
    assert after(cells, steps, 110).tolist() == [rule110_by_table(row, steps) for row in cells.tolist()]


def test_rule110_token_by_token():
    task = Rule110(rows=3, width=5, steps=[2, 6])
    met = set()
    for seed in range(40):
        sample = task.sample(rng(seed), held_out=False)
        rows = (sample.tokens[:15].reshape(3, 5) - 1).tolist()
        ((start, stop, steps),) = sample.answers.tolist()
        assert (start, stop) == (16, 19)
        assert sample.tokens[15] == {2: 3, 6: 4}[steps]
        assert sample.tokens[16:].tolist() == [1 + rule110_by_table(row, steps)[0] for row in rows]
        met.add(steps)
    assert met == {2, 6}


def test_a_constant_guess_at_32_steps_is_right_one_time_in_ten():
    ones = after(rng().integers(2, size=(50_000, 24), dtype=np.uint8), 32, 110)[:, 0].mean()
    assert abs(max(ones, 1 - ones) ** 4 - 0.100) < 0.005  # four rows; 0.107, once said, was from too few


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("depo", {"nodes": 2}, "nodes=2: "),
        ("depo", {"nodes": 8, "max_hop": 8, "names": "ends"}, "max_hop=8 must be below nodes=8"),
        ("depo", {"nodes": 75, "min_nodes": 10}, "max_hop=16 must be below min_nodes=10"),
        ("depo", {"nodes": 20, "min_nodes": 30}, "min_nodes=30 must not exceed nodes=20"),
        ("depo", {"nodes": 20, "queries": 4}, "queries=4 take 24 tokens .* use queries=3"),
        ("depo", {"nodes": 75, "alphabet": 8}, "nodes=75 must not exceed the 72 words of alphabet=8"),
        ("depo", {"names": "letters"}, "names=letters: "),
        ("depo", {"node": 8}, "unknown key node: did you mean nodes"),
        ("rule110", {"rows": 30}, "rows=30 must not exceed width=24"),
        ("rule110", {"steps": [4, 4]}, "must name each t once"),
        ("rule110", {"steps": 0}, "steps=0: "),
        ("rule110", {"width": 2}, "width=2: "),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(task, fields, message):
    with pytest.raises(RecipeError, match=message) as error:
        check(TASKS[task], fields)
    assert "\n" not in str(error.value)
