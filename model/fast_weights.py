"""Fast weights: the matrix states of a stack's gated-delta-net blocks, one [B, heads/TP, d_k, d_v] tensor a block.

They are data, not parameters: sharded by heads over tensor parallelism, by blocks over pipeline stages and by sequence
over data parallelism, never communicated inside a step. A plain tuple, in block order, passes through autograd and
checkpointing untouched.
"""

import torch

FastWeights = tuple[torch.Tensor, ...]


def zero_fast_weights(
    num_blocks: int, batch: int, heads: int, key_dim: int, value_dim: int, like: torch.Tensor
) -> FastWeights:
    """The state at the start of a sequence, on the device of `like`; float32, or float64 where `like` is.

    Lower precision is no option: a state is a sum over thousands of small writes.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    shape = (batch, heads, key_dim, value_dim)
    return tuple(torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(num_blocks))


def detach(fast_weights: FastWeights) -> FastWeights:
    """The same numbers with no gradient to what wrote them."""
    return tuple(state.detach() for state in fast_weights)


def nbytes(fast_weights: FastWeights) -> int:
    """Bytes one process holds for them."""
    return sum(state.numel() * state.element_size() for state in fast_weights)
