"""Dropout of what each mixer and MLP adds to the residual stream (arXiv 1207.0580), with masks of their own.

A mask is drawn from the run's seed, the step, the sequence's tokens, the window, the pass, the block and the place in it, by a generator
that is made for it: it is the same in every layout and micro-batch, and when a segment is computed again.
"""

import random
import zlib
from dataclasses import dataclass

import torch


def row_seeds(tokens: torch.Tensor, seed: int, step: int) -> tuple[int, ...]:
    """A number for each sequence of [B, T] in a step."""
    return tuple(_hashed(seed, step, zlib.crc32(row.numpy().tobytes())) for row in tokens)


def _hashed(*parts: object) -> int:
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@dataclass(frozen=True)
class Dropout:
    """Of one segment.

    Attributes:
        rate: the share of numbers that become zero; the others are divided by what is left.
        seeds: of each sequence, `row_seeds`.
        segment: the window and the pass.
        length: tokens of the whole window.
        shard: which part of it this rank holds, if tensor ranks split it.
    """

    rate: float
    seeds: tuple[int, ...]
    segment: tuple[int, int]
    length: int
    shard: int = 0

    def __call__(self, values: torch.Tensor, block: int, place: str) -> torch.Tensor:
        """values [L or L/TP, B, D] that `block` adds at `place`."""
        return values * self.mask(values, block, place)

    def mask(self, values: torch.Tensor, block: int, place: str) -> torch.Tensor:
        """[L or L/TP, B, D], 0 or 1 / (1 - rate)."""
        own = slice(self.shard * len(values), (self.shard + 1) * len(values))
        generator = torch.Generator(values.device)
        rows = []
        for seed in self.seeds:
            generator.manual_seed(_hashed(seed, *self.segment, block, place))
            # Of all ranks: the numbers of a row must not depend on how many share it.
            drawn = torch.rand(self.length, values.shape[-1], generator=generator, device=values.device)
            rows.append(drawn[own] >= self.rate)
        return torch.stack(rows, dim=1).to(values.dtype) / (1 - self.rate)
