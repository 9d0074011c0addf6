"""RMSNorm with the constructor Megatron-core's layers expect.

Megatron-core's own torch norm rejects sequence parallelism and never marks its weight for the gradient all-reduce that
sequence parallelism needs.
"""

import torch
import torch.nn.functional as F

from powernap.model.megatron import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467).

    Args:
        zero_centred: multiply by 1 + weight; None: as `config` says.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, zero_centred: bool | None = None, **_
    ):
        super().__init__(hidden_size, eps=eps)
        self.zero_centred = config.layernorm_zero_centered_gamma if zero_centred is None else zero_centred
        if self.zero_centred:
            torch.nn.init.zeros_(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x, self.weight)

    def scaled(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The norm of x with this weight in the place of its own."""
        return rms_norm(x, weight, self.eps, self.zero_centred)

    def of_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of residual + x, that sum), in one of FLA's kernels each way where kernels compute."""
        from powernap.model.mixers.fla import kernels_compute

        if not kernels_compute(x):
            total = residual + x
            return self(total), total
        from powernap.model.mixers.kernels import norm_of_sum

        weight = 1 + self.weight.float() if self.zero_centred else self.weight
        return norm_of_sum(x, residual, weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None, zero_centred: bool) -> torch.Tensor:
    if not zero_centred:
        return F.rms_norm(x, weight.shape, weight, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 1 + weight would round the weight away
    return F.rms_norm(x.to(dtype), weight.shape, 1 + weight.to(dtype), eps).to(x.dtype)
