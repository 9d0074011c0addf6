"""The gated-delta-net mixer (arXiv 2412.06464), tensor-parallel over heads, with its state going in and out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from powernap.model.part import FP32, Cache, Device, Mixer, Weight, even_chunk

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window

# Range of -d(log alpha)/dt and of the step size dt at the start, drawn log-uniformly per head: half-lives from about a
# hundred to about seven thousand tokens. What the first pass wrote must outlive the N passes that follow.
DECAY_RANGE = (1.0, 4.0)
STEP_RANGE = (0.0001, 0.002)

# Longest chunk of the delta rule's chunked form. Inside a chunk work grows with the square of its length, between chunks
# the loop costs Python time; benchmarks/delta_rule.py measured the balance.
MAX_CHUNK = 32
FLA_CHUNK = 64  # tokens in a chunk of FLA's kernel


class GatedDeltaNet(Mixer):
    """q, k, v, gate z, write strength beta and decay alpha from one head-major projection.

    Per head the projection's rows are [q | k | v | z | beta | alpha], so a tensor-parallel shard is a plain slice of
    rows: the same weights at the start for every degree of tensor parallelism, no reordering in checkpoints.
    """

    letter: ClassVar[str] = "G"
    title: ClassVar[str] = "gated delta net"
    section: ClassVar[str] = "gdn"

    heads: int = Field(ge=1, description="heads")
    key_dim: int = Field(ge=1, description="d_k, rows of a head's fast weights")
    value_dim: int = Field(ge=1, description="d_v, columns of a head's fast weights")
    conv_kernel: int = Field(4, ge=1, description="taps of the causal convolution before q, k and v")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.value_dim

    @property
    def _channels(self) -> int:
        """Of a head's q, k and v."""
        return 2 * self.key_dim + self.value_dim

    def split_sizes(self) -> dict[str, int]:
        return {"heads": self.heads}

    def weights(self, model: ModelConfig) -> list[Weight]:
        rows = self.heads * (self._channels + self.value_dim + 2)
        return [
            Weight("in_proj.weight", (rows, model.hidden_size), split=0),
            Weight("out_proj.weight", (model.hidden_size, self.heads * self.value_dim), split=1),
            Weight("conv_weight", (self.heads, self._channels, self.conv_kernel), split=0, draw=_draw_taps),
            Weight("A_log", (self.heads,), split=0, draw=_draw_decay),
            Weight("dt_bias", (self.heads,), split=0, draw=_draw_step),
            Weight("norm.weight", (self.value_dim,)),
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Projections, convolution, and the chunked delta rule with chunks of C tokens (delta_rule.py).

        Per head and token the rule takes k k^T 2 C d_k, the triangular solve C (d_k + d_v), two products with the state
        4 d_k d_v; and for its output q k^T 2 C d_k, scores times u 2 C d_v, one more product with the state 2 d_k d_v.
        """
        d_k, d_v, chunk = self.key_dim, self.value_dim, even_chunk(model.window, MAX_CHUNK)
        projection = 2 * model.hidden_size * (self._channels + d_v + 2)
        convolution = 2 * self.conv_kernel * self._channels
        write = 2 * chunk * d_k + chunk * (d_k + d_v) + 4 * d_k * d_v
        if state_only:
            return self.heads * (projection + convolution + write)
        read = 2 * chunk * (d_k + d_v) + 2 * d_k * d_v
        return self.heads * (projection + convolution + write + read + 2 * model.hidden_size * d_v)

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Of each head: projection, convolution before and after SiLU, the delta rule, gate and norm.

        For a CPU counted from what torch keeps, which the tests measure. For CUDA in bf16 read off FLA's source (chunk.py of
        gated_delta_rule keeps q, k, v, g, beta and a 64 x 64 matrix a chunk), and not measured.
        """
        d_k, d_v, is_bf16 = self.key_dim, self.value_dim, number < FP32
        projected = number * ((self._channels + d_v + 2) + 2 * self._channels)
        if device == "cuda" and is_bf16:
            rule = number * (self._channels + 2 * d_k + FLA_CHUNK) + 11 * FP32
            return self.heads * (projected + rule + (0 if state_only else 5 * d_v * number))
        chunk = even_chunk(model.window, MAX_CHUNK)
        write = FP32 * (4 * chunk + 5 * d_k + 2 * d_v + d_k * d_v / chunk + 11) + (FP32 * d_v if is_bf16 else 0)
        if state_only:
            return self.heads * (projected + write)
        read = FP32 * (2 * chunk + 4 * d_k) + (14 if is_bf16 else 5 * FP32) * d_v
        return self.heads * (projected + write + read)

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        from powernap.model.mixers.fla import check_fla

        check_fla(dtype, device, f"model.{self.section}.key_dim", self.key_dim)

    def forward(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [L, B, D], state [B, heads/TP, d_k, d_v] -> (output [L, B, D] or None, new state)."""
        assert state is not None
        output, state, _ = self._mix(layer, hidden_states, state, window, need_output)
        return output, state

    def init_cache(self, layer: MixerModule, batch: int, slots: int, like: torch.Tensor) -> Cache:
        """Fast weights of zero, and nothing before the window's first token for the convolution to see."""
        history = (batch, self.conv_kernel - 1, self.heads // layer.tp_size, self._channels)
        return {**super().init_cache(layer, batch, slots, like), "history": like.new_zeros(history)}

    def decode(self, layer: MixerModule, hidden_states: torch.Tensor, cache: Cache, window: Window) -> torch.Tensor:
        import torch

        history = cache["history"].transpose(0, 1)
        output, cache["state"], seen = self._mix(layer, hidden_states, cache["state"], window, history=history)
        assert output is not None
        history = seen[len(hidden_states) :].transpose(0, 1)
        cache["history"] = history.clone(memory_format=torch.contiguous_format)  # a view would keep the chunk alive
        return output

    def _mix(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool = True,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Output, new state, and what the convolution saw; `history` [taps-1, B, heads/TP, C] is what it saw before."""
        import torch
        import torch.nn.functional as F

        from powernap.model.mixers.conv import causal_conv
        from powernap.model.mixers.delta_rule import gated_delta_rule

        d_k, d_v = self.key_dim, self.value_dim
        projected, _ = layer.in_proj(hidden_states)
        length, batch, _ = projected.shape
        projected = projected.view(length, batch, self.heads // layer.tp_size, -1)
        qkv, z, beta, alpha = projected.split([self._channels, d_v, 1, 1], dim=-1)
        if window.valid is not None:  # the convolution must not carry a pad into the tokens after it
            qkv = qkv * window.valid[..., None, None]
        seen = qkv if history is None else torch.cat([history, qkv])
        convolved = causal_conv(seen, layer.conv_weight)[len(seen) - length :]
        q, k, v = F.silu(convolved).split([d_k, d_k, d_v], dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = beta.squeeze(-1).to(state.dtype).sigmoid()
        step = F.softplus(alpha.squeeze(-1).to(state.dtype) + layer.dt_bias.to(state.dtype))
        g = -layer.A_log.to(state.dtype).exp() * step
        if window.valid is not None:
            valid = window.valid.unsqueeze(-1)
            beta, g = beta * valid, g * valid
        layer.watch_gates(window, g, beta)
        q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
        output, state = gated_delta_rule(q, k, v, g, beta, state, need_output)
        if not need_output:
            return None, state, seen
        assert output is not None
        output = layer.norm(output.transpose(0, 1)) * F.silu(z)
        output, _ = layer.out_proj(output.reshape(length, batch, -1))
        return output, state, seen


def _draw_taps(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    taps = torch.randn(shape) / (2 * math.sqrt(shape[-1]))
    taps[..., -1] += 0.5
    return taps


def _draw_decay(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.empty(shape).uniform_(*map(math.log, DECAY_RANGE))


def _draw_step(shape: tuple[int, ...]) -> torch.Tensor:
    """The bias whose softplus is the step size."""
    import torch

    step = torch.empty(shape).uniform_(*map(math.log, STEP_RANGE)).exp()
    return step + torch.log(-torch.expm1(-step))
