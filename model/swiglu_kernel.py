"""SwiGLU of a joined projection in one Triton kernel each way: the gradient of [gate | up] is written whole, nothing is joined."""

import torch
import triton
import triton.language as tl

COLUMNS = 1024  # of a program


@torch.compiler.disable
def gate_and_up(x: torch.Tensor) -> torch.Tensor:
    """[..., gate | up] -> SiLU(gate) * up, computed in float32."""
    return _GateAndUp.apply(x)


class _GateAndUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        output = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _forward[_grid(output)](x, output, output.shape[-1], COLUMNS=COLUMNS)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output):
        (x,) = ctx.saved_tensors
        gradient = torch.empty_like(x)
        _backward[_grid(d_output)](x, d_output.contiguous(), gradient, d_output.shape[-1], COLUMNS=COLUMNS)
        return gradient


def _grid(output: torch.Tensor) -> tuple[int, int]:
    width = output.shape[-1]
    return output.numel() // width, triton.cdiv(width, COLUMNS)


@triton.jit
def _forward(x, output, width, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < width
    gate = tl.load(x + 2 * row * width + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * width + column, mask=exists, other=0.0).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up
    tl.store(output + row * width + column, found.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _backward(x, d_output, gradient, width, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < width
    gate_at, up_at = 2 * row * width + column, (2 * row + 1) * width + column
    gate = tl.load(x + gate_at, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x + up_at, mask=exists, other=0.0).to(tl.float32)
    d = tl.load(d_output + row * width + column, mask=exists, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(gradient + gate_at, d_gate.to(gradient.dtype.element_ty), mask=exists)
    tl.store(gradient + up_at, (d * gate * sigmoid).to(gradient.dtype.element_ty), mask=exists)
