"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay for every channel of the keys.

With S_t in R^{d_k x d_v}, per head, and alpha_t in (0, 1)^{d_k} where the gated delta net has one number (eq. 1):

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

Layout of every form: q, k, g = log(alpha) [B, T, H, K], v [B, T, H, V], beta [B, T, H], state [B, H, K, V].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from powernap.model.mixers.gated_delta_net import FLA_CHUNK, MAX_CHUNK, GatedDeltaNet
from powernap.model.mixers.recurrent import Recurrence
from powernap.model.part import FP32, Device, Weight, even_chunk

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule


class KimiDeltaAttention(GatedDeltaNet):
    """A gated delta net with d_k decays per head, and a sigmoid for the output gate (eq. 10).

    Per head the projection's rows are [q | k | v | z | beta | alpha]. z and alpha are full-rank projections, where the
    paper has products of two low-rank ones. Step sizes are drawn per channel, in a gated delta net's range: a head has
    long memory in some channels and short memory in others.
    """

    letter: ClassVar[str] = "K"
    title: ClassVar[str] = "Kimi Delta Attention"
    section: ClassVar[str] = "kda"
    gate_activation: ClassVar[Literal["silu", "sigmoid"]] = "sigmoid"

    def check(self, model: ModelConfig) -> None:
        if self.key_heads:
            raise ValueError(
                f"{self.section}.key_heads={self.key_heads}: each head has queries and keys of its own here"
            )

    @property
    def decays(self) -> int:
        return self.key_dim

    def weights(self, model: ModelConfig) -> list[Weight]:
        by_channel = {"dt_bias": (self.heads, self.key_dim)}
        return [weight._replace(shape=by_channel.get(weight.name, weight.shape)) for weight in super().weights(model)]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """A gated delta net's, with two differences. The projection has d_k - 1 more rows per head. k k^T and q k^T
        take C d_k each, not 2 C d_k: nothing above the diagonal is computed (`decayed_products`)."""
        d_k, chunk = self.key_dim, even_chunk(model.window, MAX_CHUNK)
        more_rows = 2 * model.hidden_size * (d_k - 1)
        above_diagonal = (1 if state_only else 2) * chunk * d_k
        return super().flops(model, sleep, state_only) + self.heads * (more_rows - above_diagonal)

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Per head: projection, convolution before and after SiLU, the rule, gate and norm.

        On a CPU the tensors that torch saves, as the tests measure; a few percent off if the chunk length is no power
        of two. On CUDA in bf16 taken from the sources (chunk.py of FLA's kda saves q, k, v, g before its function and
        its sums, beta before and after it, and two 64 x 64 matrices per chunk), not measured.
        """
        d_k, d_v, is_bf16 = self.key_dim, self.value_dim, number < FP32
        projected = number * ((self._channels + d_v + 1 + d_k) + 2 * self._channels + 4)
        if device == "cuda" and is_bf16:
            rows = 2 * self._channels + d_v + 1 + d_k  # the projection, and its q, k and v again
            kept = number * (rows + 2 * FLA_CHUNK) + FP32 * (2 * d_k + 2)
            return self.heads * (kept + (0 if state_only else 3 * d_v * number + FP32))
        chunk = even_chunk(model.window, MAX_CHUNK)
        halvings = (chunk - 1).bit_length()
        write = FP32 * (2 * chunk + (8 + 2 * halvings) * d_k + 3 * d_v + d_k * d_v / chunk + 2)
        if state_only:
            return self.heads * (projected + write)
        read = FP32 * (chunk + (2 + halvings / 2) * d_k + 1) + (14 if is_bf16 else 5 * FP32) * d_v
        return self.heads * (projected + write + read)

    def log_decay(self, layer: MixerModule, alpha: torch.Tensor) -> torch.Tensor:
        """alpha and g: [L, B, heads/TP, d_k]."""
        import torch.nn.functional as F

        step = F.softplus(alpha + layer.in_float32("dt_bias").to(alpha.dtype))
        return -layer.in_float32("A_log").to(alpha.dtype).exp().unsqueeze(-1) * step

    @property
    def rule_with_gates(self) -> Callable:
        from powernap.model.mixers.kernels import kimi_delta_rule

        return kimi_delta_rule

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        return z.sigmoid()

    @property
    def rule(self) -> Recurrence:
        from powernap.model.mixers.delta_rule import sequential_delta_rule

        return Recurrence(sequential_delta_rule, chunked_kimi_delta_rule, _fla)


def chunked_kimi_delta_rule(q, k, v, g, beta, state, need_output: bool = True, max_chunk: int = MAX_CHUNK):
    """The same result chunk by chunk with matrix products (eq. 6 to 9, but without a division by the decay).

    Inside a chunk of C tokens let gamma_i = sum_{j<=i} g_j, of K channels, and for j <= i let
    A(x)_ij = x_i . (exp(gamma_i - gamma_j) * k_j). The values u that the tokens actually write solve a unit
    lower-triangular system

        (I + tril(beta A(k), -1)) u = beta (v - (exp(gamma) * k) S)

    and then  o = (exp(gamma) * q) S + A(q) u,   S' = exp(gamma_C)^T * S + (exp(gamma_C - gamma) * k)^T u.
    As in delta_rule.py only the part that needs S runs chunk by chunk. Arguments as in `Recurrence`.
    """
    import torch

    from powernap.model.mixers.delta_rule import running_sum, through_chunks, to_chunks

    length, key_dim, value_dim, dtype = q.shape[1], q.shape[-1], v.shape[-1], v.dtype
    chunk = even_chunk(length, max_chunk)
    queries = [to_chunks(q, chunk, state.dtype)] if need_output else []
    k, v, g, beta = (to_chunks(x, chunk, state.dtype) for x in (k, v, g, beta))
    gamma, weight = running_sum(g, -2), beta.unsqueeze(-1)
    from_start, total = gamma.exp(), gamma[..., -1:, :]
    products, *scores = decayed_products([k, *queries], k, gamma)

    right_side = torch.cat([weight * v, weight * from_start * k], dim=-1)
    # unitriangular=True: the diagonal and what is above it are never read
    solved = torch.linalg.solve_triangular(weight * products, right_side, upper=False, unitriangular=True)
    u_of_v, u_of_state = solved.split([value_dim, key_dim], dim=-1)
    k_to_end = ((total - gamma).exp() * k).transpose(-1, -2)
    whole = total.exp().transpose(-1, -2)
    reads = (from_start * queries[0], scores[0]) if need_output else None
    return through_chunks(u_of_v, u_of_state, whole, k_to_end, reads, state, dtype, length)


def decayed_products(rows: list[torch.Tensor], k: torch.Tensor, gamma: torch.Tensor) -> list[torch.Tensor]:
    """For each x of `rows`: x_i . (exp(gamma_i - gamma_j) * k_j) for j <= i, and 0 for j > i.

    Every channel has its own decay, so it belongs inside the product; as exp(gamma_i) exp(-gamma_j) it would overflow.
    Cut the tokens in two, and let m be the last of the first part. From j in the first part to i in the second the
    decay is exp(gamma_i - gamma_m) exp(gamma_m - gamma_j), and neither exponent is positive: this block is one matrix
    product. The two blocks on the diagonal are the same task with fewer tokens. An even number of tokens is cut into
    halves, which are computed together; of an odd number the last one is cut off, which needs no padding.

    Args:
        rows, k, gamma: [..., C, K]; gamma never grows along C.

    Returns:
        matrices [..., C, C]
    """
    import torch
    import torch.nn.functional as F

    length = k.shape[-2]
    if length == 1:
        return [(x * k).sum(-1, keepdim=True) for x in rows]
    cut = length - 1 if length % 2 else length // 2
    (k_1, k_2), (gamma_1, gamma_2), *parts = ((x[..., :cut, :], x[..., cut:, :]) for x in (k, gamma, *rows))
    if length % 2:
        first = decayed_products([x_1 for x_1, _ in parts], k_1, gamma_1)
        second = decayed_products([x_2 for _, x_2 in parts], k_2, gamma_2)
    else:
        k, gamma, *rows = (x.unflatten(-2, (2, cut)) for x in (k, gamma, *rows))
        halves = [matrix.unbind(-3) for matrix in decayed_products(rows, k, gamma)]
        first, second = [upper for upper, _ in halves], [lower for _, lower in halves]
    middle = gamma_1[..., -1:, :]
    k_to_middle = ((middle - gamma_1).exp() * k_1).transpose(-1, -2)
    from_middle = (gamma_2 - middle).exp()
    matrices = []
    for (_, x_2), upper, lower in zip(parts, first, second, strict=True):
        below = (from_middle * x_2) @ k_to_middle
        matrices.append(torch.cat([F.pad(upper, (0, length - cut)), torch.cat([below, lower], dim=-1)], dim=-2))
    return matrices


def _fla(q, k, v, g, beta, state):
    """FLA 0.6.0: q, k, v of one dtype; g, beta and the state in float32; d_k at most 256. Without
    `safe_gate`, which requires bounded decays."""
    from fla.ops.kda import chunk_kda  # imported late: it takes seconds

    g, beta, state = g.float(), beta.float(), state.float()
    return chunk_kda(q, k, v, g, beta, scale=1.0, initial_state=state, output_final_state=True)
