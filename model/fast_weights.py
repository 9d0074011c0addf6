"""The states a stage carries from segment to segment: fast weights, and under sliding eviction cached keys and values.

Fast weights are the matrix states of the recurrent mixers, one [B, heads/TP, rows, columns] tensor per block. Under
sliding eviction each attention block adds its newest keys and values, one [2, B, heads/TP, n, head_dim] tensor.

Both are data, not parameters: sharded by heads over tensor parallelism, by blocks over pipeline stages and by sequence
over data parallelism, never communicated inside a step. A plain tuple, in block order, passes through autograd and
checkpointing untouched.
"""

import torch

LayerStates = tuple[torch.Tensor, ...]  # one per block with a state: fast weights or cached keys and values


def zero_state(batch: int, heads: int, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """A block's fast weights at the start of a sequence, on the device of `like`; float32, or float64 where `like` is.

    Never lower: a state is a sum over thousands of small writes.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros((batch, heads, rows, columns), dtype=dtype, device=like.device)


def detach(layer_states: LayerStates) -> LayerStates:
    """The same values without a gradient to the segments that wrote them."""
    return tuple(state.detach() for state in layer_states)


def reset_rows(layer_states: LayerStates, begins: torch.Tensor) -> LayerStates:
    """Zero the fast weights in place in the rows that `begins`, bool [B], marks."""
    return tuple(state.masked_fill_(begins[:, None, None, None], 0.0) for state in layer_states)


def begin_anew(layer_states: LayerStates, begins: torch.Tensor) -> LayerStates:
    """The states with zero fast weights in the rows that `begins`, bool [B], marks. Caches stay: attention masks them."""
    rows = begins[:, None, None, None]
    return tuple(state.masked_fill(rows, 0.0) if state.dim() == 4 else state for state in layer_states)


def split_batch(layer_states: LayerStates, batch: int, size: int) -> list[LayerStates]:
    """Split the states of `batch` sequences into parts of `size`; each part is empty if no block has a state."""
    return [tuple(state[start : start + size] for state in layer_states) for start in range(0, batch, size)]


def cat_batch(parts: list[LayerStates]) -> LayerStates:
    """Concatenate the rows of all parts."""
    return tuple(torch.cat(states) for states in zip(*parts, strict=True))
