"""Causal self-attention over one window, or over a sliding one, tensor-parallel over heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from powernap.model.part import FP32, Cache, Device, Mixer, Weight

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window


class Attention(Mixer):
    """Multi-head attention. Under hard eviction it sees its own window only; under sliding eviction also the cached keys
    and values of earlier windows, as far back as L-1 tokens.

    The fused projection is head-major, per head [q | k | v], so a tensor-parallel shard is a plain slice of rows and
    the initial weights do not depend on the number of shards.
    """

    letter: ClassVar[str] = "A"
    title: ClassVar[str] = "attention"
    section: ClassVar[str] = "attention"
    has_fast_weights: ClassVar[bool] = False

    heads: int = Field(ge=1, description="heads; each is model.hidden_size / heads wide")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary position embedding")

    def check(self, model: ModelConfig) -> None:
        if model.hidden_size % self.heads:
            raise ValueError(f"attention.heads={self.heads} must divide hidden_size={model.hidden_size}")
        if self.head_dim(model) % 2:
            raise ValueError(
                f"hidden_size / attention.heads = {self.head_dim(model)} must be even (rotary embeddings turn pairs)"
            )

    def head_dim(self, model: ModelConfig) -> int:
        return model.hidden_size // self.heads

    def split_sizes(self) -> dict[str, int]:
        return {"heads": self.heads}

    def weights(self, model: ModelConfig) -> list[Weight]:
        width = model.hidden_size
        return [
            Weight("qkv_proj.weight", (3 * width, width), split=0),
            Weight("out_proj.weight", (width, width), split=1),
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Projections, and scores and sum over the keys: (L + 1) / 2 of a causal window on average, L of a sliding one."""
        projections = 6 * model.hidden_size**2
        if state_only:
            return projections
        return projections + 2 * model.hidden_size**2 + self.flops_less(model, sleep, keys=0)

    def flops_less(self, model: ModelConfig, sleep: SleepConfig, keys: float) -> int:
        full = model.window if sleep.eviction == "sliding" else (model.window + 1) / 2
        return round(4 * model.hidden_size * (full - keys))

    def has_state(self, sleep: SleepConfig) -> bool:
        return sleep.eviction == "sliding"

    def state_bytes(self, model: ModelConfig, number: int, cached: int) -> int:
        return 2 * cached * model.hidden_size * number

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """q, k, v, the rotated q and k, the output; the log-sum-exp of each head's scores."""
        if state_only:
            return 0
        kept = 6 if sleep.eviction == "hard" else 8  # ... keys and values concatenated with the cache
        return kept * model.hidden_size * number + self.heads * FP32

    def first_state(self, layer: MixerModule, batch: int, like: torch.Tensor) -> torch.Tensor:
        """An empty KV cache, [2, B, heads/TP, 0, head_dim], with the device and dtype of `like`."""
        return like.new_zeros((2, batch, self.heads // layer.tp_size, 0, self.head_dim(layer.model)))

    def forward(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [L, B, D], cache [2, B, heads/TP, n, head_dim] or None -> (output [L, B, D] or None, cache).

        The cache changes in the block's last pass over the window only: all passes see the same earlier tokens.
        """
        import torch

        query, key, value = self._project(layer, hidden_states, window)
        if state is None:
            return self._attend(layer, query, key, value, window), None
        seen = torch.cat([state, torch.stack([key, value])], dim=3)
        output = None
        if need_output:
            keys, values = seen.unbind()
            output = self._attend(layer, query, keys, values, window)
        if layer.block in window.final_blocks:
            kept = min(layer.model.window - 1, seen.shape[3])
            state = seen[..., seen.shape[3] - kept :, :].contiguous()  # a view would keep the evicted ones alive
        return output, state

    def init_cache(self, layer: MixerModule, batch: int, slots: int, like: torch.Tensor) -> Cache:
        """Room for `slots` tokens: the window's, and the earlier ones that it still sees."""
        shape = (batch, 2, self.heads // layer.tp_size, slots, self.head_dim(layer.model))
        return {"keys_values": like.new_zeros(shape)}

    def decode(self, layer: MixerModule, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        import torch

        assert window.slots is not None and window.attention_mask is not None
        query, key, value = self._project(layer, hidden_states, window)
        keys_values = cache["keys_values"]
        new = torch.stack([key, value], dim=1)
        keys_values.scatter_(3, window.slots[:, None, None, :, None].expand_as(new), new)
        keys, values = keys_values[:, :, :, : window.attention_mask.shape[-1]].unbind(1)
        return self._attend(layer, query, keys, values, window)

    def state_of(self, cache: Cache, rows: list[int], before: int) -> torch.Tensor:
        return cache["keys_values"][rows, :, :, :before].transpose(0, 1)

    def begin_window(self, cache: Cache, rows: list[int], before: int, state: torch.Tensor) -> None:
        cache["keys_values"][rows, :, :, :before] = state.transpose(0, 1)

    def _project(
        self, layer: MixerModule, hidden_states: torch.Tensor, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, both rotated, and values: [L, B, D] -> three [B, heads/TP, L, head_dim]."""
        from powernap.model.mixers.rotary import rotary_of, rotate

        qkv, _ = layer.qkv_proj(hidden_states)
        length, batch, _ = qkv.shape
        head_dim = self.head_dim(layer.model)
        qkv = qkv.view(length, batch, self.heads // layer.tp_size, 3 * head_dim)
        queries_keys, value = qkv.split([2 * head_dim, head_dim], dim=-1)
        cos, sin = window.once(self, lambda: rotary_of(window.positions, head_dim, self.rope_base, qkv))
        query, key = rotate(queries_keys.unflatten(-1, (2, head_dim)), cos, sin).unbind(-2)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)

    def _attend(
        self, layer: MixerModule, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """query [B, heads/TP, L, head_dim], keys and values [B, heads/TP, n+L, head_dim] -> [L, B, D]."""
        import torch.nn.functional as F

        mask = window.attention_mask
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        output, _ = layer.out_proj(context.permute(2, 0, 1, 3).flatten(2))
        return output
