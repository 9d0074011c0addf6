"""Mamba-2 (state space duality, arXiv 2405.21060): its fast weights are the SSM states, one matrix per head.

With S_t in R^{N x P}, per head, for input x_t, input and output maps B_t and C_t that a group of heads shares, and step
size dt_t:

    S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

which is equation 3 of arXiv 2605.26099. In a gated delta net's notation: k = B, v = x, q = C, g = -A dt, beta = dt,
without the delta rule's correction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from powernap.model.mixers.recurrent import Recurrence, RecurrentMixer, draw_step
from powernap.model.part import FP32, Device, Weight, even_chunk

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window

# Initial ranges of the reference (state-spaces/mamba, modules/mamba2.py: A_init_range, dt_min and dt_max).
A_RANGE = (1.0, 16.0)
STEP_RANGE = (0.001, 0.1)

MAX_CHUNK = 32  # longest chunk of the chunked form, as in the delta rule
FLA_CHUNK = 64  # tokens in a chunk of FLA's kernel


class Mamba2(RecurrentMixer):
    """x, B, C, gate z and step size dt from one projection.

    Per group its rows are [x | B | C | z | dt], so a tensor-parallel shard of whole groups is a plain slice.
    """

    letter: ClassVar[str] = "M"
    title: ClassVar[str] = "Mamba-2"
    section: ClassVar[str] = "mamba2"

    heads: int = Field(ge=1, description="heads")
    head_dim: int = Field(ge=1, description="P, columns of a head's fast weights")
    state_dim: int = Field(ge=1, description="N, rows of a head's fast weights")
    groups: int = Field(1, ge=1, description="groups of heads, each with one B and C; tensor ranks split them")

    def check(self, model: ModelConfig) -> None:
        if self.heads % self.groups:
            raise ValueError(f"mamba2.groups={self.groups} must divide mamba2.heads={self.heads}")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.state_dim, self.head_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        return self.groups, self._channels

    @property
    def _width(self) -> int:
        """Channels of a group's x, over all its heads."""
        return self.heads // self.groups * self.head_dim

    @property
    def _channels(self) -> int:
        """Channels of a group's x, B and C."""
        return self._width + 2 * self.state_dim

    def split_sizes(self) -> dict[str, int]:
        return {"groups": self.groups}

    def weights(self, model: ModelConfig) -> list[Weight]:
        rows = self.groups * (self._channels + self._width) + self.heads
        channels = (self.groups, self._channels)
        return [
            Weight("in_proj.weight", (rows, model.hidden_size), split=0),
            Weight("out_proj.weight", (model.hidden_size, self.groups * self._width), split=1),
            Weight("conv_weight", (*channels, self.conv_kernel), split=0, draw=self._draw_taps),
            Weight("conv_bias", channels, split=0, draw=self._draw_taps),
            Weight("A_log", (self.heads,), split=0, draw=_draw_decay, float32=True),
            Weight("dt_bias", (self.heads,), split=0, draw=lambda shape: draw_step(shape, *STEP_RANGE), float32=True),
            Weight("D", (self.heads,), split=0, draw=_ones),
            Weight("norm_weight", (self.groups, self._width), split=0, draw=_ones),
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Projections, convolution, and the chunked form with chunks of C tokens: per head 2 N P for the new state; for
        the output 2 C N per group for C B^T, and per head 2 C P for the chunk's inputs, 2 N P for its first state."""
        n, p, chunk = self.state_dim, self.head_dim, even_chunk(model.window, MAX_CHUNK)
        projection = 2 * model.hidden_size * (self.groups * (self._channels + self._width) + self.heads)
        convolution = 2 * self.conv_kernel * self.groups * self._channels
        write = self.heads * 2 * n * p
        if state_only:
            return projection + convolution + write
        read = self.groups * 2 * chunk * n + self.heads * (2 * chunk * p + 2 * n * p)
        return projection + convolution + write + read + 2 * model.hidden_size * self.groups * self._width

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Projection, convolution before SiLU, the chunked form, gate and norm.

        On a CPU the tensors that torch saves, as the tests measure. On CUDA in bf16 taken from FLA's source (chunk.py
        of simple_gla saves q, k, v and g), not measured.
        """
        groups, heads, n, is_bf16 = self.groups, self.heads, self.state_dim, number < FP32
        x = heads * self.head_dim
        projected = number * (groups * (2 * self._channels + self._width) + heads)
        gated = (5 if is_bf16 else 4) * number * x + FP32 * (x + groups)
        if device == "cuda" and is_bf16:
            write: float = number * (2 * heads * n + x) + FP32 * (x + 3 * heads)
            return projected + write + (0 if state_only else gated)
        chunk = even_chunk(model.window, MAX_CHUNK)
        states = heads * n * self.head_dim / chunk
        write = FP32 * (3 * x + heads * n + states + 3 * heads)
        if state_only:
            return projected + write
        read = FP32 * (2 * x + heads * n + states + heads + 2 * heads * chunk + groups * (chunk + 2 * n))
        return projected + write + read + gated

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        from powernap.model.mixers.fla import check_fla

        check_fla(dtype, device, "model.mamba2.state_dim", self.state_dim)

    def mix(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool,
        conv_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """hidden_states [L, B, D], state [B, heads/TP, N, P] -> (output [L, B, D] or None, new state, seen)."""
        import torch.nn.functional as F

        projected, _ = layer.in_proj(hidden_states)
        length, batch, _ = projected.shape
        projected = projected.view(length, batch, self.groups // layer.tp_size, -1)
        xbc, z, step = projected.split([self._channels, self._width, self.heads // self.groups], dim=-1)
        convolved, seen = self.convolve(layer, xbc, window, conv_state)
        convolved = convolved + layer.conv_bias.to(convolved.dtype)
        x, b, c = F.silu(convolved).split([self._width, self.state_dim, self.state_dim], dim=-1)
        x = x.reshape(length, batch, -1, self.head_dim)
        step = F.softplus(step.flatten(2).to(state.dtype) + layer.in_float32("dt_bias").to(state.dtype))
        if window.padding_mask is not None:
            step = step * window.padding_mask.unsqueeze(-1)
        g = -layer.in_float32("A_log").to(state.dtype).exp() * step
        layer.watch_gates(window, g, step)
        q, k, v, g, beta = (t.transpose(0, 1) for t in (c, b, x, g, step))
        output, state = ssd(q, k, v, g, beta, state, need_output)
        if not need_output:
            return None, state, seen
        assert output is not None
        output = output.transpose(0, 1) + layer.D.to(x.dtype).unsqueeze(-1) * x
        output = F.rms_norm(output.reshape(z.shape) * F.silu(z), (self._width,), eps=layer.config.layernorm_epsilon)
        output, _ = layer.out_proj((output * layer.norm_weight.to(output.dtype)).flatten(2))
        return output, state, seen

    def _draw_taps(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Initial weight and bias, as torch's Conv1d draws them."""
        import torch

        bound = 1 / math.sqrt(self.conv_kernel)
        return torch.empty(shape).uniform_(-bound, bound)


