"""Data that all blocks share while they read one window."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from powernap.model.dropout import Dropout


@dataclass(frozen=True)
class Positions:
    """Positions of a window's tokens.

    Under hard eviction they restart in every window; under sliding eviction they count from the sequence's start.
    """

    starts: tuple[int, ...]  # position of the window's first token: one for all sequences, or one for each
    length: int  # tokens of the whole window
    offsets: torch.Tensor | None = None  # [L, B], of a chunk's tokens in the window; None: all of its tokens


@dataclass(frozen=True)
class Window:
    """Positions and pads of a window of L tokens, after n tokens in attention's cache (none under hard eviction).

    When decoding in chunks L is the chunk's length, n the tokens already cached.
    """

    positions: Positions
    padding_mask: torch.Tensor | None = None  # [L, B], False at pads; None: no pads
    attention_mask: torch.Tensor | None = None  # [L, n+L] or [B, 1, L, n+L], True where seen; None: causal, n = 0
    final_blocks: range = range(0)  # blocks of the model that run in no later pass over this window
    slots: torch.Tensor | None = None  # [B, L], cache slots for the keys and values of a chunk
    dropout: Dropout | None = None  # of what blocks add to the residual stream
    computed: dict[Any, Any] = field(default_factory=dict, compare=False)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, computed for the first block that needs it."""
        if key not in self.computed:
            self.computed[key] = compute()
        return self.computed[key]


def sliding_mask(length: int, cached: int, window_size: int, device: torch.device) -> torch.Tensor:
    """Attention mask of a window over cached and own keys: a query sees itself and up to window_size-1 keys before.

    Returns:
        [L, n+L], True where seen.
    """
    queries, keys = (torch.arange(start, cached + length, device=device) for start in (cached, 0))
    distance = queries[:, None] - keys
    return (distance >= 0) & (distance < window_size)


def mask_padding(mask: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """`mask` [L, n+L] without padded keys, as [B, 1, L, n+L]; padding_mask [B, n+L] is False at pads.

    A pad may see itself: a softmax over an empty row would be NaN.
    """
    length, keys = mask.shape
    itself = torch.ones_like(mask).triu(keys - length).tril(keys - length)
    return (mask & (padding_mask[:, None, :] | itself)).unsqueeze(1)
