"""The gated RMSNorm of a delta rule's output in one Triton kernel each way, from the order in which FLA's kernels have tokens to that
of the output projection.

FLA's own norm leaves the order as it is: a copy forward, and two on the way back.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl

TILE = 2048  # numbers that a program holds: tokens times the width of a head


@torch.compiler.disable
def gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: Literal["silu", "sigmoid"]
) -> torch.Tensor:
    """RMSNorm of x over its last dimension times `activation` of the gate, computed in float32.

    Args:
        x, gate: [B, L, H, d_v].
        weight: [d_v].

    Returns:
        [L, B, H * d_v], contiguous
    """
    return _GatedNorm.apply(x, gate, weight, eps, activation)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, activation):
        x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
        batch, length, heads, width = x.shape
        ctx.save_for_backward(x, gate, weight)
        ctx.options = {"eps": eps, "IS_SILU": activation == "silu"}
        output = x.new_empty(length, batch, heads * width)
        _forward[_grid(x)](x, gate, weight, output, **_constants(x), **ctx.options)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output):
        x, gate, weight = ctx.saved_tensors
        dx, d_gate, grid = torch.empty_like(x), torch.empty_like(gate), _grid(x)
        parts = x.new_empty(grid[0] * grid[1], x.shape[-1], dtype=torch.float32)
        _backward[grid](x, gate, weight, d_output.contiguous(), dx, d_gate, parts, **_constants(x), **ctx.options)
        return dx, d_gate, parts.sum(0), None, None


def _tokens(width: int) -> int:
    """Of a program."""
    return max(1, TILE // triton.next_power_of_2(width))


def _grid(x: torch.Tensor) -> tuple[int, int]:
    """A program for some tokens of each head."""
    batch, length, heads, width = x.shape
    return triton.cdiv(length, _tokens(width)), batch * heads


def _constants(x: torch.Tensor) -> dict[str, Any]:
    batch, length, heads, width = x.shape
    sizes = {"VALUE": width, "TOKENS": _tokens(width), "WIDTH": triton.next_power_of_2(width)}
    return {"batch": batch, "length": length, "heads": heads, **sizes}


@triton.jit
def _places(batch, length, heads, VALUE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Where this program's numbers are in [B, L, H, d_v] and in [L, B, H, d_v], and which of them exist: [TOKENS, WIDTH]."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sequence, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    own = tl.arange(0, WIDTH)
    before = ((sequence * length + tokens) * heads + head)[:, None] * VALUE + own
    after = ((tokens * batch + sequence) * heads + head)[:, None] * VALUE + own
    return before, after, (tokens < length)[:, None] & (own < VALUE)


@triton.jit
def _normed(x, before, there, eps, VALUE: tl.constexpr):
    """x / rms(x), and 1 / rms(x) [TOKENS, 1]."""
    numbers = tl.load(x + before, mask=there, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(numbers * numbers, 1) / VALUE + eps)
    return numbers * scale[:, None], scale[:, None]


@triton.jit
def _forward(
    x, gate, weight, output, batch, length, heads, eps,
    IS_SILU: tl.constexpr, VALUE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    before, after, there = _places(batch, length, heads, VALUE, TOKENS, WIDTH)
    own = tl.arange(0, WIDTH)
    unit, _ = _normed(x, before, there, eps, VALUE)
    z = tl.load(gate + before, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + own, mask=own < VALUE, other=0.0).to(tl.float32)
    found = unit * scale[None, :] * tl.sigmoid(z)
    if IS_SILU:
        found = found * z
    tl.store(output + after, found.to(output.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    x, gate, weight, d_output, dx, d_gate, parts, batch, length, heads, eps,
    IS_SILU: tl.constexpr, VALUE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the gate, and this program's part of the weight's, parts [programs, d_v]."""
    before, after, there = _places(batch, length, heads, VALUE, TOKENS, WIDTH)
    own = tl.arange(0, WIDTH)
    unit, over_rms = _normed(x, before, there, eps, VALUE)
    z = tl.load(gate + before, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + own, mask=own < VALUE, other=0.0).to(tl.float32)
    d = tl.load(d_output + after, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    if IS_SILU:
        active, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    else:
        active, slope = sigmoid, sigmoid * (1 - sigmoid)
    d_normed = d * active
    tl.store(d_gate + before, (d * unit * scale[None, :] * slope).to(d_gate.dtype.element_ty), mask=there)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts + program * VALUE + own, tl.sum(d_normed * unit, 0), mask=own < VALUE)
    d_unit = d_normed * scale[None, :]
    along = tl.sum(d_unit * unit, 1) / VALUE
    tl.store(dx + before, ((d_unit - unit * along[:, None]) * over_rms).to(dx.dtype.element_ty), mask=there)
