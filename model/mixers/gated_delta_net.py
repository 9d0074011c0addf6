"""The gated-delta-net mixer (arXiv 2412.06464), tensor-parallel over heads, with its state going in and out."""

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule

from powernap.model.fast_weights import zero_state
from powernap.model.mixers.delta_rule import gated_delta_rule
from powernap.model.norm import RMSNorm
from powernap.model.window import Reading, Window

# Range of -d(log alpha)/dt and of the step size dt at the start, drawn log-uniformly per head: half-lives from about a
# hundred to about seven thousand tokens. What the first pass wrote must outlive the N passes that follow.
DECAY_RANGE = (1.0, 4.0)
STEP_RANGE = (0.0001, 0.002)


class GatedDeltaNet(MegatronModule):
    """q, k, v, gate z, write strength beta and decay alpha from one head-major projection.

    Per head the projection's rows are [q | k | v | z | beta | alpha], so a tensor-parallel shard is a plain slice of
    rows: the same weights at the start for every degree of tensor parallelism, no reordering in checkpoints.

    Args:
        block: its index in the whole model, to know which of a window's passes is its last.
        every_pass_writes: False: the state that comes out is the one that went in, but for the last pass over a window.
    """

    def __init__(self, config, layer_number, pg_collection, block: int, every_pass_writes: bool):
        super().__init__(config)
        self.layer_number = layer_number
        self.block = block
        self.every_pass_writes = every_pass_writes
        self.tp_group = pg_collection.tp
        self.key_dim = config.linear_key_head_dim
        self.value_dim = config.linear_value_head_dim
        heads = config.linear_num_value_heads
        self.local_heads = heads // self.tp_group.size()
        self.gate_means = None  # a list while someone watches: see model/health.py
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            heads * (2 * self.key_dim + 2 * self.value_dim + 2),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        self.out_proj = RowParallelLinear(
            heads * self.value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        taps = config.linear_conv_kernel_dim
        device = self.in_proj.weight.device
        own = slice(self.tp_group.rank() * self.local_heads, (self.tp_group.rank() + 1) * self.local_heads)
        # Drawn for all heads and sliced, as Megatron's layers do on the CPU: every shard draws the same numbers.
        conv = torch.randn(heads, 2 * self.key_dim + self.value_dim, taps) / (2 * math.sqrt(taps))
        conv[..., -1] += 0.5
        decay, step = (torch.empty(heads).uniform_(math.log(a), math.log(b)) for a, b in (DECAY_RANGE, STEP_RANGE))
        step = step.exp()
        self.conv_weight = torch.nn.Parameter(conv[own].to(device))
        self.A_log = torch.nn.Parameter(decay[own].to(device))
        self.dt_bias = torch.nn.Parameter((step + torch.log(-torch.expm1(-step)))[own].to(device))  # softplus^-1
        for parameter in (self.conv_weight, self.A_log, self.dt_bias):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        self.norm = HeadNorm(config, self.value_dim, self.tp_group)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """hidden_states [L, B, D], state [B, heads/TP, d_k, d_v] -> (output [L, B, D] or None, new state)."""
        output, written, _ = self._mix(hidden_states, state, window, need_output)
        return output, written if self.every_pass_writes or self.block in window.final_blocks else state

    def first_reading(self, batch: int, like: torch.Tensor) -> Reading:
        """Fast weights of zero, and nothing before the window's first token for the convolution to see."""
        channels = (self.local_heads, 2 * self.key_dim + self.value_dim)
        return {
            "state": zero_state(batch, self.local_heads, self.key_dim, self.value_dim, like),
            "history": like.new_zeros((batch, self.conv_weight.shape[-1] - 1, *channels)),
        }

    def extend(self, hidden_states: torch.Tensor, reading: Reading, window: Window) -> torch.Tensor:
        """Read a piece of a window: hidden_states [n, B, D] -> [n, B, D]; `reading` gets the new state and history."""
        history = reading["history"].transpose(0, 1)
        output, reading["state"], seen = self._mix(hidden_states, reading["state"], window, history=history)
        history = seen[len(hidden_states) :].transpose(0, 1)
        reading["history"] = history.clone(memory_format=torch.contiguous_format)  # a view would keep the piece alive
        return output

    def _mix(
        self,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool = True,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Output, new state, and what the convolution saw; `history` [taps-1, B, heads/TP, C] is what it saw before."""
        projected, _ = self.in_proj(hidden_states)
        length, batch, _ = projected.shape
        projected = projected.view(length, batch, self.local_heads, -1)
        qkv, z, beta, alpha = projected.split([2 * self.key_dim + self.value_dim, self.value_dim, 1, 1], dim=-1)
        if window.valid is not None:  # the convolution must not carry a pad into the tokens after it
            qkv = qkv * window.valid[..., None, None]
        seen = qkv if history is None else torch.cat([history, qkv])
        convolved = causal_conv(seen, self.conv_weight)[len(seen) - length :]
        q, k, v = F.silu(convolved).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = beta.squeeze(-1).to(state.dtype).sigmoid()
        step = F.softplus(alpha.squeeze(-1).to(state.dtype) + self.dt_bias.to(state.dtype))
        g = -self.A_log.to(state.dtype).exp() * step
        if window.valid is not None:
            valid = window.valid.unsqueeze(-1)
            beta, g = beta * valid, g * valid
        if self.gate_means is not None:
            self.gate_means.append(tuple(_mean_of_tokens(x, window.valid) for x in (g.detach().exp(), beta.detach())))
        output, state = gated_delta_rule(*(x.transpose(0, 1) for x in (q, k, v, g, beta)), state, need_output)
        if not need_output:
            return None, state, seen
        output = self.norm(output.transpose(0, 1)) * F.silu(z)
        output, _ = self.out_proj(output.reshape(length, batch, -1))
        return output, state, seen


class HeadNorm(RMSNorm):
    """RMSNorm within every head, one weight for all heads of all shards."""

    def __init__(self, config, value_dim, tp_group):
        super().__init__(config, value_dim, eps=config.layernorm_epsilon)
        self.tp_group = tp_group
        self.weight.sequence_parallel = False  # heads are split, not tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each shard sees its own heads, so its gradient of this shared weight is a part of the sum.
        weight = copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def _mean_of_tokens(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean of x [L, B, H] over everything but pads."""
    return x.mean() if valid is None else (x * valid.unsqueeze(-1)).sum() / (valid.sum() * x.shape[-1])


def causal_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise causal convolution along the tokens, from zero padding: x [L, B, H, C], weight [H, C, taps] -> as x."""
    return _CausalConv.apply(x, weight.to(x.dtype))


class _CausalConv(torch.autograd.Function):
    """A sum of shifted products: with time as the first dimension every shift is a contiguous slice.

    Several times faster on CPUs than conv1d's backward pass. Written by hand because autograd would fill a gradient of
    the full size for every slice.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        *earlier, now = weight.unbind(-1)
        output = x * now
        for shift, tap in _shifts(earlier, x):
            output[shift:].addcmul_(x[:-shift], tap)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        *earlier, now = weight.unbind(-1)
        of_x = gradient * now
        of_taps = [(gradient * x).sum((0, 1))]  # from the newest tap back
        for shift, tap in _shifts(earlier, x):
            of_x[:-shift].addcmul_(gradient[shift:], tap)
            of_taps.append((gradient[shift:] * x[:-shift]).sum((0, 1)))
        unused = [torch.zeros_like(now)] * (weight.shape[-1] - len(of_taps))  # taps that reach before the first token
        return of_x, torch.stack([*of_taps, *unused][::-1], dim=-1)


def _shifts(earlier: list[torch.Tensor], x: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(shift, tap) for the taps that look back, as far as the window reaches."""
    return [(shift, tap) for shift, tap in enumerate(reversed(earlier), start=1) if shift < len(x)]
