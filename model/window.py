"""What all blocks share while they read one window."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Positions and pads of a window of L tokens, after n that attention has in its cache (none under hard eviction).

    Of a window that is read piece by piece: of the piece's L tokens, after n of the window and of those before.
    """

    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [L, 1 or B, 1, 1, head_dim]
    valid: torch.Tensor | None = None  # [L, B], 0 at pads; None: no pads
    attention_mask: torch.Tensor | None = None  # [L, n+L] or [B, 1, L, n+L], True where seen; None: causal, n = 0
    final_blocks: range = range(0)  # blocks of the model that run in no later pass over this window
    slots: torch.Tensor | None = None  # [B, L], where in its cache attention keeps a piece's keys and values


# What a block keeps while a window is read piece by piece; of every tensor the first dimension is the batch.
Reading = dict[str, torch.Tensor]
