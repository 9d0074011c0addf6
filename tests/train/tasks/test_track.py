"""Track: samples against permutations multiplied a second way, and words that training never sees."""

import numpy as np
import pytest

from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks.sample import is_held_out
from powernap.train.tasks.track import ALL_TRAINED, GROUPS, Track

TASKS = [Track(), Track(group="a5", moves=3, windows=4, questions=2), Track(moves=5, windows=2, questions=3)]


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
        context, questions = names[: task.context_length], names[task.context_length :]
        state, windows = np.eye(task.points, dtype=int), 0
        for window in zip(*[iter(context)] * task.window, strict=True):
            if window[0] == "[pad]":
                assert set(window) == {"[pad]"} and not windows  # on the left, by whole windows
                continue
            assert window[0] == "[move]"
            windows += 1
            for letter in window[1:]:
                state = matrix(GROUPS[task.group][ord(letter) - ord("a")]) @ state
        asked = [int(name.removeprefix("[where ").removesuffix("]")) - 1 for name in questions[::2]]
        assert len(set(asked)) == task.questions
        assert [int(name) - 1 for name in questions[1::2]] == [int(state[:, x].argmax()) for x in asked]
        assert sample.answers[:, 2].tolist() == [windows] * task.questions
        assert sample.loss_mask.nonzero()[0].tolist() == sample.answers[:, 0].tolist()
        assert (sample.answers[:, 1] - sample.answers[:, 0] == 1).all()
        lengths.add(windows)
    assert lengths == set(range(task.min_windows, task.windows + 1))


def test_long_words_of_the_test_are_never_trained_on():
    task = Track(windows=8)
    trained, tested = ({word(task, seed, held_out) for seed in range(3000)} for held_out in (False, True))
    assert not {long for long in trained & tested if len(long) > ALL_TRAINED}
    for length in range(ALL_TRAINED + 1, 9):  # every word is on one side, and both are found
        words = {w for w in trained | tested if len(w) == length}
        assert 0.1 < len(words & tested) / 2**length < 0.35
        assert all(is_held_out(w) == (w in tested) for w in words)


def word(task, seed, held_out):
    tokens = task.sample(np.random.default_rng(seed), held_out).tokens[: task.context_length]
    return tuple(int(token) - 2 for token in tokens if token > 1)


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