def sequential_ssd(q, k, v, g, beta, state, need_output: bool = True):
    """By token: S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t. As `Recurrence`; q, k [B, T, G, N]."""
    import torch

    dtype, heads_per_group = v.dtype, v.shape[2] // q.shape[2]
    q, k = (x.to(state.dtype).repeat_interleave(heads_per_group, dim=2) for x in (q, k))
    v, g, beta = (x.to(state.dtype) for x in (v, g, beta))
    outputs = []
    for t in range(q.shape[1]):
        written = torch.einsum("bhn,bhp->bhnp", k[:, t], beta[:, t, :, None] * v[:, t])
        state = g[:, t, :, None, None].exp() * state + written
        if need_output:
            outputs.append(torch.einsum("bhn,bhnp->bhp", q[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype) if need_output else None, state


def chunked_ssd(q, k, v, g, beta, state, need_output: bool = True, max_chunk: int = MAX_CHUNK):
    """The same result chunk by chunk with matrix products (arXiv 2405.21060, section 6).

    Inside a chunk of C tokens let gamma_i = sum_{j<=i} g_j and D_ij = exp(gamma_i - gamma_j) for j <= i. With u = beta v

        o = exp(gamma) q S + (q k^T * D) u,   S' = exp(gamma_C) S + k^T (exp(gamma_C - gamma) u).

    All but the two products with S are computed for all chunks at once. Arguments as in `Recurrence`.
    """
    import torch
    import torch.nn.functional as F

    from powernap.model.mixers.delta_rule import running_sum

    batch, length, groups, _ = q.shape
    dtype = v.dtype
    chunk = even_chunk(length, max_chunk)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def to_chunks(x: torch.Tensor) -> torch.Tensor:  # [B, T, G * h, ...] -> [chunks, B, G, h, C, ...]
        x = x.to(state.dtype)
        if padding:  # g = beta = 0: a padded token neither decays nor writes
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        return x.unflatten(2, (groups, -1)).unflatten(1, (num_chunks, chunk)).movedim((1, 2), (0, 4))

    k, g = to_chunks(k), to_chunks(g)  # k: one for all heads of a group
    u = to_chunks(beta).unsqueeze(-1) * to_chunks(v)
    gamma = running_sum(g)
    total = gamma[..., -1:]
    u_to_end = u * (total - gamma).exp().unsqueeze(-1)
    whole = total.exp().unsqueeze(-1)
    k_t = k.transpose(-1, -2)
    if need_output:
        q = to_chunks(q)
        causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        # -inf before exp, not zero after it: above the diagonal the difference is positive and may overflow
        decay = (gamma.unsqueeze(-1) - gamma.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
        inside = ((q @ k_t) * decay) @ u
        from_start = gamma.exp().unsqueeze(-1)

    states = []  # at the start of each chunk
    heads = state.unflatten(1, (groups, -1))
    for written, decay_all in zip((k_t @ u_to_end).unbind(0), whole.unbind(0), strict=True):
        states.append(heads)
        heads = decay_all * heads + written
    state = heads.flatten(1, 2)
    if not need_output:
        return None, state
    output = inside + from_start * (q @ torch.stack(states))
    output = output.movedim((0, 4), (1, 2)).flatten(1, 2).flatten(2, 3)  # [B, T, H, P]
    return output[:, :length].to(dtype), state


def _fla(q, k, v, g, beta, state):
    """FLA 0.6.0's simple_gla: q, k, v of one dtype, one q and k per head; g and the state in float32."""
    from fla.ops.simple_gla import chunk_simple_gla  # imported late: it takes seconds

    heads_per_group = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(heads_per_group, dim=2) for x in (q, k))
    u = (beta.float().unsqueeze(-1) * v.float()).to(v.dtype)
    return chunk_simple_gla(q, k, u, g.float(), scale=1.0, initial_state=state.float(), output_final_state=True)


ssd = Recurrence(sequential_ssd, chunked_ssd, _fla)


def _draw_decay(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.empty(shape).uniform_(*A_RANGE).log()


def _ones(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.ones(shape)
