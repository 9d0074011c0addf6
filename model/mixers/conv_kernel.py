"""From a gated delta net's projection to what FLA's kernels take, in one Triton kernel: layout, convolution, SiLU, L2 norm.

The projection is head-major, with tokens before the batch. FLA's own short convolution and norm would take five copies of
it; this kernel reads every number once and writes each of q, k, v and the raw gates where the delta rule reads it.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powernap.model.mixers.gated_delta_net import MIN_NORM

TILE = 2048  # numbers that a program holds: tokens times channels
PAD = -1e4  # as a raw gate: softplus and sigmoid are 0 in float32, and so are their gradients


class Unpacked(NamedTuple):
    """A projection by role, contiguous: G heads of queries and keys, H of values."""

    q: torch.Tensor  # [B, L, G, d_k], of norm 1
    k: torch.Tensor
    v: torch.Tensor  # [B, L, H, d_v]
    z: torch.Tensor  # [B, L, H, d_v], the output's gate
    beta: torch.Tensor  # [B, L, H], float32, before its sigmoid
    alpha: torch.Tensor  # [B, L, H, decays], float32, as projected


@torch.compiler.disable
def unpack(
    projected: torch.Tensor,
    weight: torch.Tensor,
    padding_mask: torch.Tensor | None,
    key_dim: int,
    value_dim: int,
    eps: float,
) -> Unpacked:
    """Convolve q, k and v of a window from its first token, apply SiLU, normalise q and k; computed in float32.

    Args:
        projected: [L, B, G, rows], rows [q | k | v | z | beta | alpha] of a head of keys, the last four of each of its
            heads of values.
        weight: [G, channels of q, k and v, taps].
        padding_mask: [L, B], False at pads: zeros to the convolution, neither write nor decay.
        eps: of the L2 norm, inside the root; 0: a norm of at least MIN_NORM.
    """
    return Unpacked(*_Unpack.apply(projected, weight, padding_mask, key_dim, value_dim, eps or MIN_NORM**2))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, weight, padding_mask, key_dim, value_dim, eps):
        ctx.sizes = sizes = _Sizes(key_dim, value_dim, (weight.shape[1] - 2 * key_dim) // value_dim, eps)
        length, batch, groups, _ = projected.shape
        weight = weight.contiguous()
        mask = None if padding_mask is None else padding_mask.contiguous().view(torch.uint8)
        ctx.save_for_backward(projected, weight, mask)
        q, k = (projected.new_empty(batch, length, groups, key_dim) for _ in range(2))
        v, z = (projected.new_empty(batch, length, groups * sizes.values, value_dim) for _ in range(2))
        beta = projected.new_empty(v.shape[:3], dtype=torch.float32)
        alpha = projected.new_empty(*v.shape[:3], sizes.decays(projected), dtype=torch.float32)
        _features[sizes.grid(projected, gates=True)](
            projected, weight, mask, q, k, v, z, beta, alpha, PAD=PAD, **sizes.constants(projected, weight)
        )
        return q, k, v, z, beta, alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv, dz, dbeta, dalpha):
        projected, weight, mask = ctx.saved_tensors
        length, batch, groups, _ = projected.shape
        grid, constants = ctx.sizes.grid(projected), ctx.sizes.constants(projected, weight)
        gradient = torch.empty_like(projected)
        before_silu = projected.new_empty(length, batch, groups, weight.shape[1])
        taps = weight.new_empty(grid[0] * batch, *weight.shape, dtype=torch.float32)
        features = (dq.contiguous(), dk.contiguous(), dv.contiguous())
        _features_backward[grid](projected, weight, mask, *features, before_silu, taps, **constants)
        gates = (dz.contiguous(), dbeta.contiguous(), dalpha.contiguous())
        _convolution_backward[ctx.sizes.grid(projected, gates=True)](
            before_silu, weight, mask, *gates, gradient, **constants
        )
        return gradient, taps.sum(0), None, None, None, None


class _Sizes(NamedTuple):
    key_dim: int
    value_dim: int
    values: int  # heads of values for each head of keys
    eps: float

    def decays(self, projected: torch.Tensor) -> int:
        others = 2 * self.key_dim + self.values * (2 * self.value_dim + 1)
        return (projected.shape[-1] - others) // self.values

    @property
    def width(self) -> int:
        """Channels that a program has room for."""
        return triton.next_power_of_2(max(self.key_dim, self.value_dim, self.values))

    @property
    def tokens(self) -> int:
        """Of a program."""
        return max(1, TILE // self.width)

    def grid(self, projected: torch.Tensor, gates: bool = False) -> tuple[int, int, int]:
        """A program for some tokens of q, k or one head of v; with `gates` as many for z, one for beta, one for each alpha."""
        length, batch, groups, _ = projected.shape
        return triton.cdiv(length, self.tokens), batch * groups, 2 + self.values + gates * (2 * self.values + 1)

    def constants(self, projected: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
        length, batch, groups, rows = projected.shape
        return {
            "length": length, "batch": batch, "groups": groups, "rows": rows, "eps": self.eps,
            "KEY": self.key_dim, "VALUE": self.value_dim, "VALUES": self.values, "DECAYS": self.decays(projected),
            "CHANNELS": weight.shape[1], "TAPS": weight.shape[2], "TOKENS": self.tokens, "WIDTH": self.width,
        }  # fmt: skip


@triton.jit
def _place(
    batch, groups, KEY: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr, DECAYS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What this program computes: tokens [TOKENS], its sequence and head of keys, its role and channels [WIDTH].

    Roles: 0 is q, 1 is k, from 2 on heads of v, then as many of z, beta of all of these heads, alpha of each.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence, group = tl.program_id(1).to(tl.int64) // groups, tl.program_id(1) % groups
    role = tl.program_id(2)
    own = tl.arange(0, WIDTH)
    beta = 2 + 2 * VALUES
    first_beta = 2 * KEY + 2 * VALUES * VALUE
    size = tl.where(role < 2, KEY, tl.where(role < beta, VALUE, tl.where(role == beta, VALUES, DECAYS)))
    later = tl.where(role == beta, first_beta, first_beta + VALUES + (role - beta - 1) * DECAYS)
    first = tl.where(role < 2, role * KEY, tl.where(role < beta, 2 * KEY + (role - 2) * VALUE, later))
    return tokens, sequence, group, role, own, own < size, own + first


@triton.jit
def _read(x, mask, tokens, sequence, group, channels, exists, length, batch, groups, rows):
    """Some channels of x [L, B, G, rows] at some tokens, in float32; 0 at pads and outside of the window."""
    there = (tokens >= 0) & (tokens < length)
    if mask is not None:
        there = there & (tl.load(mask + tokens * batch + sequence, mask=there, other=0) != 0)
    at = ((tokens * batch + sequence) * groups + group) * rows
    return tl.load(x + at[:, None] + channels, mask=there[:, None] & exists, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, number, group, channels, exists, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """[WIDTH] of weight [G, CHANNELS, TAPS], in float32."""
    return tl.load(weight + (group * CHANNELS + channels) * TAPS + number, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    projected, weight, mask, tokens, sequence, group, channels, exists, length, batch, groups, rows,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    found = tl.zeros((tokens.shape[0], channels.shape[0]), dtype=tl.float32)
    for number in tl.static_range(TAPS):
        back = TAPS - 1 - number
        x = _read(projected, mask, tokens - back, sequence, group, channels, exists, length, batch, groups, rows)
        found += x * _tap(weight, number, group, channels, exists, CHANNELS, TAPS)
    return found


@triton.jit
def _features(
    projected, weight, mask, q, k, v, z, beta, alpha, length, batch, groups, rows, eps, PAD: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens, sequence, group, role, own, exists, channels = _place(
        batch, groups, KEY, VALUE, VALUES, DECAYS, TOKENS, WIDTH
    )
    is_gate = role >= 2 + VALUES
    seen = exists & (role < 2 + VALUES)
    x = _convolved(
        projected, weight, mask, tokens, sequence, group, channels, seen, length, batch, groups, rows, CHANNELS, TAPS
    )
    x = x * tl.sigmoid(x)
    gate = _read(projected, None, tokens, sequence, group, channels, exists & is_gate, length, batch, groups, rows)
    head = (sequence * length + tokens) * groups + group
    stored = (tokens < length)[:, None] & exists
    key = head[:, None] * KEY + own
    value = (head * VALUES + role - 2)[:, None] * VALUE + own
    unit = x / tl.sqrt(tl.sum(x * x, 1) + eps)[:, None]
    tl.store(q + key, unit.to(q.dtype.element_ty), mask=stored & (role == 0))
    tl.store(k + key, unit.to(k.dtype.element_ty), mask=stored & (role == 1))
    tl.store(v + value, x.to(v.dtype.element_ty), mask=stored & (role >= 2) & (role < 2 + VALUES))
    raw = role - 2 - 2 * VALUES  # 0: beta, 1 and on: alpha
    tl.store(z + value - VALUES * VALUE, gate.to(z.dtype.element_ty), mask=stored & is_gate & (raw < 0))
    if mask is not None:
        kept = tl.load(mask + tokens * batch + sequence, mask=tokens < length, other=0) != 0
        gate = tl.where(kept[:, None], gate, PAD)
    tl.store(beta + head[:, None] * VALUES + own, gate, mask=stored & (raw == 0))
    tl.store(alpha + (head * VALUES + raw - 1)[:, None] * DECAYS + own, gate, mask=stored & (raw > 0))


@triton.jit
def _features_backward(
    projected, weight, mask, dq, dk, dv, before_silu, taps, length, batch, groups, rows, eps,
    KEY: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's output, before_silu [L, B, G, CHANNELS], and each program's part of the taps'."""
    tokens, sequence, group, role, own, exists, channels = _place(
        batch, groups, KEY, VALUE, VALUES, DECAYS, TOKENS, WIDTH
    )
    pre = _convolved(
        projected, weight, mask, tokens, sequence, group, channels, exists, length, batch, groups, rows, CHANNELS, TAPS
    )
    sigmoid = tl.sigmoid(pre)
    x = pre * sigmoid
    head = (sequence * length + tokens) * groups + group
    there = (tokens < length)[:, None] & exists
    key = head[:, None] * KEY + own
    value = (head * VALUES + role - 2)[:, None] * VALUE + own
    d_unit = tl.load(dq + key, mask=there & (role == 0), other=0.0).to(tl.float32)
    d_unit += tl.load(dk + key, mask=there & (role == 1), other=0.0).to(tl.float32)
    dx = tl.load(dv + value, mask=there & (role >= 2), other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) + eps)
    unit = x * scale[:, None]
    dx += (d_unit - unit * tl.sum(d_unit * unit, 1)[:, None]) * scale[:, None]
    d_pre = dx * sigmoid * (1 + pre * (1 - sigmoid))
    at = ((tokens * batch + sequence) * groups + group) * CHANNELS
    tl.store(before_silu + at[:, None] + channels, d_pre.to(before_silu.dtype.element_ty), mask=there)
    part = taps + ((tl.program_id(0) * batch + sequence) * groups + group) * CHANNELS * TAPS
    for number in tl.static_range(TAPS):
        back = TAPS - 1 - number
        seen = _read(projected, mask, tokens - back, sequence, group, channels, exists, length, batch, groups, rows)
        tl.store(part + channels * TAPS + number, tl.sum(d_pre * seen, 0), mask=exists)


