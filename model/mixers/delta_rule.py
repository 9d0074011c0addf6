"""The gated delta rule in three forms behind one function.

With S_t in R^{d_k x d_v} (the transpose of the paper's matrix, as kernels store it), per head:

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t

alpha_t = exp(g_t) decays, beta_t in [0, 1], or [0, 2] (arXiv 2411.12537), sets the write strength
(arXiv 2412.06464, eq. 10). All forms take an initial
state, return the final one, and pass gradients through both.

All forms have the field's usual layout: q, k [B, T, H, K], v [B, T, H, V], g, beta [B, T, H], state [B, H, K, V].
"""

import functools

import torch
import torch.nn.functional as F

from powernap.model.mixers.gated_delta_net import MAX_CHUNK
from powernap.model.mixers.recurrent import Recurrence
from powernap.model.part import even_chunk


def sequential_delta_rule(q, k, v, g, beta, state, need_output: bool = True):
    """The recurrence token by token. Arguments as in `Recurrence`; g may have one value per channel."""
    dtype = v.dtype
    q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    outputs = []
    for t in range(q.shape[1]):
        alpha = g[:, t].exp()
        state = alpha.view(*alpha.shape, *[1] * (4 - alpha.dim())) * state
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        if need_output:
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype) if need_output else None, state


def chunked_delta_rule(q, k, v, g, beta, state, need_output: bool = True, max_chunk: int = MAX_CHUNK):
    """The same result chunk by chunk with matrix products (arXiv 2406.06484 sec. 3, with decay 2412.06464 sec. 3.2).

    Inside a chunk of C tokens let gamma_i = sum_{j<=i} g_j and D_ij = exp(gamma_i - gamma_j) for j <= i. The values u
    that the tokens actually write solve a unit lower-triangular system

        (I + tril(beta k k^T * D, -1)) u = beta (v - exp(gamma) k S)

    and then  o = exp(gamma) q S + (q k^T * D) u,   S' = exp(gamma_C) S + (exp(gamma_C - gamma) k)^T u.
    The triangular solve is done for all chunks at once; only the part that needs S runs chunk by chunk.
    Arguments as in `Recurrence`. Nothing is written in place, so autograd needs no copy.
    """
    length, key_dim, value_dim, dtype = q.shape[1], q.shape[-1], v.shape[-1], v.dtype
    chunk = even_chunk(length, max_chunk)
    queries = to_chunks(q, chunk, state.dtype) if need_output else None
    k, v, g, beta = (to_chunks(x, chunk, state.dtype) for x in (k, v, g, beta))
    gamma = running_sum(g)
    causal = _causal_mask(chunk, k.device)
    # -inf before exp, not zero after it: above the diagonal the difference is positive and overflows under strong decay
    decay = (gamma.unsqueeze(-1) - gamma.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    total = gamma[..., -1:]
    to_end = (total - gamma).exp().unsqueeze(-1)
    from_start = gamma.exp().unsqueeze(-1)
    whole = total.exp().unsqueeze(-1)

    k_t = k.transpose(-1, -2)
    weighted = beta.unsqueeze(-1)
    system = (k @ k_t) * (decay * weighted)  # unitriangular=True: the diagonal and what is above it are never read
    right_side = torch.cat([weighted * v, (weighted * from_start) * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    u_of_v, u_of_state = solved.split([value_dim, key_dim], dim=-1)
    k_to_end = (k * to_end).transpose(-1, -2)
    reads = None if queries is None else (queries * from_start, (queries @ k_t) * decay)
    return through_chunks(u_of_v, u_of_state, whole, k_to_end, reads, state, dtype, length)


def running_sum(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """x.cumsum(dim), dim -1 or -2. On CUDA that has no deterministic kernel: where one is asked for, a product with ones."""
    if not x.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    ones = _causal_mask(x.shape[dim], x.device).to(x.dtype)
    return ones @ x if dim == -2 else x @ ones.t()


def to_chunks(x: torch.Tensor, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, H, ...] -> [chunks, B * H, C, ...]. Zero padding at the end: such tokens neither decay nor write."""
    x = x.to(dtype)
    if padding := -x.shape[1] % chunk:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, chunk)).movedim((1, 3), (0, 2)).flatten(1, 2)


def through_chunks(
    u_of_v: torch.Tensor,
    u_of_state: torch.Tensor,
    whole: torch.Tensor,
    k_to_end: torch.Tensor,
    reads: tuple[torch.Tensor, torch.Tensor] | None,
    state: torch.Tensor,
    dtype: torch.dtype,
    length: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Chunk by chunk: u = u_of_v - u_of_state S, S' = whole S + k_to_end u; for reads (q, scores) o = q S + scores u.

    Args:
        u_of_v, u_of_state, whole, k_to_end, reads: [chunks, B * H, ...], as from `to_chunks`.
        state: S, [B, H, K, V].
        dtype, length: of the output.
        reads: None if no output is needed.

    Returns:
        (o [B, T, H, V] or None, S)
    """
    # unbind, not indexing: the backward of n slices would fill n gradients of the full size
    per_chunk = [u_of_v, u_of_state, whole, k_to_end, *(reads or ())]
    outputs = []
    flat_state = state.flatten(0, 1)  # [B * H, K, V]: baddbmm, a product and a sum in one, takes one batch dimension
    for u_v, u_s, decay_all, k_end, *query in zip(*(x.unbind(0) for x in per_chunk), strict=True):
        u = torch.baddbmm(u_v, u_s, flat_state, alpha=-1)
        if query:
            q_start, score = query
            outputs.append(torch.baddbmm(score @ u, q_start, flat_state))
        flat_state = torch.baddbmm(decay_all * flat_state, k_end, u)
    if not outputs:
        return None, flat_state.view_as(state)
    # Tokens first in memory, as the caller's tensors: the transpose to [T, B, H, V] is then contiguous.
    output = torch.stack(outputs).unflatten(1, state.shape[:2]).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return output[:length].transpose(0, 1).to(dtype), flat_state.view_as(state)


@functools.lru_cache(maxsize=8)
def _causal_mask(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _fla(q, k, v, g, beta, state):
    """FLA 0.6.0: q, k, v of one dtype; g, beta and the state in float32; d_k at most 256, in 16 bits d_k and d_v even.
    The final state is float32, and gradients pass through both states."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # imported late: it takes seconds

    g, beta, state = g.float(), beta.float(), state.float()
    return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0, initial_state=state, output_final_state=True)


gated_delta_rule = Recurrence(sequential_delta_rule, chunked_delta_rule, _fla)
