"""From attention's projection to its queries, gates, keys and values, rotated, in one Triton kernel each way.

What torch takes apart and joins again (slices, halves, products with two tables, and each of these backwards) is read once
and written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from powernap.model.mixers.rotary import Tables

TILE = 2048  # numbers that a program holds: tokens times the width of a head


@torch.compiler.disable
def unpack(projected: torch.Tensor, tables: Tables | None, queries: int, gates: int) -> tuple[torch.Tensor, ...]:
    """Rotate queries and keys as `rotary.rotate` does, computed in float32.

    Args:
        projected: [L, B, G, rows, width], rows [queries | gates | key | value] of a head of keys.
        tables: cosines and sines, each [L, 1 or B, 1, 1, rotated] of even `rotated`, at most the width; None: nothing is rotated.

    Returns:
        (queries [L, B, G * queries, width], gates [L, B, G * gates, width], keys and values [L, B, G, width]), contiguous
    """
    cos, sin = tables if tables is not None else (None, None)
    return _Unpack.apply(projected, cos, sin, queries, gates)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, cos, sin, queries, gates):
        projected = projected.contiguous()
        length, batch, groups, _, width = projected.shape
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.queries, ctx.gates = projected.shape, queries, gates
        parts = [projected.new_empty(length, batch, groups * heads, width) for heads in (queries, gates, 1, 1)]
        ctx.shapes = [part.shape for part in parts]
        _move[_grid(projected.shape)](projected, *parts, **_constants(ctx, cos, sin), BACKWARD=False)
        return tuple(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        cos, sin = ctx.saved_tensors
        like = next(part for part in gradients if part is not None)
        gradient = like.new_empty(ctx.shape)
        pairs = zip(gradients, ctx.shapes, strict=True)
        parts = [_zeros(like, shape) if part is None else part.contiguous() for part, shape in pairs]
        _move[_grid(ctx.shape)](gradient, *parts, **_constants(ctx, cos, sin), BACKWARD=True)
        return gradient, None, None, None, None


def _zeros(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return like.new_zeros(shape) if shape.numel() else like.new_empty(shape)


def _tokens(width: int) -> int:
    """Of a program."""
    return max(1, TILE // triton.next_power_of_2(width))


def _grid(shape: torch.Size) -> tuple[int, int, int]:
    """A program for some tokens of each row of a head of keys."""
    length, batch, groups, rows, width = shape
    return triton.cdiv(length, _tokens(width)), batch * groups, rows


def _constants(ctx, cos: torch.Tensor | None, sin: torch.Tensor | None) -> dict[str, Any]:
    length, batch, groups, rows, width = ctx.shape
    rotated = 0
    if cos is not None and sin is not None:
        rotated = cos.shape[-1]
        cos, sin = cos.contiguous(), sin.contiguous()
    return {
        "cos": cos, "sin": sin, "length": length, "batch": batch, "groups": groups,
        "OF_EACH": cos is not None and cos.shape[1] > 1, "ROTATED": rotated, "QUERIES": ctx.queries, "GATES": ctx.gates,
        "ROWS": rows, "HEAD": width, "TOKENS": _tokens(width), "WIDTH": triton.next_power_of_2(width),
    }  # fmt: skip


@triton.jit
def _move(
    projected, query, gate, key, value, cos, sin, length, batch, groups,
    OF_EACH: tl.constexpr, ROTATED: tl.constexpr, QUERIES: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr,
    HEAD: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One row of a head of keys from `projected` to its place; BACKWARD: from there to `projected`, turned the other way."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence, group, row = tl.program_id(1).to(tl.int64) // groups, tl.program_id(1) % groups, tl.program_id(2)
    own = tl.arange(0, WIDTH)
    there = (tokens < length)[:, None] & (own < HEAD)
    head = (tokens * batch + sequence) * groups + group
    whole = (head * ROWS + row)[:, None] * HEAD
    is_gate, is_key, is_value = (row >= QUERIES) & (row < QUERIES + GATES), row == ROWS - 2, row == ROWS - 1
    q_at = (head * QUERIES + row)[:, None] * HEAD
    g_at = (head * GATES + row - QUERIES)[:, None] * HEAD
    k_at = head[:, None] * HEAD
    half: tl.constexpr = ROTATED // 2
    partner = tl.where(own < half, own + half, own - half)
    turned = (own < ROTATED) & ((row < QUERIES) | is_key)
    paired = there & turned
    if BACKWARD:
        x = tl.load(query + q_at + own, mask=there & (row < QUERIES), other=0.0).to(tl.float32)
        x += tl.load(gate + g_at + own, mask=there & is_gate, other=0.0).to(tl.float32)
        x += tl.load(key + k_at + own, mask=there & is_key, other=0.0).to(tl.float32)
        x += tl.load(value + k_at + own, mask=there & is_value, other=0.0).to(tl.float32)
    else:
        x = tl.load(projected + whole + own, mask=there, other=0.0).to(tl.float32)
    if ROTATED > 0:
        if BACKWARD:
            other = tl.load(query + q_at + partner, mask=paired & (row < QUERIES), other=0.0).to(tl.float32)
            other += tl.load(key + k_at + partner, mask=paired & is_key, other=0.0).to(tl.float32)
        else:
            other = tl.load(projected + whole + partner, mask=paired, other=0.0).to(tl.float32)
        if OF_EACH:
            table = (tokens * batch + sequence)[:, None] * ROTATED + own
        else:
            table = tokens[:, None] * ROTATED + own
        c = tl.load(cos + table, mask=paired, other=1.0).to(tl.float32)
        s = tl.load(sin + table, mask=paired, other=0.0).to(tl.float32)
        sign = tl.where(own < half, -1.0, 1.0)
        if BACKWARD:
            sign = -sign
        x = x * c + sign * other * s
    if BACKWARD:
        tl.store(projected + whole + own, x.to(projected.dtype.element_ty), mask=there)
    else:
        tl.store(query + q_at + own, x.to(query.dtype.element_ty), mask=there & (row < QUERIES))
        tl.store(gate + g_at + own, x.to(gate.dtype.element_ty), mask=there & is_gate)
        tl.store(key + k_at + own, x.to(key.dtype.element_ty), mask=there & is_key)
        tl.store(value + k_at + own, x.to(value.dtype.element_ty), mask=there & is_value)
