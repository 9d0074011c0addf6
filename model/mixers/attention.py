"""Causal self-attention over one window, or over a sliding one, tensor-parallel over heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

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

    The fused projection has for each head of keys and values [q of its queries | their gates, if any | k | v], so a
    tensor-parallel shard is a plain slice of rows and the initial weights do not depend on the number of shards.
    """

    letter: ClassVar[str] = "A"
    title: ClassVar[str] = "attention"
    section: ClassVar[str] = "attention"
    has_fast_weights: ClassVar[bool] = False
    norms_follow_the_model: ClassVar[bool] = True

    heads: int = Field(ge=1, description="heads of queries")
    kv_heads: int | None = Field(
        None,
        ge=1,
        description="heads of keys and values, each for heads / kv_heads queries (arXiv 2305.13245); null: heads",
    )
    head_dim: int | None = Field(None, ge=1, description="width of a head; null: model.hidden_size / heads")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary position embedding")
    rotary_dims: int | None = Field(
        None, ge=0, description="the first dimensions of a head, which are rotated; null: all; 0: none, no positions"
    )
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, before they are rotated")
    qk_norm_over: Literal["head", "width"] = Field(
        "head", description="qk_norm over each head, with one weight for all, or over all heads together, as in OLMo"
    )
    qkv_bias: bool = Field(False, description="biases of queries, keys and values, as in Qwen2")
    output_gate: bool = Field(
        False, description="a gate for each dimension of each head's output, from the input (arXiv 2505.06708)"
    )

    def check(self, model: ModelConfig) -> None:
        if self.head_dim is None and model.hidden_size % self.heads:
            raise ValueError(
                f"{self.section}.heads={self.heads} must divide hidden_size={model.hidden_size}, or write "
                f"{self.section}.head_dim"
            )
        if self.heads % self.groups:
            raise ValueError(f"{self.section}.kv_heads={self.groups} must divide {self.section}.heads={self.heads}")
        width, rotated = self.width(model), self.rotated(model)
        if rotated > width:
            raise ValueError(f"{self.section}.rotary_dims={rotated} must be at most the width of a head, {width}")
        if rotated % 2:
            what = f"{self.section}.rotary_dims" if self.rotary_dims else "the width of a head"
            raise ValueError(f"{what} = {rotated} must be even (rotary embeddings turn pairs)")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    def width(self, model: ModelConfig) -> int:
        """Of a head."""
        return self.head_dim or model.hidden_size // self.heads

    def rotated(self, model: ModelConfig) -> int:
        """Dimensions of a head that are rotated."""
        return self.width(model) if self.rotary_dims is None else self.rotary_dims

    @property
    def has_kernels(self) -> bool:
        """Of Powernap's, for norm and rotation; a norm over all heads has sums over tensor ranks."""
        return not (self.qk_norm and self.qk_norm_over == "width")

    @property
    def _rows(self) -> tuple[int, int, int, int]:
        """Heads in a group's rows of the projection: queries, gates, key, value."""
        queries = self.heads // self.groups
        return queries, queries * self.output_gate, 1, 1

    def split_sizes(self) -> dict[str, int]:
        return {"heads": self.heads} | ({"kv_heads": self.groups} if self.kv_heads else {})

    def weights(self, model: ModelConfig) -> list[Weight]:
        width, inner = self.width(model), self.heads * self.width(model)
        norms = []
        if self.qk_norm and self.qk_norm_over == "head":
            norms = [Weight(f"{name}_norm.weight", (width,)) for name in "qk"]
        elif self.qk_norm:
            heads = {"q": self.heads, "k": self.groups}
            norms = [Weight(f"{name}_norm.weight", (n * width,), split=0) for name, n in heads.items()]
        rows = self.groups * sum(self._rows) * width
        return [
            Weight(
                "qkv_proj.weight",
                (rows, model.hidden_size),
                split=0,
                projections=tuple(count * width for count in self._rows if count),
            ),
            *([Weight("qkv_proj.bias", (rows,), split=0)] if self.qkv_bias else []),
            Weight("out_proj.weight", (model.hidden_size, inner), split=1),
            *norms,
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Projections, and scores and sum over the keys: (L + 1) / 2 of a causal window on average, L of a sliding one."""
        projections = 2 * model.hidden_size * self.groups * sum(self._rows) * self.width(model)
        if state_only:
            return projections
        output = 2 * model.hidden_size * self.heads * self.width(model)
        return projections + output + self.flops_less(model, sleep, keys=0)

    def flops_less(self, model: ModelConfig, sleep: SleepConfig, keys: float) -> int:
        full = self.keys_seen(model, sleep)
        return round(4 * self.heads * self.width(model) * (full - min(keys, full)))

    def keys_seen(self, model: ModelConfig, sleep: SleepConfig) -> float:
        """By a token of a full window, the mean."""
        return model.window if sleep.eviction == "sliding" else (model.window + 1) / 2

    def has_state(self, sleep: SleepConfig) -> bool:
        return sleep.eviction == "sliding"

    def state_bytes(self, model: ModelConfig, number: int, cached: int) -> int:
        return 2 * cached * self.groups * self.width(model) * number

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """The projection, rotated q and k, the output; the log-sum-exp of each head's scores. On CUDA in bf16 a kernel writes q, k and
        v in the projection's place, and keeps it where it norms them."""
        if state_only:
            return 0
        queries, pairs = self.heads, self.groups  # in widths of a head
        kept = sum(self._rows) * pairs + queries
        in_kernel = device == "cuda" and number < FP32 and self.has_kernels
        if in_kernel and self.qk_norm:
            kept += queries + 2 * pairs
        elif (self.rotated(model) or self.qk_norm) and not in_kernel:
            kept += queries + pairs
        if self.output_gate:
            kept += 2 * queries  # its sigmoid, the gated output
        if sleep.eviction == "sliding":
            kept += 2 * pairs  # keys and values, concatenated with the cache
        normed = 0
        # Divided by their root mean square, in bf16 also as float32 before; and that.
        if self.qk_norm and not in_kernel:
            normed = (queries + pairs) * FP32 * (self.width(model) * (1 if number == FP32 else 2) + 1)
        return kept * self.width(model) * number + self.heads * FP32 + normed

    def kept_bytes(self, model: ModelConfig, number: int) -> float:
        """Attention's result, before the output projection, and the log-sum-exp of each head's scores."""
        return self.heads * (self.width(model) * number + FP32)

    def flops_again(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        return 0

    def first_state(self, layer: MixerModule, batch: int, like: torch.Tensor) -> torch.Tensor:
        """An empty KV cache, [2, B, groups/TP, 0, width], with the device and dtype of `like`."""
        return like.new_zeros((2, batch, self.groups // layer.tp_size, 0, self.width(layer.model)))

    def forward(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [L, B, D], cache [2, B, groups/TP, n, width] or None -> (output [L, B, D] or None, cache).

        The cache changes in the block's last pass over the window only: all passes see the same earlier tokens.
        """
        import torch

        query, gate, key, value = self._project(layer, hidden_states, window)
        if state is None:
            return self._attend(layer, query, gate, key, value, window), None
        seen = torch.cat([state, torch.stack([key, value])], dim=3)
        output = None
        if need_output:
            keys, values = seen.unbind()
            output = self._attend(layer, query, gate, keys, values, window)
        if layer.block in window.final_blocks:
            kept = min(layer.model.window - 1, seen.shape[3])
            state = seen[..., seen.shape[3] - kept :, :].contiguous()  # a view would keep the evicted ones alive
        return output, state

    def init_cache(self, layer: MixerModule, batch: int, slots: int, like: torch.Tensor) -> Cache:
        """Room for `slots` tokens: the window's, and the earlier ones that it still sees."""
        shape = (batch, 2, self.groups // layer.tp_size, slots, self.width(layer.model))
        return {"keys_values": like.new_zeros(shape)}

    def decode(self, layer: MixerModule, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        import torch

        assert window.slots is not None and window.attention_mask is not None
        query, gate, key, value = self._project(layer, hidden_states, window)
        keys_values = cache["keys_values"]
        new = torch.stack([key, value], dim=1)
        keys_values.scatter_(3, window.slots[:, None, None, :, None].expand_as(new), new)
        keys, values = keys_values[:, :, :, : window.attention_mask.shape[-1]].unbind(1)
        return self._attend(layer, query, gate, keys, values, window)

    def state_of(self, cache: Cache, rows: list[int], before: int) -> torch.Tensor:
        return cache["keys_values"][rows, :, :, :before].transpose(0, 1)

    def begin_window(self, cache: Cache, rows: list[int], before: int, state: torch.Tensor) -> None:
        cache["keys_values"][rows, :, :, :before] = state.transpose(0, 1)

    def _project(
        self, layer: MixerModule, hidden_states: torch.Tensor, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Queries, their gates, keys, values; queries and keys are rotated. [L, B, D] -> [B, heads or groups/TP, L, width]."""
        import torch

        from powernap.model.mixers.fla import kernels_compute
        from powernap.model.mixers.rotary import rotary_of, rotate

        projected, _ = layer.qkv_proj(hidden_states)
        length, batch, _ = projected.shape
        queries, gates, *_ = self._rows
        width, rotated = self.width(layer.model), self.rotated(layer.model)
        projected = projected.view(length, batch, self.groups // layer.tp_size, sum(self._rows), width)
        tables = None
        if rotated:
            tables = window.once(self, lambda: rotary_of(window.positions, rotated, self.rope_base, projected))
        if self.has_kernels and kernels_compute(projected):
            from powernap.model.mixers.rotary_kernel import Norms, unpack

            norms = None
            if self.qk_norm:
                norms = Norms(layer.q_norm.multiplier(), layer.k_norm.multiplier(), layer.q_norm.eps)
            query, gate, key, value = unpack(projected, tables, queries, gates, norms)
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return query, gate if gates else None, key, value
        # split, not indexing: the backward of n slices would fill n gradients of the full size
        turned, value = projected.split([queries + gates + 1, 1], dim=-2)
        gate = None
        if gates or self.qk_norm:
            query, gate, key = turned.split([queries, gates, 1], dim=-2)
            gate = gate.flatten(2, 3) if gates else None
            if self.qk_norm:
                query, key = layer.q_norm(query), layer.k_norm(key)
            turned = torch.cat([query, key], dim=-2)
        if tables is not None and rotated == width:
            turned = rotate(turned, *tables)
        elif tables is not None:
            turned = torch.cat([rotate(turned[..., :rotated], *tables), turned[..., rotated:]], dim=-1)
        query, key = turned.split([queries, 1], dim=-2)
        query, key, value = (x.flatten(2, 3).permute(1, 2, 0, 3) for x in (query, key, value))
        return query, gate, key, value

    def mask(self, window: Window, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """Which of the keys each query sees, the last of them being its own; None: causal, all keys are the queries'."""
        return window.attention_mask

    def _attend(
        self,
        layer: MixerModule,
        query: torch.Tensor,
        gate: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: Window,
    ) -> torch.Tensor:
        """query [B, heads/TP, L, width], gate [L, B, heads/TP, width], keys and values [B, groups/TP, n+L, width] ->
        [L, B, D]."""
        import torch.nn.functional as F

        mask = self.mask(window, query.shape[2], keys.shape[2], query.device)
        context = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=self.groups < self.heads
        )
        context = context.permute(2, 0, 1, 3)
        if gate is not None:
            context = context * gate.sigmoid()
        output, _ = layer.out_proj(context.flatten(2))
        return output
