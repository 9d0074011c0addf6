"""The floor of each task: what a guesser gets who really guesses; and what it may not use."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from powernap.train.data.build import build_task
from powernap.train.evaluation.floors import CONSTANT, COPY, Floor, best_guesses
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.elementary import after
from powernap.train.tasks.gsm import Gsm
from powernap.train.tasks.gsm_words import VOCABULARY
from powernap.train.tasks.rule110 import Rule110
from powernap.train.tasks.sample import Sample

DEMO = Depo(nodes=8, max_hop=4, queries=18, names="ends")
SHORT = Depo(nodes=9, max_hop=9, queries=9, names="ends", lengths="short")


def samples_of(task, count, seed=0):
    generator = np.random.default_rng(seed)
    return [task.sample(generator, held_out=True) for _ in range(count)]


def shares_of(task, samples):
    floor = Floor(task)
    for sample in samples:
        floor.add_all(sample.tokens[None], [sample.answers])
    return floor.shares(floor.counts)


def test_an_answer_in_another_probe_is_no_copy():
    tokens, answers = np.array([[1, 2, 3, 4, 3, 4, 3, 4]]), [np.array([(3, 4, 1), (5, 6, 1), (7, 8, 1)])]
    for probes, copied in (([], 2), ([(2, 4), (4, 6), (6, 8)], 0), ([(2, 4), (4, 8)], 1)):
        floor = Floor(None)
        floor.add_all(tokens, answers, probes)
        assert floor.counts[1, COPY, None] == copied


def guess_the_demo(sample, generator):
    """Who plays the demo without its cycle, question by question, by another way: all pairs of nodes that may still be
    `hop` apart are kept in a table, and what one answer shows is crossed out. Yields (hop, right)."""
    possible = np.ones((8, 8, 8), dtype=bool)  # from, hop, to
    possible[:, 0], possible[:, 1:, :] = np.eye(8, dtype=bool), ~np.eye(8, dtype=bool)[:, None]
    for start, _, hop in sample.answers.tolist():
        node, answer = int(sample.tokens[start - 1]) - 1, int(sample.tokens[start]) - 1
        yield hop, generator.choice(np.flatnonzero(possible[node, hop])) == answer
        for one, other, apart in ((node, answer, hop), (answer, node, 8 - hop)):
            possible[one, :, other] = possible[one, apart] = possible[:, apart, other] = False
            possible[one, apart, other] = True


@pytest.fixture(scope="module")
def demo():
    return samples_of(DEMO, 300)


def test_depos_floor_is_what_a_guesser_gets(demo):
    generator, right, asked = np.random.default_rng(1), Counter(), Counter()
    for sample in demo:
        for hop, is_right in guess_the_demo(sample, generator):
            asked[hop] += 1
            right[hop] += is_right
    shares = shares_of(DEMO, demo)
    assert {hop: right[hop] / asked[hop] for hop in asked} == pytest.approx(shares["a node not ruled out"], abs=0.04)
    assert shares["a node not ruled out"] == pytest.approx({1: 0.30, 2: 0.30, 3: 0.30, 4: 0.56}, abs=0.03)
    assert max(shares[CONSTANT].values()) < 0.16 and shares[COPY] == shares[CONSTANT]  # no question comes back


def test_depos_floor_is_below_all_that_earlier_answers_imply(demo):
    """Every cycle that agrees with the answers so far is as likely as any other: 0.76 to 0.80, the bound of any reader that
    never saw the cycle. Beyond it lies what was read."""
    cycles = np.array([(0, *rest) for rest in itertools.permutations(range(1, 8))])
    places, right, asked = np.argsort(cycles, axis=1), Counter(), Counter()
    for sample in demo[:150]:
        alive = np.arange(len(cycles))
        for start, _, hop in sample.answers.tolist():
            node, answer = int(sample.tokens[start - 1]) - 1, int(sample.tokens[start]) - 1
            ends = cycles[alive, (places[alive, node] + hop) % 8]
            right[hop] += np.bincount(ends).max() / len(ends)
            asked[hop] += 1
            alive = alive[ends == answer]
    implied = {hop: right[hop] / asked[hop] for hop in (1, 2, 3, 4)}
    assert implied == pytest.approx({1: 0.77, 2: 0.77, 3: 0.77, 4: 0.79}, abs=0.05)
    assert all(share > shares_of(DEMO, demo)["a node not ruled out"][hop] for hop, share in implied.items())


def test_a_repeated_question_is_copied():
    """As in shards of an older version."""
    tokens = np.array([0, 17, 1, 2, 18, 1, 3, 17, 1, 2, 17, 4, 5])
    answers = np.array([(3, 4, 1), (6, 7, 2), (9, 10, 1), (12, 13, 1)])
    shares = shares_of(None, [Sample(tokens, np.zeros(13, dtype=bool), answers)])
    assert shares == {CONSTANT: {1: pytest.approx(2 / 3), 2: 1.0}, COPY: {1: pytest.approx(2 / 3), 2: 1.0}}
    tokens[8:10] = 4, 6  # it was another question
    shares = shares_of(None, [Sample(tokens, np.zeros(13, dtype=bool), answers)])
    assert shares[COPY][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", [Depo(nodes=24, max_hop=4, queries=4, alphabet=5), SHORT])
def test_the_right_answer_is_never_ruled_out(task):
    for sample in samples_of(task, 30):
        (guesses,) = task.surface_guesses(sample).values()
        for (start, stop, _), drawn in zip(sample.answers.tolist(), guesses, strict=True):
            assert tuple(sample.tokens[start:stop].tolist()) in drawn
            assert len(set(drawn)) == len(drawn) <= task.nodes


def test_rule110s_floor():
    rows = np.random.default_rng(5).integers(2, size=(60_000, 13), dtype=np.uint8)
    task = Rule110(rows=1, width=13, steps=[2, 4])
    shares = shares_of(task, samples_of(task, 1500))["likeliest bit after one cell"]
    for steps in (2, 4):
        ends = after(rows, steps, 110)[:, 0]
        by_cell = [
            sum(max(np.mean((rows[:, cell] == v) & (ends == bit)) for bit in (0, 1)) for v in (0, 1))
            for cell in range(13)
        ]
        assert shares[steps] == pytest.approx(max(by_cell), abs=0.04)
    assert shares[2] > after(rows, 2, 110)[:, 0].mean() + 0.02  # one cell says more than none
    four = Rule110(rows=4, width=13, steps=2)
    assert shares_of(four, samples_of(four, 400))["likeliest bit after one cell"][2] == pytest.approx(
        shares[2] ** 4, abs=0.06
    )


def test_gsms_guesses_stand_in_the_text():
    task = Gsm(ops=3, context_length=240, window=60)
    for sample in samples_of(task, 20):
        text = " ".join(VOCABULARY[token] for token in sample.tokens[: task.context_length])
        guesses = task.surface_guesses(sample)
        assert len(guesses) == 6
        for ((drawn,),) in guesses.values():
            *digits, end = (VOCABULARY[token] for token in drawn)
            assert end == "[end]" and " ".join(digits) in text
        first = next(word for word in text.split() if word.isdigit())
        assert VOCABULARY[guesses["first number"][0][0][0]] == first


def test_which_guess_is_the_floor_is_said_by_depth():
    assert best_guesses({CONSTANT: {"1": 0.2}, COPY: {"1": 0.2}}) == "best surface guess: constant"
    both = {CONSTANT: {"1": 0.2, "2": 0.4}, COPY: {"1": 0.3, "2": 0.1}}
    assert best_guesses(both) == "best surface guess: copied, else constant (depth 1); constant (depth 2)"


def test_the_task_is_that_of_the_test_shards(tmp_path):
    from powernap.train.config import DataConfig

    folder = tmp_path / "d"
    sizes = {"train_samples": 1, "test_samples": 1, "samples_per_shard": 1, "seed": 0, "workers": 1}
    build_task("rule110", Rule110(rows=1, width=8), folder, **sizes)
    data = DataConfig(train="none.tar", test=f"{folder}/test-*.tar", sequence_length=10)
    assert Floor.of_test(data)._guesses is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["generator"] == 3
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fields": {"colour": "red"}}))
    assert Floor.of_test(data)._guesses is None