@triton.jit
def _convolution_backward(
    before_silu, weight, mask, dz, dbeta, dalpha, gradient, length, batch, groups, rows, eps,
    KEY: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The convolution backwards in time, dz, dbeta and dalpha, into gradient [L, B, G, rows]."""
    tokens, sequence, group, role, own, exists, channels = _place(
        batch, groups, KEY, VALUE, VALUES, DECAYS, TOKENS, WIDTH
    )
    is_gate = role >= 2 + VALUES
    seen = exists & (role < 2 + VALUES)
    found = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for number in tl.static_range(TAPS):
        later = tokens + (TAPS - 1 - number)
        d_pre = _read(before_silu, None, later, sequence, group, channels, seen, length, batch, groups, CHANNELS)
        found += d_pre * _tap(weight, number, group, channels, seen, CHANNELS, TAPS)
    there = tokens < length
    head = (sequence * length + tokens) * groups + group
    raw = role - 2 - 2 * VALUES
    gate = there[:, None] & exists & is_gate
    found += tl.load(dbeta + head[:, None] * VALUES + own, mask=gate & (raw == 0), other=0.0)
    found += tl.load(dalpha + (head * VALUES + raw - 1)[:, None] * DECAYS + own, mask=gate & (raw > 0), other=0.0)
    if mask is not None:  # a pad was a zero to the convolution, and its gates no numbers of the projection
        kept = tl.load(mask + tokens * batch + sequence, mask=there, other=0) != 0
        found = tl.where(kept[:, None], found, 0.0)
    value = (head * VALUES + role - 2 - VALUES)[:, None] * VALUE + own
    found += tl.load(dz + value, mask=gate & (raw < 0), other=0.0).to(tl.float32)
    at = ((tokens * batch + sequence) * groups + group) * rows
    tl.store(gradient + at[:, None] + channels, found.to(gradient.dtype.element_ty), mask=there[:, None] & exists)
