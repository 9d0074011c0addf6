"""Track: samples against permutations multiplied a second way, and words that training never sees."""

import numpy as np
import pytest

from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.sample import is_held_out
from powernap.train.tasks.track import BEGINNING, GROUPS, Track

TASKS = [Track(), Track(group="a5", moves=3, windows=4, questions=2), Track(moves=5, windows=2, questions=3), Track(asked="each", windows=4),
         Track(asked="each", group="a5", moves=2, windows=3, min_windows=3, questions=4)]  # fmt: skip


def matrix(generator):
    """The permutation as a matrix that moves column vectors: e_x -> e_image(x)."""
    result = np.zeros((len(generator), len(generator)), dtype=int)
    for x, image in enumerate(generator):
        result[image, x] = 1
    return result


def products(group):
    """Every product of a group's generators."""
    generators = [matrix(generator) for generator in GROUPS[group]]
    found, new = {}, [np.eye(len(generators[0]), dtype=int)]
    while new:
        found |= {element.tobytes(): element for element in new}
        made = [generator @ element for generator in generators for element in new]
        new = [element for element in {e.tobytes(): e for e in made}.values() if element.tobytes() not in found]
    return list(found.values())


def test_generators_generate_the_groups():
    s3, a5 = products("s3"), products("a5")
    assert (len(s3), len(a5)) == (6, 60)
    assert all(round(np.linalg.det(element)) == 1 for element in a5)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_the_products(task):
    lengths = set()
    for seed in range(200):
        sample = task.sample(np.random.default_rng(seed), held_out=seed % 2 == 1)
        names = [task.token_name(token) for token in sample.tokens]
        state, windows, answers = np.eye(task.points, dtype=int), 0, []
        while names:
            window, names = names[: task.window], names[task.window :]
            asked = 2 * task.questions if task.asked == "each" or len(names) == 2 * task.questions else 0
            questions, names = names[:asked], names[asked:]
            if window[0] == "[pad]":
                assert {*window, *questions} == {"[pad]"} and not windows  # on the left, by whole windows
                continue
            assert window[0] == "[move]"
            windows += 1
            for letter in window[1:]:
                state = matrix(GROUPS[task.group][ord(letter) - ord("a")]) @ state
            elements = [int(name.removeprefix("[where ").removesuffix("]")) - 1 for name in questions[::2]]
            assert len(set(elements)) == len(elements)
            assert [int(name) - 1 for name in questions[1::2]] == [int(state[:, x].argmax()) for x in elements]
            answers += [windows] * len(elements)
        assert sample.answers[:, 2].tolist() == answers and len(answers) in (task.questions, task.questions * windows)
        assert sample.loss_mask.nonzero()[0].tolist() == sample.answers[:, 0].tolist()
        assert (sample.answers[:, 1] - sample.answers[:, 0] == 1).all()
        lengths.add(windows)
    assert lengths == set(range(task.min_windows, task.windows + 1))


def test_asked_after_each_window_every_question_is_a_probe():
    task = Track(asked="each", windows=5, questions=2)
    samples = [task.sample(np.random.default_rng(seed), False) for seed in range(50)]
    (probes,) = {tuple(map(tuple, sample.probes.tolist())) for sample in samples}  # of short words too
    assert probes == tuple((6 * window + 2 + 2 * q, 6 * window + 4 + 2 * q) for window in range(5) for q in range(2))
    for sample in samples:
        assert {start - 1 for start in sample.answers[:, 0]} <= {start for start, _ in probes}
    assert not len(Track().sample(np.random.default_rng(0), False).probes)


@pytest.mark.parametrize("asked", ["end", "each"])
def test_no_trained_word_begins_like_one_of_the_test(asked):
    task = Track(windows=8, asked=asked)
    trained, tested = ({word(task, seed, held_out) for seed in range(2000)} for held_out in (False, True))
    beginnings = [{w[:BEGINNING] for w in words if len(w) >= BEGINNING} for words in (trained, tested)]
    assert not beginnings[0] & beginnings[1] and sum(map(len, beginnings)) == 2**BEGINNING
    assert 0.1 < len(beginnings[1]) / 2**BEGINNING < 0.35
    assert all(is_held_out(b) for b in beginnings[1])
    assert {w for w in trained if len(w) < BEGINNING} == {w for w in tested if len(w) < BEGINNING}


def word(task, seed, held_out):
    tokens = task.sample(np.random.default_rng(seed), held_out).tokens.tolist()
    return tuple(token - 2 for token in tokens if token in (2, 3))


def test_surface_guesses_hold_no_work():
    task = Track(windows=2, moves=3, questions=2)
    sample = task.sample(np.random.default_rng(5), False)
    guesses = task.surface_guesses(sample)
    first, second = (int(sample.tokens[start]) for start in sample.answers[:, 0])
    assert [len(c) for c in guesses["an element not taken"]] == [3, 2]
    assert (first,) not in guesses["an element not taken"][1] and (second,) in guesses["an element not taken"][1]
    one_window = Track(windows=1, moves=3, questions=2)
    for seed in range(20):  # there the last window is all there is
        sample = one_window.sample(np.random.default_rng(seed), False)
        right = [[(int(sample.tokens[start]),)] for start in sample.answers[:, 0]]
        assert one_window.surface_guesses(sample)["the last window alone"] == right
    each = Track(asked="each", windows=3, min_windows=3, questions=2)
    for seed in range(20):
        sample = each.sample(np.random.default_rng(seed), False)
        guesses = each.surface_guesses(sample)
        assert [len(c) for c in guesses["an element not taken"]] == [3] * 6  # answers are forgotten
        right = [[(int(sample.tokens[start]),)] for start in sample.answers[:2, 0]]
        assert guesses["the last window alone"][:2] == right and len(guesses["the last window alone"]) == 6


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"min_windows": 9}, "min_windows=9 must not exceed windows=8"),
        ({"questions": 4, "moves": 7}, "must not exceed the 3 elements of s3"),
        ({"questions": 2}, "write questions=1, or moves=3"),
        ({"group": "s4"}, "s3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(RecipeError, match=words):
        check(Track, sizes)
