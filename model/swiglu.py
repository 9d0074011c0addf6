"""SwiGLU between the MLP's two projections, in one kernel each way where kernels compute."""

import torch
import torch.nn.functional as F

from powernap.model.megatron import TransformerConfig


class GateAndUp(torch.nn.Module):
    """[..., gate | up] -> SiLU(gate) * up."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from powernap.model.mixers.fla import kernels_compute

        if not kernels_compute(x):
            return gate_and_up(x)
        from powernap.model import swiglu_kernel

        return swiglu_kernel.gate_and_up(x)


def gate_and_up(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
