"""Intervals of an accuracy: how often they hold the truth where the answers of a sequence hang together."""

import numpy as np
import pytest

from powernap.train.evaluation.intervals import Tally, wilson


def tally(right: np.ndarray, asked: np.ndarray) -> Tally:
    sums = (asked, right, asked**2, right**2, right * asked, right > 0, right < asked)
    return Tally(len(asked), *(int(values.sum()) for values in sums))


def simulate(share: float, together: float, sequences: int = 150, rounds: int = 600) -> list[Tally]:
    """Answers of which a part `together` is one answer of the whole sequence, the rest independent."""
    rng = np.random.default_rng(7)
    tallies = []
    for _ in range(rounds):
        asked = rng.integers(1, 9, sequences)
        common = rng.random(sequences) < share
        answers = np.where(rng.random((sequences, 8)) < together, common[:, None], rng.random((sequences, 8)) < share)
        tallies.append(tally((answers & (np.arange(8) < asked[:, None])).sum(axis=1), asked))
    return tallies


def coverage(intervals, share: float) -> float:
    return np.mean([low <= share <= high for low, high in intervals])


@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
def test_95_of_100_intervals_hold_the_truth(share, together):
    tallies = simulate(share, together)
    assert coverage([t.interval() for t in tallies], share) > 0.925
    naive = coverage([wilson(t.share, t.asked) for t in tallies], share)
    if together:
        assert naive < 0.9  # as if all answers were independent
        return
    assert naive > 0.925
    widths = [
        np.mean([high - low for low, high in found])
        for found in zip(*((t.interval(), wilson(t.share, t.asked)) for t in tallies), strict=True)
    ]
    assert widths[0] / widths[1] == pytest.approx(1.1, abs=0.1)  # independence costs next to nothing


def test_one_answer_a_sequence_is_wilsons_interval():
    """30 of 40. Its ends x solve (p - x)^2 = z^2 x (1 - x) / n."""
    interval = tally((np.arange(40) < 30).astype(int), np.ones(40, dtype=int)).interval()
    assert interval == wilson(0.75, 40)
    for end in interval:
        assert (0.75 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 40, rel=1e-12)


@pytest.mark.parametrize("right", [0, 1])
def test_all_right_or_all_wrong_counts_sequences(right):
    """Ten sequences of eight: no more than ten independent answers are sure; the interval stays within 0 and 1."""
    asked = np.full(10, 8)
    found = tally(right * asked, asked)
    low, high = found.interval()
    assert found.effective_answers() == 10 and 0 <= low <= found.share <= high <= 1
    assert high - low == pytest.approx(1.959964**2 / (10 + 1.959964**2))  # 0.28, where eighty would give 0.05


def test_a_single_sequence_says_little():
    low, high = tally(np.array([4]), np.array([8])).interval()
    assert high - low > 0.85 and low == pytest.approx(1 - high)
