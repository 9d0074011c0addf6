"""The distribution a token is drawn from, counted out the long way."""

import math
from collections import Counter

import pytest
import torch

from powernap.train.generation.sampling import draw, token_probabilities

LOGITS = [1.0, -0.5, 2.0, 2.0, -math.inf, 0.3, 1.7]


def by_hand(logits, temperature, top_p):
    """Softmax, then tokens from the likeliest down until their sum reaches top_p; of equals the first comes first."""
    weights = [math.exp(x / temperature) for x in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, reached = [], 0.0
    for token in sorted(range(len(logits)), key=lambda token: -probabilities[token]):
        if reached >= top_p:
            break
        kept.append(token)
        reached += probabilities[token]
    return [p / reached if token in kept else 0.0 for token, p in enumerate(probabilities)]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.7, 0.95, 0.999999, 1.0])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_probabilities_are_those_counted_by_hand(temperature, top_p):
    found = token_probabilities(torch.tensor(LOGITS), temperature, top_p)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand(LOGITS, temperature, top_p), abs=1e-7)
    assert found[4] == 0 and found.sum().item() == pytest.approx(1)


def test_temperature_zero_takes_the_likeliest():
    assert token_probabilities(torch.tensor(LOGITS), 0, 0.5).tolist() == [0, 0, 1, 0, 0, 0, 0]
    nearly = token_probabilities(torch.tensor(LOGITS, dtype=torch.bfloat16), 1e-3, 1.0)
    assert nearly.tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0, 0])
    assert token_probabilities(torch.tensor([1.0, 2.0]), 1e-320, 1.0).tolist() == [0, 1]


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_draws_have_these_frequencies(top_p):
    probabilities = token_probabilities(torch.tensor(LOGITS), 1.0, top_p)
    generator = torch.Generator().manual_seed(0)
    n = 10_000
    counts = Counter(draw(probabilities, generator) for _ in range(n))

    def chi_square(expected):
        return sum((counts[token] - n * p) ** 2 / (n * p) for token, p in enumerate(expected) if p)

    expected = by_hand(LOGITS, 1.0, top_p)
    assert all(counts[token] == 0 for token, p in enumerate(expected) if p == 0)
    assert chi_square(expected) < 22  # 0.1 % of fair draws from up to 6 tokens exceed it
    assert chi_square(by_hand(LOGITS, 1.1, top_p)) > 22  # the control: another temperature does not pass
    again = torch.Generator().manual_seed(0)
    assert Counter(draw(probabilities, again) for _ in range(n)) == counts
