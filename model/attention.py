"""Causal self-attention over one window, tensor-parallel over heads."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from powernap.model.window import Window


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
        qkv, _ = self.qkv_proj(hidden_states)
        length, batch, _ = qkv.shape
        qkv = qkv.view(length, batch, self.local_heads, 3 * self.head_dim)
        queries_keys, value = qkv.split([2 * self.head_dim, self.head_dim], dim=-1)
        queries_keys = rotate(queries_keys.unflatten(-1, (2, self.head_dim)), *window.rotary)
        query, key = queries_keys.unbind(-2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, H, L, head_dim]
        mask = window.attention_mask
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        output, _ = self.out_proj(context.permute(2, 0, 1, 3).reshape(length, batch, -1))
        return output


def rotary_tables(length: int, head_dim: int, base: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [L, 1, 1, 1, head_dim] of the rotary position embedding (arXiv 2104.09864), positions from 0."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype, device=like.device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, None, None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim/2) of x [L, B, H, 2, head_dim] by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask_without(valid: torch.Tensor) -> torch.Tensor:
    """Causal mask [B, 1, L, L] that hides padded keys; valid [B, L] is False at pads.

    A pad may see itself: a row that sees nothing would be a softmax over nothing, NaN.
    """
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)
    return (causal & (valid[:, None, :] | itself)).unsqueeze(1)
