"""What a stage carries from segment to segment: fast weights, and under sliding eviction cached keys and values.

Fast weights are the matrix states of the recurrent mixers, one [B, heads/TP, rows, columns] tensor a block. Under sliding
eviction an attention block has its newest keys and values beside them, one [2, B, heads/TP, n, head_dim] tensor a block.

Both are data, not parameters: sharded by heads over tensor parallelism, by blocks over pipeline stages and by sequence
over data parallelism, never communicated inside a step. A plain tuple, in block order, passes through autograd and
checkpointing untouched.
"""

import torch

LayerStates = tuple[torch.Tensor, ...]  # one a block that carries anything: fast weights and, if there are any, caches


def zero_state(batch: int, heads: int, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """A block's fast weights at the start of a sequence, on the device of `like`; float32, or float64 where `like` is.

    Lower precision is no option: a state is a sum over thousands of small writes.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros((batch, heads, rows, columns), dtype=dtype, device=like.device)


def detach(layer_states: LayerStates) -> LayerStates:
    """The same numbers with no gradient to what wrote them."""
    return tuple(state.detach() for state in layer_states)


def reset_rows(layer_states: LayerStates, begins: torch.Tensor) -> LayerStates:
    """Set the fast weights to zero in the rows of `begins`, bool [B], in place."""
    return tuple(state.masked_fill_(begins[:, None, None, None], 0.0) for state in layer_states)


def split_batch(layer_states: LayerStates, batch: int, size: int) -> list[LayerStates]:
    """The rows of `batch` sequences in parts of `size`; each is empty where no block has a state."""
    return [tuple(state[start : start + size] for state in layer_states) for start in range(0, batch, size)]


def cat_batch(parts: list[LayerStates]) -> LayerStates:
    """The rows of all parts."""
    return tuple(torch.cat(states) for states in zip(*parts, strict=True))
