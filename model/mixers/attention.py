"""Causal self-attention over one window, or over a sliding one, tensor-parallel over heads."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from powernap.model.window import Reading, Window


class WindowAttention(MegatronModule):
    """Multi-head attention that sees its own window only: keys and values are computed anew in every pass.

    The fused projection is head-major, per head [q | k | v], so a tensor-parallel shard is a plain slice of rows and
    the weights at the start do not depend on the number of shards.
    """

    def __init__(self, config, layer_number, pg_collection):
        super().__init__(config)
        self.layer_number = layer_number
        self.head_dim = config.kv_channels
        self.local_heads = config.num_attention_heads // pg_collection.tp.size()
        width = config.num_attention_heads * self.head_dim
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            3 * width,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=pg_collection.tp,
        )
        self.out_proj = RowParallelLinear(
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_states: torch.Tensor, window: Window) -> torch.Tensor:
        """hidden_states [L, B, D] -> [L, B, D]."""
        return self._attend(*self._project(hidden_states, window), window)

    def first_reading(self, batch: int, slots: int, like: torch.Tensor) -> Reading:
        """An empty cache with room for `slots` tokens, those of the window and those before that are still seen."""
        return {"keys_values": like.new_zeros((batch, 2, self.local_heads, slots, self.head_dim))}

    def extend(self, hidden_states: torch.Tensor, reading: Reading, window: Window) -> torch.Tensor:
        """Read a piece of a window: hidden_states [n, B, D] -> [n, B, D]; its keys and values are written to the cache."""
        query, key, value = self._project(hidden_states, window)
        cache = reading["keys_values"]
        new = torch.stack([key, value], dim=1)
        cache.scatter_(3, window.slots[:, None, None, :, None].expand_as(new), new)
        keys, values = cache[:, :, :, : window.attention_mask.shape[-1]].unbind(1)
        return self._attend(query, keys, values, window)

    def _project(self, hidden_states: torch.Tensor, window: Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, both rotated, and values: [L, B, D] -> three [B, heads/TP, L, head_dim]."""
        qkv, _ = self.qkv_proj(hidden_states)
        length, batch, _ = qkv.shape
        qkv = qkv.view(length, batch, self.local_heads, 3 * self.head_dim)
        queries_keys, value = qkv.split([2 * self.head_dim, self.head_dim], dim=-1)
        queries_keys = rotate(queries_keys.unflatten(-1, (2, self.head_dim)), *window.rotary)
        query, key = queries_keys.unbind(-2)
        return tuple(x.permute(1, 2, 0, 3) for x in (query, key, value))

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: Window) -> torch.Tensor:
        """query [B, heads/TP, L, head_dim], keys and values [B, heads/TP, n+L, head_dim] -> [L, B, D]."""
        mask = window.attention_mask
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        output, _ = self.out_proj(context.permute(2, 0, 1, 3).flatten(2))
        return output


class SlidingAttention(WindowAttention):
    """Attention that also sees the cached keys and values of earlier windows, as far back as L-1 tokens.

    Args:
        block: its index in the whole model, to know which of a window's passes is its last.
        reach: L, tokens a query sees with its own; L-1 of them stay in the cache.
    """

    def __init__(self, config, layer_number, pg_collection, block: int, reach: int):
        super().__init__(config, layer_number, pg_collection)
        self.block = block
        self.reach = reach

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: torch.Tensor,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """hidden_states [L, B, D], cache [2, B, heads/TP, n, head_dim] -> (output [L, B, D] or None, cache).

        The cache changes in the block's last pass over the window only: all passes see the same earlier tokens.
        """
        query, key, value = self._project(hidden_states, window)
        seen = torch.cat([cache, torch.stack([key, value])], dim=3)
        output = self._attend(query, *seen, window) if need_output else None
        if self.block in window.final_blocks:
            kept = min(self.reach - 1, seen.shape[3])
            cache = seen[..., seen.shape[3] - kept :, :].contiguous()  # a view would keep alive what is evicted
        return output, cache


def rotary_tables(
    length: int, head_dim: int, base: float, like: torch.Tensor, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, 1, 1, 1, head_dim] of the rotary position embedding (arXiv 2104.09864), from `start` on."""
    # Position 2^20 times a float32 frequency is an angle off by 0.06.
    dtype = torch.float64 if start or like.dtype == torch.float64 else torch.float32
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    angles = torch.outer(torch.arange(start, start + length, dtype=dtype, device=like.device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim/2) of x [L, B, H, 2, head_dim] by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def sliding_mask(length: int, cached: int, reach: int, device: torch.device) -> torch.Tensor:
    """What each query of a window sees of the cached keys and its own window: itself and up to reach-1 before.

    Returns:
        [L, n+L], True where seen.
    """
    queries, keys = (torch.arange(start, cached + length, device=device) for start in (cached, 0))
    distance = queries[:, None] - keys
    return (distance >= 0) & (distance < reach)


def hide_pads(mask: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mask [B, 1, L, n+L] without padded keys; mask [L, n+L], valid [B, n+L] is False at pads.

    A pad may see itself: a row that sees nothing would be a softmax over nothing, NaN.
    """
    length, keys = mask.shape
    itself = torch.ones_like(mask).triu(keys - length).tril(keys - length)
    return (mask & (valid[:, None, :] | itself)).unsqueeze(1)
