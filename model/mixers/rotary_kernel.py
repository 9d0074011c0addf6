"""From attention's projection to its queries, gates, keys and values, normed and rotated, in one Triton kernel each way.

What torch takes apart and joins again (slices, halves, products with two tables, and each of these backwards) is read once
and written once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powernap.model.mixers.rotary import Tables

TILE = 2048  # numbers that a program holds: tokens times the width of a head


class Norms(NamedTuple):
    """RMSNorm of each head of queries and of keys."""

    query: torch.Tensor  # [width], the weights
    key: torch.Tensor
    eps: float


@torch.compiler.disable
def unpack(
    projected: torch.Tensor, tables: Tables | None, queries: int, gates: int, norms: Norms | None = None
) -> tuple[torch.Tensor, ...]:
    """Norm queries and keys, then rotate them as `rotary.rotate` does, computed in float32.

    Args:
        projected: [L, B, G, rows, width], rows [queries | gates | key | value] of a head of keys.
        tables: cosines and sines, each [L, 1 or B, 1, 1, rotated] of even `rotated`, at most the width; None: nothing is rotated.

    Returns:
        (queries [L, B, G * queries, width], gates [L, B, G * gates, width], keys and values [L, B, G, width]), contiguous
    """
    cos, sin = tables if tables is not None else (None, None)
    query, key, eps = norms if norms is not None else (None, None, 0.0)
    return _Unpack.apply(projected, cos, sin, query, key, eps, queries, gates)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, cos, sin, query, key, eps, queries, gates):
        projected = projected.contiguous()
        length, batch, groups, _, width = projected.shape
        cos, sin, query, key = (None if t is None else t.contiguous() for t in (cos, sin, query, key))
        is_normed = query is not None
        ctx.save_for_backward(cos, sin, query, key, projected if is_normed else None)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.queries, ctx.gates, ctx.eps = projected.shape, queries, gates, eps
        parts = [projected.new_empty(length, batch, groups * heads, width) for heads in (queries, gates, 1, 1)]
        ctx.shapes = [part.shape for part in parts]
        _forward[_grid(projected.shape)](projected, *parts, cos, sin, query, key, **_constants(ctx, cos, is_normed))
        return tuple(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        cos, sin, query, key, projected = ctx.saved_tensors
        is_normed = query is not None
        like = next(part for part in gradients if part is not None)
        gradient, grid = like.new_empty(ctx.shape), _grid(ctx.shape)
        pairs = zip(gradients, ctx.shapes, strict=True)
        parts = [_zeros(like, shape) if part is None else part.contiguous() for part, shape in pairs]
        rows, width = ctx.shape[3:]
        of_weights = like.new_empty(grid[0] * grid[1], rows, width, dtype=torch.float32) if is_normed else None
        _backward[grid](
            gradient, *parts, projected, cos, sin, query, key, of_weights, **_constants(ctx, cos, is_normed)
        )
        d_query = d_key = None
        if of_weights is not None:
            sums = of_weights.sum(0)
            d_query, d_key = sums[: ctx.queries].sum(0), sums[-2]
        return gradient, None, None, d_query, d_key, None, None, None


def _zeros(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return like.new_zeros(shape) if shape.numel() else like.new_empty(shape)


def _tokens(width: int) -> int:
    """Of a program."""
    return max(1, TILE // triton.next_power_of_2(width))


def _grid(shape: torch.Size) -> tuple[int, int, int]:
    """A program for some tokens of each row of a head of keys."""
    length, batch, groups, rows, width = shape
    return triton.cdiv(length, _tokens(width)), batch * groups, rows


def _constants(ctx, cos: torch.Tensor | None, is_normed: bool) -> dict[str, Any]:
    length, batch, groups, rows, width = ctx.shape
    return {
        "length": length, "batch": batch, "groups": groups, "eps": ctx.eps, "NORMED": is_normed,
        "OF_EACH": cos is not None and cos.shape[1] > 1, "ROTATED": 0 if cos is None else cos.shape[-1],
        "QUERIES": ctx.queries, "GATES": ctx.gates, "ROWS": rows, "HEAD": width, "TOKENS": _tokens(width),
        "WIDTH": triton.next_power_of_2(width),
    }  # fmt: skip


@triton.jit
def _place(
    length, batch, groups, ROTATED: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What this program moves: its row, tokens [TOKENS], their places among all heads, whether a number exists [TOKENS, WIDTH], and of a
    channel [WIDTH] its own number and its partner's in the rotation."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence, group = tl.program_id(1).to(tl.int64) // groups, tl.program_id(1) % groups
    own = tl.arange(0, WIDTH)
    head = (tokens * batch + sequence) * groups + group
    half: tl.constexpr = ROTATED // 2
    partner = tl.where(own < half, own + half, own - half)
    return tl.program_id(2), tokens, sequence, head, (tokens < length)[:, None] & (own < HEAD), own, partner


@triton.jit
def _angles(cos, sin, tokens, sequence, batch, own, turned, OF_EACH: tl.constexpr, ROTATED: tl.constexpr):
    """Cosines and sines [TOKENS, WIDTH]; 1 and 0 where nothing is turned."""
    if OF_EACH:
        at = (tokens * batch + sequence)[:, None] * ROTATED + own
    else:
        at = tokens[:, None] * ROTATED + own
    c = tl.load(cos + at, mask=turned, other=1.0).to(tl.float32)
    return c, tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)


@triton.jit
def _weight(query, key, channels, exists, is_key):
    """The norm's weight of a row's channels, [WIDTH]."""
    found = tl.load(query + channels, mask=exists & (is_key == 0), other=0.0).to(tl.float32)
    return found + tl.load(key + channels, mask=exists & is_key, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    projected, query, gate, key, value, cos, sin, q_weight, k_weight, length, batch, groups, eps,
    NORMED: tl.constexpr, OF_EACH: tl.constexpr, ROTATED: tl.constexpr, QUERIES: tl.constexpr, GATES: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of a head of keys from `projected` to its place."""
    row, tokens, sequence, head, there, own, partner = _place(length, batch, groups, ROTATED, ROWS, HEAD, TOKENS, WIDTH)
    is_query, is_key, is_value = row < QUERIES, row == ROWS - 2, row == ROWS - 1
    is_turned = is_query | is_key
    whole = (head * ROWS + row)[:, None] * HEAD
    turned = there & (own < ROTATED) & is_turned
    x = tl.load(projected + whole + own, mask=there, other=0.0).to(tl.float32)
    scale = 1.0
    if NORMED:
        over_rms = 1 / tl.sqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
        scale = tl.where(is_turned, over_rms, 1.0)
        weight = tl.where(is_turned, _weight(q_weight, k_weight, own, own < HEAD, is_key), 1.0)
        x = x * scale * weight[None, :]
    if ROTATED > 0:
        other = tl.load(projected + whole + partner, mask=turned, other=0.0).to(tl.float32)
        if NORMED:
            other = other * scale * _weight(q_weight, k_weight, partner, own < ROTATED, is_key)[None, :]
        c, s = _angles(cos, sin, tokens, sequence, batch, own, turned, OF_EACH, ROTATED)
        x = x * c + tl.where(own < ROTATED // 2, -1.0, 1.0) * other * s
    tl.store(query + (head * QUERIES + row)[:, None] * HEAD + own, x.to(query.dtype.element_ty), mask=there & is_query)
    is_gate = (row >= QUERIES) & (row < QUERIES + GATES)
    at = (head * GATES + row - QUERIES)[:, None] * HEAD + own
    tl.store(gate + at, x.to(gate.dtype.element_ty), mask=there & is_gate)
    tl.store(key + head[:, None] * HEAD + own, x.to(key.dtype.element_ty), mask=there & is_key)
    tl.store(value + head[:, None] * HEAD + own, x.to(value.dtype.element_ty), mask=there & is_value)


@triton.jit
def _backward(
    gradient, query, gate, key, value, projected, cos, sin, q_weight, k_weight, of_weights, length, batch, groups, eps,
    NORMED: tl.constexpr, OF_EACH: tl.constexpr, ROTATED: tl.constexpr, QUERIES: tl.constexpr, GATES: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From the gradients of queries, gates, keys and values to that of the projection, turned the other way; and this program's part
    of the weights', of_weights [programs, rows, width]."""
    row, tokens, sequence, head, there, own, partner = _place(length, batch, groups, ROTATED, ROWS, HEAD, TOKENS, WIDTH)
    is_query, is_key, is_value = row < QUERIES, row == ROWS - 2, row == ROWS - 1
    is_turned = is_query | is_key
    q_at, k_at = (head * QUERIES + row)[:, None] * HEAD, head[:, None] * HEAD
    at = (head * GATES + row - QUERIES)[:, None] * HEAD + own
    turned = there & (own < ROTATED) & is_turned
    d = tl.load(query + q_at + own, mask=there & is_query, other=0.0).to(tl.float32)
    d += tl.load(gate + at, mask=there & (row >= QUERIES) & (row < QUERIES + GATES), other=0.0).to(tl.float32)
    d += tl.load(key + k_at + own, mask=there & is_key, other=0.0).to(tl.float32)
    d += tl.load(value + k_at + own, mask=there & is_value, other=0.0).to(tl.float32)
    if ROTATED > 0:
        other = tl.load(query + q_at + partner, mask=turned & is_query, other=0.0).to(tl.float32)
        other += tl.load(key + k_at + partner, mask=turned & is_key, other=0.0).to(tl.float32)
        c, s = _angles(cos, sin, tokens, sequence, batch, own, turned, OF_EACH, ROTATED)
        d = d * c + tl.where(own < ROTATED // 2, 1.0, -1.0) * other * s
    whole = (head * ROWS + row)[:, None] * HEAD
    if NORMED:
        x = tl.load(projected + whole + own, mask=there, other=0.0).to(tl.float32)
        over_rms = 1 / tl.sqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None]
        unit = x * over_rms
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(of_weights + (program * ROWS + row) * HEAD + own, tl.sum(d * unit, 0), mask=own < HEAD)
        d_unit = d * _weight(q_weight, k_weight, own, own < HEAD, is_key)[None, :]
        normed = (d_unit - unit * (tl.sum(d_unit * unit, 1) / HEAD)[:, None]) * over_rms
        d = tl.where(is_turned, normed, d)
    tl.store(gradient + whole + own, d.to(gradient.dtype.element_ty), mask=there)
