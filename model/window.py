"""What all blocks share while they read one window."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Positions and pads of a window."""

    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [L, 1, 1, 1, head_dim]
    valid: torch.Tensor | None = None  # [L, B], 0 at pads; None: no pads
    attention_mask: torch.Tensor | None = None  # [B, 1, L, L], True where seen; None: plain causal
