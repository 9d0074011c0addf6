"""FLA's kernels beside its recurrences, each behind one function; *_kernel.py are our own. Imported where kernels compute alone:
it takes seconds.

torch.compile leaves them alone: FLA launches Triton kernels in ways that it would have to follow.
"""

import torch
from fla.modules.norm.layernorm import rms_norm
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.kda import chunk_kda

from powernap.model.mixers.conv_kernel import Unpacked


@torch.compiler.disable
def norm_of_sum(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of residual + x, that sum)."""
    return rms_norm(x, weight, None, residual, eps=eps, prenorm=True)


def gated_delta_rule(
    parts: Unpacked,
    state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    allow_neg_eigval: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Recurrence` from raw gates: q and k of G heads for H heads of values, g = -exp(A_log) softplus(alpha + dt_bias)."""
    gates = parts.alpha.squeeze(-1), parts.beta
    return _from_raw_gates(chunk_gated_delta_rule, parts, gates, state, A_log, dt_bias, scale, allow_neg_eigval)


def kimi_delta_rule(
    parts: Unpacked,
    state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    allow_neg_eigval: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_delta_rule` with a decay for every channel of the keys; dt_bias [H, K]."""
    gates = parts.alpha, parts.beta
    return _from_raw_gates(chunk_kda, parts, gates, state, A_log, dt_bias.flatten(), scale, allow_neg_eigval)


def _from_raw_gates(rule, parts: Unpacked, gates, state, A_log, dt_bias, scale, allow_neg_eigval):
    return rule(
        parts.q, parts.k, parts.v, *gates, scale=scale, initial_state=state, output_final_state=True,
        use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
