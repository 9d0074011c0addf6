"""Sample the next token from logits: temperature, top-p, the draw."""

import torch


def token_probabilities(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution from which the next token is drawn.

    Args:
        logits: [vocabulary].
        temperature: divides the logits; 0: all mass on the likeliest token, the first of several.
        top_p: in (0, 1]: keep only the smallest set of likeliest tokens whose probabilities reach this sum (nucleus
            sampling, arXiv 1904.09751).

    Returns:
        [vocabulary], float64, with sum 1.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    probabilities = ((logits - logits.max()) / temperature).softmax(0)  # the largest is 0: no overflow
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities[tokens[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """Draw one token; `generator` is on the CPU."""
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
