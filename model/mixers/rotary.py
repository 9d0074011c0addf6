"""Rotary position embedding (arXiv 2104.09864)."""

import functools

import torch

from powernap.model.window import Positions

Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines


def rotary_of(positions: Positions, head_dim: int, base: float, like: torch.Tensor) -> Tables:
    """Cosines and sines at the positions of a window's tokens, each [L, 1 or B, 1, 1, head_dim], in dtype and on the device
    of `like`."""
    starts = positions.starts if len(set(positions.starts)) > 1 else positions.starts[:1]
    tables = [rotary_tables(positions.length, head_dim, base, like.dtype, like.device, start) for start in starts]
    if positions.offsets is not None:
        columns = positions.offsets.to(like.device).split(positions.offsets.shape[1] // len(starts), dim=1)
        tables = [(cos[:, 0][at], sin[:, 0][at]) for (cos, sin), at in zip(tables, columns, strict=True)]
    if len(tables) == 1:
        return tables[0]
    cosines, sines = zip(*tables, strict=True)
    return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)


@functools.lru_cache(maxsize=64)  # windows of the same length and start recur in every pass and step
def rotary_tables(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device, start: int = 0
) -> Tables:
    """Cosines and sines [L, 1, 1, 1, head_dim] of `length` positions from `start` on."""
    # With float32 frequencies the angle at position 2^20 is off by 0.06.
    compute_dtype = torch.float64 if start or dtype == torch.float64 else torch.float32
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=compute_dtype, device=device) / head_dim)
    angles = torch.outer(torch.arange(start, start + length, dtype=compute_dtype, device=device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x [L, B, H, 2, head_dim] by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
