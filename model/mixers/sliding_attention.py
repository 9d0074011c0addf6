"""Attention with a reach of its own, shorter than a window: letter S."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from powernap.model.mixers.attention import Attention

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.window import Window


class SlidingAttention(Attention):
    """Attention in which a token sees itself and the `reach` - 1 tokens before it, as in Mistral (arXiv 2310.06825).

    The eviction is the model's: under hard eviction no token of an earlier window is seen. Projections and norms are those of
    attention, with sizes of their own.
    """

    letter: ClassVar[str] = "S"
    title: ClassVar[str] = "sliding-window attention"
    section: ClassVar[str] = "sliding_attention"

    reach: int = Field(ge=1, description="tokens that a token sees, itself included; at most model.window")

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if self.reach > model.window:
            raise ValueError(f"{self.section}.reach={self.reach} must be at most window={model.window}")

    def keys_seen(self, model: ModelConfig, sleep: SleepConfig) -> float:
        if sleep.eviction == "sliding":
            return self.reach
        return self.reach - self.reach * (self.reach - 1) / (2 * model.window)

    def mask(self, window: Window, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        def near() -> torch.Tensor:
            import torch

            key = torch.arange(keys, device=device)
            if window.slots is None:
                query = torch.arange(keys - queries, keys, device=device)[:, None]
            else:
                query = window.slots[:, None, :, None]
            seen = (key <= query) & (query - key < self.reach)
            return seen if window.attention_mask is None else seen & window.attention_mask

        return window.once(("mask", self), near)
