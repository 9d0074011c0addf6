"""Where in its document a token is: windows by powers of two, 1, 2, 3-4, 5-8, ..."""

import torch

PLACES = 32


def place_name(place: int) -> str:
    """Its windows, counted from 1."""
    return str(place + 1) if place < 2 else f"{2 ** (place - 1) + 1}-{2**place}"


def places_of(length: int, windows: list[range], part: int) -> torch.Tensor:
    """The place of each token as a target, [length]: of the window whose tokens predict it, in its document.

    Args:
        windows: tokens of each window of a sequence, without probes.
        part: sequences of the document before this one.
    """
    before = torch.zeros(length, dtype=torch.int64)  # windows of the document before the token's
    for number, tokens in enumerate(windows, start=part * len(windows)):
        before[tokens.start + 1 : tokens.stop + 1] = number
    return torch.frexp(before.double()).exponent  # 0, 1, 2 and 3, 4 to 7: the bits of the number


def sum_by_place(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The sum of `values` [B, at least T] at each of the `places` [T]: [PLACES]."""
    of_tokens = values[:, : len(places)].double().sum(dim=0)
    return of_tokens.new_zeros(PLACES).index_add_(0, places, of_tokens)
