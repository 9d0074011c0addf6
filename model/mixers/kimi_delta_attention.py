"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay for every channel of the keys.

With S_t in R^{d_k x d_v}, per head, and alpha_t in (0, 1)^{d_k} where the gated delta net has one number (eq. 1):

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

Layout of every form: q, k, g = log(alpha) [B, T, H, K], v [B, T, H, V], beta [B, T, H], state [B, H, K, V].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from powernap.model.mixers.gated_delta_net import FLA_CHUNK, MAX_CHUNK, GatedDeltaNet
from powernap.model.part import FP32, Device, Weight, even_chunk

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.mixers.module import MixerModule
    from powernap.model.window import Window


class KimiDeltaAttention(GatedDeltaNet):
    """A gated delta net with d_k decays a head, and a sigmoid for the output gate (eq. 10).

    Per head the projection's rows are [q | k | v | z | beta | alpha]. z and alpha have full rank, where the paper has
    products of two matrices of low rank. Steps are drawn for each channel, in a gated delta net's range: a head
    remembers for long in some channels and for a short time in others.
    """

    letter: ClassVar[str] = "K"
    title: ClassVar[str] = "Kimi Delta Attention"
    section: ClassVar[str] = "kda"

    def weights(self, model: ModelConfig) -> list[Weight]:
        in_proj, out_proj, conv_weight, A_log, dt_bias, norm = super().weights(model)
        rows = self.heads * (self._channels + self.value_dim + 1 + self.key_dim)
        return [
            in_proj._replace(shape=(rows, model.hidden_size)),
            out_proj,
            conv_weight,
            A_log,
            dt_bias._replace(shape=(self.heads, self.key_dim)),
            norm,
        ]

    def flops(self, model: ModelConfig, sleep: SleepConfig, state_only: bool = False) -> int:
        """A gated delta net's, with two differences. The projection has d_k - 1 more rows a head. k k^T and q k^T take
        C d_k each, not 2 C d_k: nothing above the diagonal is computed (`decayed_products`)."""
        d_k, chunk = self.key_dim, even_chunk(model.window, MAX_CHUNK)
        more_rows = 2 * model.hidden_size * (d_k - 1)
        above_diagonal = (1 if state_only else 2) * chunk * d_k
        return super().flops(model, sleep, state_only) + self.heads * (more_rows - above_diagonal)

    def activation_bytes(
        self, model: ModelConfig, sleep: SleepConfig, number: int, device: Device, state_only: bool = False
    ) -> float:
        """Of each head: projection, convolution before and after SiLU, the rule, gate and norm.

        For a CPU counted from what torch keeps, which the tests measure; a few percent off where a chunk is no power of
        two. For CUDA in bf16 read off FLA's source (chunk.py of kda keeps q, k, v, g, its sums, beta and two 64 x 64
        matrices a chunk), and not measured.
        """
        d_k, d_v, is_bf16 = self.key_dim, self.value_dim, number < FP32
        projected = number * ((self._channels + d_v + 1 + d_k) + 2 * self._channels + 4)
        if device == "cuda" and is_bf16:
            rule = number * (self._channels + 2 * FLA_CHUNK) + FP32 * (4 * d_k + 2)
            return self.heads * (projected + rule + (0 if state_only else 5 * d_v * number))
        chunk = even_chunk(model.window, MAX_CHUNK)
        halvings = (chunk - 1).bit_length()
        write = FP32 * (2 * chunk + (8 + 2 * halvings) * d_k + 3 * d_v + d_k * d_v / chunk + 2)
        if state_only:
            return self.heads * (projected + write)
        read = FP32 * (chunk + (2 + halvings / 2) * d_k + 1) + (14 if is_bf16 else 5 * FP32) * d_v
        return self.heads * (projected + write + read)

    def _mix(
        self,
        layer: MixerModule,
        hidden_states: torch.Tensor,
        state: torch.Tensor,
        window: Window,
        need_output: bool = True,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """A gated delta net's, but for d_k numbers g a head and the sigmoid of the gate."""
        import torch
        import torch.nn.functional as F

        from powernap.model.mixers.conv import causal_conv

        d_k, d_v = self.key_dim, self.value_dim
        projected, _ = layer.in_proj(hidden_states)
        length, batch, _ = projected.shape
        projected = projected.view(length, batch, self.heads // layer.tp_size, -1)
        qkv, z, beta, alpha = projected.split([self._channels, d_v, 1, d_k], dim=-1)
        if window.valid is not None:  # the convolution must not carry a pad into the tokens after it
            qkv = qkv * window.valid[..., None, None]
        seen = qkv if history is None else torch.cat([history, qkv])
        convolved = causal_conv(seen, layer.conv_weight)[len(seen) - length :]
        q, k, v = F.silu(convolved).split([d_k, d_k, d_v], dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = beta.squeeze(-1).to(state.dtype).sigmoid()
        step = F.softplus(alpha.to(state.dtype) + layer.dt_bias.to(state.dtype))
        g = -layer.A_log.to(state.dtype).exp().unsqueeze(-1) * step
        if window.valid is not None:
            beta, g = beta * window.valid.unsqueeze(-1), g * window.valid[..., None, None]
        layer.watch_gates(window, g.flatten(2), beta)  # alpha's mean is over channels, too
        q, k, v, g, beta = (x.transpose(0, 1) for x in (q, k, v, g, beta))
        output, state = kimi_delta_rule(q, k, v, g, beta, state, need_output)
        if not need_output:
            return None, state, seen
        assert output is not None
        output = layer.norm(output.transpose(0, 1)) * z.sigmoid()
        output, _ = layer.out_proj(output.reshape(length, batch, -1))
        return output, state, seen


def kimi_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    need_output: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run the rule over T tokens: one token by the recurrence, more by FLA's Triton kernel on CUDA where it is precise
    enough, else by the chunked torch form. All take an initial state and carry gradients through both states.

    Args:
        q, k: [B, T, H, K]; k L2-normalised by the caller, q used as it is (no 1/sqrt(K)).
        v: [B, T, H, V].
        g: [B, T, H, K] log of the decay alpha of each channel, <= 0.
        beta: [B, T, H] write strength.
        state: [B, H, K, V], float32 (float64 when the inputs are).
        need_output: False when only the final state matters; the output is then None.

    Returns:
        (o [B, T, H, V] in v's dtype, final state [B, H, K, V] in the state's dtype)
    """
    from powernap.model.mixers.fla import fla_is_precise_enough_for

    if q.shape[1] == 1:
        return sequential_kimi_delta_rule(q, k, v, g, beta, state, need_output)
    if q.is_cuda and fla_is_precise_enough_for(q.dtype):
        return _fla(q, k, v, g, beta, state)
    return chunked_kimi_delta_rule(q, k, v, g, beta, state, need_output)


def sequential_kimi_delta_rule(q, k, v, g, beta, state, need_output: bool = True):
    """The recurrence token by token: the reference of the other forms. Arguments as `kimi_delta_rule`."""
    import torch

    dtype = v.dtype
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        if need_output:
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype) if need_output else None, state


def chunked_kimi_delta_rule(q, k, v, g, beta, state, need_output: bool = True, max_chunk: int = MAX_CHUNK):
    """The same numbers chunk by chunk with matrix products (eq. 6 to 9, but without a division by the decay).

    Inside a chunk of C tokens let gamma_i = sum_{j<=i} g_j, of K channels, and for j <= i let
    A(x)_ij = x_i . (exp(gamma_i - gamma_j) * k_j). The values the tokens really write, u, solve a unit lower-triangular
    system

        (I + tril(beta A(k), -1)) u = beta (v - (exp(gamma) * k) S)

    and then  o = (exp(gamma) * q) S + A(q) u,   S' = exp(gamma_C)^T * S + (exp(gamma_C - gamma) * k)^T u.
    As in delta_rule.py only the part that needs S goes from chunk to chunk. Arguments as `kimi_delta_rule`.
    """
    import torch
    import torch.nn.functional as F

    batch, length, heads, key_dim = q.shape
    value_dim, dtype = v.shape[-1], v.dtype
    chunk = even_chunk(length, max_chunk)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def to_chunks(x: torch.Tensor) -> torch.Tensor:  # [B, T, H, ...] -> [chunks * B * H, C, ...]
        x = x.to(state.dtype)
        if padding:  # g = beta = 0: a padded token neither decays nor writes
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        return x.unflatten(1, (num_chunks, chunk)).movedim((1, 3), (0, 2)).flatten(0, 2)

    k, v, gamma = to_chunks(k), to_chunks(v), to_chunks(g).cumsum(1)
    weight = to_chunks(beta).unsqueeze(-1)
    from_start, total = gamma.exp(), gamma[:, -1:]
    queries = [to_chunks(q)] if need_output else []
    products, *scores = decayed_products([k, *queries], k, gamma)

    right_side = torch.cat([weight * v, weight * from_start * k], dim=-1)
    # unitriangular=True: the diagonal and what is above it are never read
    solved = torch.linalg.solve_triangular(weight * products, right_side, upper=False, unitriangular=True)
    u_of_v, u_of_state = solved.split([value_dim, key_dim], dim=-1)
    k_to_end = ((total - gamma).exp() * k).transpose(1, 2)
    whole = total.exp().transpose(1, 2)

    per_chunk = [u_of_v, u_of_state, whole, k_to_end, *(from_start * query for query in queries), *scores]
    outputs = []
    flat_state = state.flatten(0, 1)
    # split, not indexing: the backward of n slices would fill n gradients of the full size
    for u_v, u_s, decay, k_end, *query in zip(*(x.split(batch * heads) for x in per_chunk), strict=True):
        u = torch.baddbmm(u_v, u_s, flat_state, alpha=-1)
        if need_output:
            q_start, score = query
            outputs.append(torch.baddbmm(score @ u, q_start, flat_state))
        flat_state = torch.baddbmm(decay * flat_state, k_end, u)
    state = flat_state.view_as(state)
    if not need_output:
        return None, state
    # Tokens first in memory, as the caller has it: its transpose to [T, B, H, V] is then contiguous.
    output = torch.stack(outputs).unflatten(1, (batch, heads)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return output[:length].transpose(0, 1).to(dtype), state


def decayed_products(rows: list[torch.Tensor], k: torch.Tensor, gamma: torch.Tensor) -> list[torch.Tensor]:
    """For each x of `rows`: x_i . (exp(gamma_i - gamma_j) * k_j) for j <= i, and 0 for j > i.

    Every channel has its own decay, so it belongs inside the product; as exp(gamma_i) exp(-gamma_j) it would overflow.
    Cut the tokens in two, and let m be the last of the first part. From j in the first part to i in the second the
    decay is exp(gamma_i - gamma_m) exp(gamma_m - gamma_j), and neither exponent is positive: this block is one matrix
    product. The two blocks on the diagonal are the same task with fewer tokens. An even number is cut into halves,
    which are computed together; of an odd number the last token is cut off, which needs no padding.

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
    `safe_gate`, which asks for bounded decays."""
    from fla.ops.kda import chunk_kda  # imported late: it takes seconds

    g, beta, state = g.float(), beta.float(), state.float()
    return chunk_kda(q, k, v, g, beta, scale=1.0, initial_state=state, output_final_state=True)
