"""RMSNorm with the constructor Megatron-core's layers expect.

Megatron-core's own torch norm rejects sequence parallelism and never marks its weight for the gradient all-reduce that
sequence parallelism needs.
"""

import torch

from powernap.model.megatron import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's
