"""The gated-delta-net mixer (arXiv 2412.06464), tensor-parallel over heads; takes and returns its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from powernap.model.mixers.recurrent import RecurrentMixer, draw_step
from powernap.model.part import FP32, Device, Weight, even_chunk

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.mixers.recurrent import Recurrence
    from powernap.model.window import Window

# Initial ranges of -d(log alpha)/dt and of the step size dt, drawn log-uniformly per head: half-lives from about a
# hundred to about seven thousand tokens. The first pass's writes must survive the passes that follow.
DECAY_RANGE = (1.0, 4.0)
STEP_RANGE = (0.0001, 0.002)
MIN_NORM = 1e-12  # as in torch.nn.functional.normalize

# Longest chunk of the delta rule's chunked form. Work inside a chunk grows with the square of its length, the loop over
# chunks costs Python time; benchmarks/delta_rule.py measured the balance.
MAX_CHUNK = 32
FLA_CHUNK = 64  # tokens in a chunk of FLA's kernel


class GatedDeltaNet(RecurrentMixer):
    """q, k, v, gate z, write strength beta and decay alpha from one head-major projection.

    Per head of keys the projection's rows are [q | k | v | z | beta | alpha], the last four of each of its heads of values,
    so a tensor-parallel shard is a plain slice of rows: the same initial weights at every degree of tensor parallelism, no
    reordering in checkpoints.
    """

    letter: ClassVar[str] = "G"
    title: ClassVar[str] = "gated delta net"
    section: ClassVar[str] = "gdn"
    has_kernels: ClassVar[bool] = True  # for its convolution, gates and norm; FLA's for the rule it has anyway
    gate_activation: ClassVar[Literal["silu", "sigmoid"]] = "silu"  # of `gate`, as FLA names it

    heads: int = Field(ge=1, description="heads of values, each with fast weights of its own")
    key_heads: int | None = Field(
        None, ge=1, description="heads of queries and keys, each for heads / key_heads heads of values; null: heads"
    )
    key_dim: int = Field(ge=1, description="d_k, rows of a head's fast weights")
    value_dim: int = Field(ge=1, description="d_v, columns of a head's fast weights")
    allow_neg_eigval: bool = Field(
        False, description="beta from 0 to 2, not 1: a write may flip the sign of what k recalls (arXiv 2411.12537)"
    )

    scale_queries: bool = Field(
        False, description="queries divided by sqrt(key_dim), as in open models: the norm after them has an epsilon"
    )
    l2_eps: float = Field(
        0.0, ge=0, lt=1, description="epsilon of the L2 norm of queries and keys, inside the root; open models: 1e-6"
    )

    norm_eps: float | None = Field(None, gt=0, description="epsilon of the output's norm; null: model.norm_eps")

    def norm_epsilon(self, model: ModelConfig) -> float:
        return self.norm_eps or model.norm_eps

    def check(self, model: ModelConfig) -> None:
        if self.heads % self.groups:
            raise ValueError(f"{self.section}.key_heads={self.groups} must divide {self.section}.heads={self.heads}")

    @property
    def groups(self) -> int:
        """Heads of queries and keys."""
        return self.key_heads or self.heads

    @property
    def _values(self) -> int:
        """Heads of values for each head of keys."""
        return self.heads // self.groups

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.value_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        return self.groups, self._channels

    @property
    def _channels(self) -> int:
        """Channels of q, k and v of a head of keys."""
        return 2 * self.key_dim + self._values * self.value_dim

    @property
    def decays(self) -> int:
        """Number of decays alpha per head."""
        return 1

    def split_sizes(self) -> dict[str, int]:
        return {"heads": self.heads} | ({"key_heads": self.groups} if self.key_heads else {})

    def weights(self, model: ModelConfig) -> list[Weight]:
        rows = self.groups * self._channels + self.heads * (self.value_dim + 1 + self.decays)
        values = [self._values * size for size in (self.value_dim, self.value_dim, 1, self.decays)]
        projections = (self.key_dim, self.key_dim, *values)
        return [
            Weight("in_proj.weight", (rows, model.hidden_size), split=0, projections=projections),
            Weight("out_proj.weight", (model.hidden_size, self.heads * self.value_dim), split=1),
            Weight("conv_weight", (*self.conv_shape, self.conv_kernel), split=0, draw=draw_taps),
            Weight("A_log", (self.heads,), split=0, draw=_draw_decay, float32=True),
            Weight("dt_bias", (self.heads,), split=0, draw=lambda shape: draw_step(shape, *STEP_RANGE), float32=True),
            Weight("norm.weight", (self.value_dim,)),
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """Projections, convolution, and the chunked delta rule with chunks of C tokens (delta_rule.py).

        Per head and token the rule takes k k^T 2 C d_k, the triangular solve C (d_k + d_v), two products with the state
        4 d_k d_v; and for its output q k^T 2 C d_k, scores times u 2 C d_v, one more product with the state 2 d_k d_v.
        """
        d_k, d_v, chunk = self.key_dim, self.value_dim, even_chunk(model.window, MAX_CHUNK)
        channels = self.groups * self._channels
        before = 2 * model.hidden_size * (channels + self.heads * (d_v + 2)) + 2 * self.conv_kernel * channels
        write = 2 * chunk * d_k + chunk * (d_k + d_v) + 4 * d_k * d_v
        if state_only:
            return before + self.heads * write
        read = 2 * chunk * (d_k + d_v) + 2 * d_k * d_v
        return before + self.heads * (write + read + 2 * model.hidden_size * d_v)

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Per head: projection, convolution before and after SiLU, the delta rule, gate and norm.

        On a CPU the tensors that torch saves, as the tests measure. On CUDA in bf16 taken from the sources (chunk.py of FLA's
        gated_delta_rule saves q, k, v, a 64 x 64 matrix per chunk, g and beta before and after their functions; the norm
        its input and the gate), not measured.
        """
        d_k, d_v, is_bf16 = self.key_dim, self.value_dim, number < FP32
        projected = number * self.numbers_projected(model)
        if device == "cuda" and is_bf16 and self.has_kernels:
            rows = 2 * self.groups * self._channels + self.heads * (d_v + 2)  # the projection, and its q, k and v again
            kept = number * (rows + self.heads * FLA_CHUNK) + self.heads * 4 * FP32
            return kept + (0 if state_only else self.heads * (3 * d_v * number + FP32))
        if device == "cuda" and is_bf16:
            rule = number * (4 * d_k + d_v + FLA_CHUNK) + 11 * FP32
            return projected + self.heads * (rule + (0 if state_only else 5 * d_v * number))
        chunk = even_chunk(model.window, MAX_CHUNK)
        write = FP32 * (4 * chunk + 5 * d_k + 2 * d_v + d_k * d_v / chunk + 11) + (FP32 * d_v if is_bf16 else 0)
        if state_only:
            return projected + self.heads * write
        read = FP32 * (2 * chunk + 4 * d_k) + (14 if is_bf16 else 5 * FP32) * d_v
        return projected + self.heads * (write + read)

    def numbers_projected(self, model: ModelConfig) -> int:
        """Per token: the projection, the convolution before and after SiLU."""
        return 3 * self.groups * self._channels + self.heads * (self.value_dim + 2)

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
        from powernap.model.mixers.fla import kernels_compute

        if self.has_kernels and window.positions.length > 1 and kernels_compute(hidden_states):
            assert state is not None
            return self.mix_in_kernels(layer, hidden_states, state, window, need_output)
        return super().forward(layer, hidden_states, state, window, need_output)

    def mix(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool,
        conv_state: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """hidden_states [L, B, D], state [B, heads/TP, d_k, d_v] -> (output [L, B, D] or None, new state, seen)."""
        d_k, d_v, values = self.key_dim, self.value_dim, self._values
        projected, _ = layer.in_proj(hidden_states)
        length, batch, _ = projected.shape
        projected = projected.view(length, batch, self.groups // layer.tp_size, -1)
        sizes = [self._channels, values * d_v, values, values * self.decays]
        qkv, z, beta, alpha = projected.split(sizes, dim=-1)
        (q, k, v), seen = self.features(layer, hidden_states, qkv, window, conv_state)
        q, k = self.normalize(q), self.normalize(k)
        if self.scale_queries:
            q = q * d_k**-0.5
        if values > 1:
            q, k = (x.repeat_interleave(values, dim=2) for x in (q, k))
            v, z, beta, alpha = (x.unflatten(-1, (values, -1)).flatten(2, 3) for x in (v, z, beta, alpha))
        beta, g = self.write_strength(beta.squeeze(-1).to(state.dtype)), self.log_decay(layer, alpha.to(state.dtype))
        if window.padding_mask is not None:
            padding_mask = window.padding_mask.unsqueeze(-1)
            beta, g = beta * padding_mask, g * padding_mask.view(*padding_mask.shape, *[1] * (g.dim() - 3))
        layer.watch_gates(window, g.flatten(2), beta)
        q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
        output, state = self.rule(q, k, v, g, beta, state, need_output)
        if not need_output:
            return None, state, seen
        assert output is not None
        output = layer.norm(output.transpose(0, 1)) * self.gate(z)
        output, _ = layer.out_proj(output.reshape(length, batch, -1))
        return output, state, seen

    def mix_in_kernels(
        self, layer: MixerModule, hidden_states: torch.Tensor, state: torch.Tensor, window: Window, need_output: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`mix` of a whole window in 12 kernels on the way forward, where torch takes 42."""
        import torch

        from powernap.model.mixers.conv_kernel import unpack

        projected, _ = layer.in_proj(hidden_states)
        projected = projected.unflatten(-1, (self.groups // layer.tp_size, -1))
        parts = unpack(projected, layer.conv_weight, window.padding_mask, self.key_dim, self.value_dim, self.l2_eps)
        if layer.gates is not None:
            with torch.no_grad():
                g, beta = self.log_decay(layer, parts.alpha), self.write_strength(parts.beta)
                layer.watch_gates(window, *(x.transpose(0, 1) for x in (g.flatten(2), beta)))
        gates = layer.in_float32("A_log"), layer.in_float32("dt_bias")
        output, state = self.rule_with_gates(parts, state, *gates, self.query_scale, self.allow_neg_eigval)
        if not need_output:
            return None, state
        output = layer.norm.gated(output, parts.z, self.gate_activation)
        output, _ = layer.out_proj(output)
        return output, state

    @property
    def rule_with_gates(self) -> Callable:
        from powernap.model.mixers.kernels import gated_delta_rule

        return gated_delta_rule

    @property
    def query_scale(self) -> float:
        return self.key_dim**-0.5 if self.scale_queries else 1.0

    def features(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        qkv: torch.Tensor,
        window: Window,
        conv_state: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """qkv [L, B, groups/TP, channels] -> (q, k, v of each head of keys, [conv_state, inputs] of the convolution)."""
        import torch.nn.functional as F

        convolved, seen = self.convolve(layer, qkv, window, conv_state)
        sizes = [self.key_dim, self.key_dim, self._values * self.value_dim]
        return list(F.silu(convolved).split(sizes, dim=-1)), seen

    def write_strength(self, beta: torch.Tensor) -> torch.Tensor:
        """I - beta k k^T has the eigenvalue 1 - beta."""
        return 2 * beta.sigmoid() if self.allow_neg_eigval else beta.sigmoid()

    def log_decay(self, layer: MixerModule, alpha: torch.Tensor) -> torch.Tensor:
        """g = -exp(A_log) softplus(alpha + dt_bias); alpha [L, B, heads/TP, decays] -> [L, B, heads/TP]."""
        import torch.nn.functional as F

        step = F.softplus(alpha.squeeze(-1) + layer.in_float32("dt_bias").to(alpha.dtype))
        return -layer.in_float32("A_log").to(alpha.dtype).exp() * step

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(|x|^2 + l2_eps) over the last dimension. A norm in bf16 would leave |k|^2 off by up to 0.8 %."""
        import torch

        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        if not self.l2_eps:
            return (x / norm.clamp_min(MIN_NORM)).to(x.dtype)
        return (x * torch.rsqrt(norm.square() + self.l2_eps)).to(x.dtype)

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        return F.silu(z)

    @property
    def rule(self) -> Recurrence:
        from powernap.model.mixers.delta_rule import gated_delta_rule

        return gated_delta_rule


def draw_taps(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    taps = torch.randn(shape) / (2 * math.sqrt(shape[-1]))
    taps[..., -1] += 0.5
    return taps


def _draw_decay(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.empty(shape).uniform_(*map(math.log, DECAY_RANGE))
