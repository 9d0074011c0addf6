"""A language model that sleeps (arXiv 2605.26099), in plain torch: attention and fast weights in windows of L tokens.

Tokens of the current window are read awake, in one pass; attention keeps their keys and values. When the window is full
and another token comes, the model sleeps: N passes of all blocks over the window write it into the fast weights. Then its keys and
values are dropped; with sliding eviction the newest L-1 stay. So `generate` costs the same for every token, however long
the text before it.

Weights have the names and shapes of Powernap's own export. This file needs torch and transformers alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_powernap import PowernapConfig

CHUNK = 32  # tokens that the gated delta rule reads at once


# The field of an output that holds the cache, in newer and in older transformers.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class PowernapCache:
    """What later tokens depend on: fast weights, and the current window's tokens, keys and values. Its size does not grow.

    Attributes:
        seen: tokens read so far.
        tokens: [B, kept + read], of the current window, after those of earlier windows that attention still sees.
        kept: how many of them are of earlier windows.
        layers: per block {"keys_values": [2, B, groups, tokens, width]} or {"state", "conv_state", "at_start"}.
    """

    is_compileable = False

    def __init__(self, batch: int, layers: list[dict[str, torch.Tensor]], device: torch.device):
        self.seen = 0
        self.kept = 0
        self.tokens = torch.zeros((batch, 0), dtype=torch.long, device=device)
        self.layers = layers

    @property
    def read(self) -> int:
        """Tokens of the current window that were read."""
        return self.tokens.shape[1] - self.kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, rows: torch.LongTensor) -> None:
        """For beam search."""
        self.tokens = self.tokens[rows]
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor[:, rows] if name == "keys_values" else tensor[rows]


class Norm(nn.Module):
    """x / rms(x) * weight, or * (1 + weight)."""

    def __init__(self, width: int, eps: float, zero_centred: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero_centred else torch.ones(width))
        self.eps, self.zero_centred = eps, zero_centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.zero_centred:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), x.shape[-1:], 1 + self.weight.to(dtype), self.eps).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, model: dict):
        super().__init__()
        width, inner = model["hidden_size"], model["mlp"]["ffn_hidden_size"]
        self.linear_fc1 = nn.Linear(width, 2 * inner, bias=False)
        self.linear_fc2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)


class Attention(nn.Module):
    """Letter A. Rows of the projection, for each head of keys: [queries | their gates | key | value]."""

    section, has_fast_weights = "attention", False

    def __init__(self, model: dict):
        super().__init__()
        own, hidden = model[self.section], model["hidden_size"]
        self.heads = own["heads"]
        self.groups = own.get("kv_heads") or self.heads
        self.width = own.get("head_dim") or hidden // self.heads
        rotated = own.get("rotary_dims")
        self.rotated = self.width if rotated is None else rotated
        self.base = own.get("rope_base", 10000.0)
        self.gated = own.get("output_gate", False)
        self.queries = self.heads // self.groups
        rows = self.groups * (self.queries * (1 + self.gated) + 2) * self.width
        self.qkv_proj = nn.Linear(hidden, rows, bias=own.get("qkv_bias", False))
        self.out_proj = nn.Linear(self.heads * self.width, hidden, bias=False)
        self.norms_width = own.get("qk_norm_over") == "width"
        if own.get("qk_norm"):
            for name, heads in (("q_norm", self.heads), ("k_norm", self.groups)):
                width = heads * self.width if self.norms_width else self.width
                norm = Norm(width, model.get("norm_eps", 1e-6), model.get("zero_centred_norms", False))
                self.add_module(name, norm)

    def empty(self, batch: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys_values": like.new_zeros((2, batch, self.groups, 0, self.width))}

    def forward(self, x, keys_values, position, mask):
        """x [B, n, D], keys and values of the tokens before them -> (output, keys and values of all)."""
        batch, length, _ = x.shape
        rows = self.qkv_proj(x).view(batch, length, self.groups, -1, self.width)
        q, gate, k, v = rows.split([self.queries, self.queries * self.gated, 1, 1], dim=3)
        if hasattr(self, "q_norm"):
            q, k = self.normed(q, self.q_norm), self.normed(k, self.k_norm)
        q, k = self.rotate(q, position), self.rotate(k, position)
        new = torch.stack([k.squeeze(3), v.squeeze(3)]).transpose(2, 3)
        keys_values = torch.cat([keys_values, new], dim=3)
        keys, values = keys_values.repeat_interleave(self.queries, dim=2)
        output = F.scaled_dot_product_attention(
            q.flatten(2, 3).transpose(1, 2), keys, values, attn_mask=self.seen(mask)
        )
        output = output.transpose(1, 2)
        if self.gated:
            output = output * gate.flatten(2, 3).sigmoid()
        return self.out_proj(output.flatten(2)), keys_values

    def seen(self, mask: torch.Tensor) -> torch.Tensor:
        """What of the tokens that the model's windows allow."""
        return mask

    def normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Each head, or all heads together."""
        return norm(x.flatten(2)).view(x.shape) if self.norms_width else norm(x)

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Turn the pairs (i, i + rotated/2) of x [B, n, ..., width] by their position's angle."""
        if not self.rotated:
            return x
        pairs = torch.arange(0, self.rotated, 2, dtype=torch.float64, device=x.device)
        positions = torch.arange(position, position + x.shape[1], dtype=torch.float64, device=x.device)
        angles = positions[:, None, None, None] * self.base ** (-pairs / self.rotated)
        cos, sin = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        first, second = x[..., : self.rotated].chunk(2, dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, x[..., self.rotated :]], dim=-1)


class Recurrent(nn.Module):
    """A projection, a short causal convolution that sees its own window alone, and a recurrence over a matrix state."""

    has_fast_weights = True

    def convolve(self, x: torch.Tensor, conv_state: torch.Tensor, real: torch.Tensor | None):
        """x [B, n, groups, channels] after conv_state, its last taps-1 inputs -> (convolved, new conv_state)."""
        if real is not None:
            x = x * real[..., None, None]
        seen, taps = torch.cat([conv_state, x], dim=1), self.conv_weight.shape[-1]
        weight = self.conv_weight.to(x.dtype)
        convolved = sum(seen[:, i : i + x.shape[1]] * weight[..., i] for i in range(taps))
        return convolved, seen[:, seen.shape[1] - (taps - 1) :]

    def empty(self, batch: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        state = torch.zeros((batch, *self.state_shape), dtype=dtype, device=like.device)
        groups, channels, taps = self.conv_weight.shape
        conv_state = like.new_zeros((batch, taps - 1, groups, channels))
        return {"state": state, "conv_state": conv_state, "at_start": state}


class GatedDeltaNet(Recurrent):
    """Letter G (arXiv 2412.06464). Rows of the projection, for each head of keys: [q | k | v | gate z | beta | alpha]."""

    section, decay_per_channel = "gdn", False

    def __init__(self, model: dict):
        super().__init__()
        own, hidden = model[self.section], model["hidden_size"]
        self.heads, self.d_k, self.d_v = own["heads"], own["key_dim"], own["value_dim"]
        self.groups = own.get("key_heads") or self.heads
        self.values = self.heads // self.groups
        self.write_scale = 2 if own.get("allow_neg_eigval") else 1
        self.scale = self.d_k**-0.5 if own.get("scale_queries") else 1.0
        self.l2_eps = own.get("l2_eps", 0.0)
        self.decays = self.d_k if self.decay_per_channel else 1
        self.state_shape = (self.heads, self.d_k, self.d_v)
        self.channels = 2 * self.d_k + self.values * self.d_v
        rows = self.groups * self.channels + self.heads * (self.d_v + 1 + self.decays)
        self.in_proj = nn.Linear(hidden, rows, bias=False)
        self.out_proj = nn.Linear(self.heads * self.d_v, hidden, bias=False)
        self.conv_weight = nn.Parameter(torch.zeros(self.groups, self.channels, own.get("conv_kernel", 4)))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(
            torch.zeros(self.heads, self.d_k) if self.decay_per_channel else torch.zeros(self.heads)
        )
        self.norm = Norm(self.d_v, own.get("norm_eps") or model.get("norm_eps", 1e-6))

    def forward(self, x, state, conv_state, real):
        batch, length, _ = x.shape
        rows = self.in_proj(x).view(batch, length, self.groups, -1)
        sizes = [self.channels, self.values * self.d_v, self.values, self.values * self.decays]
        qkv, z, beta, alpha = rows.split(sizes, dim=-1)
        q, k, v, conv_state = self.features(x, qkv, conv_state, real)
        q, k = self.normalize(q) * self.scale, self.normalize(k)
        q, k = (t.repeat_interleave(self.values, dim=2) for t in (q, k))
        v, z, beta, alpha = (t.reshape(batch, length, self.heads, -1) for t in (v, z, beta, alpha))
        beta = self.write_scale * beta.squeeze(-1).to(state.dtype).sigmoid()
        g = self.log_decay(alpha.to(state.dtype))
        if real is not None:  # a pad neither decays nor writes
            beta = beta * real.unsqueeze(-1)
            g = g * real.view(*real.shape, *[1] * (g.dim() - 2))
        read = delta_rule_by_token if length == 1 or self.decay_per_channel else delta_rule_by_chunk
        output, state = read(*(t.to(state.dtype) for t in (q, k, v)), g, beta, state)
        output = self.norm(output.to(x.dtype)) * self.gate(z)
        return self.out_proj(output.flatten(2)), state, conv_state

    def features(self, x, qkv, conv_state, real):
        qkv, conv_state = self.convolve(qkv, conv_state, real)
        return *F.silu(qkv).split([self.d_k, self.d_k, self.values * self.d_v], dim=-1), conv_state

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        if not self.l2_eps:
            return (x / norm.clamp_min(1e-12)).to(x.dtype)
        return (x * torch.rsqrt(norm.square() + self.l2_eps)).to(x.dtype)

    def log_decay(self, alpha: torch.Tensor) -> torch.Tensor:
        step = F.softplus(alpha.squeeze(-1) + self.dt_bias.to(alpha.dtype))
        return -self.A_log.to(alpha.dtype).exp() * step

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        return F.silu(z)


class KimiDeltaAttention(GatedDeltaNet):
    """Letter K (arXiv 2510.26692): a decay for every channel of the keys, a sigmoid as the output's gate."""

    section, decay_per_channel = "kda", True

    def log_decay(self, alpha: torch.Tensor) -> torch.Tensor:
        return -self.A_log.to(alpha.dtype).exp().unsqueeze(-1) * F.softplus(alpha + self.dt_bias.to(alpha.dtype))

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        return z.sigmoid()


class JetBlock(GatedDeltaNet):
    """Letter J (arXiv 2508.15884): the convolution is on v alone, with taps made from the input of each token."""

    section = "jet"

    def __init__(self, model: dict):
        super().__init__(model)
        own, width = model["jet"], self.values * self.d_v
        self.taps = own.get("conv_kernel", 4)
        del self.conv_weight
        self.generator_in = nn.Linear(model["hidden_size"], own["generator_dim"], bias=False)
        self.generator_out = nn.Parameter(torch.zeros(self.groups, width * self.taps, own["generator_dim"]))
        self.generator_bias = nn.Parameter(torch.zeros(self.groups, width * self.taps))

    def empty(self, batch: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        state = torch.zeros((batch, *self.state_shape), dtype=dtype, device=like.device)
        conv_state = like.new_zeros((batch, self.taps - 1, self.groups, self.values * self.d_v))
        return {"state": state, "conv_state": conv_state, "at_start": state}

    def features(self, x, qkv, conv_state, real):
        q, k, v = qkv.split([self.d_k, self.d_k, self.values * self.d_v], dim=-1)
        v = v if real is None else v * real[..., None, None]
        kernels = torch.einsum("blr,gcr->blgc", F.silu(self.generator_in(x)), self.generator_out.to(x.dtype))
        kernels = (kernels + self.generator_bias.to(x.dtype)).unflatten(-1, (-1, self.taps))
        seen = torch.cat([conv_state, v], dim=1)
        v = sum(seen[:, i : i + x.shape[1]] * kernels[..., i] for i in range(self.taps))
        return F.silu(q), F.silu(k), F.silu(v), seen[:, seen.shape[1] - (self.taps - 1) :]


class Mamba2(Recurrent):
    """Letter M (arXiv 2405.21060). Rows of the projection, for each group of heads: [x | B | C | gate z | step dt]."""

    section = "mamba2"

    def __init__(self, model: dict):
        super().__init__()
        own, hidden = model["mamba2"], model["hidden_size"]
        self.heads, self.head_dim, self.state_dim = own["heads"], own["head_dim"], own["state_dim"]
        self.groups, self.eps = own.get("groups", 1), model.get("norm_eps", 1e-6)
        self.width = self.heads // self.groups * self.head_dim
        self.channels = self.width + 2 * self.state_dim
        self.state_shape = (self.heads, self.state_dim, self.head_dim)
        self.in_proj = nn.Linear(hidden, self.groups * (self.channels + self.width) + self.heads, bias=False)
        self.out_proj = nn.Linear(self.groups * self.width, hidden, bias=False)
        self.conv_weight = nn.Parameter(torch.zeros(self.groups, self.channels, own.get("conv_kernel", 4)))
        self.conv_bias = nn.Parameter(torch.zeros(self.groups, self.channels))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.groups, self.width))

    def forward(self, x, state, conv_state, real):
        batch, length, _ = x.shape
        rows = self.in_proj(x).view(batch, length, self.groups, -1)
        xbc, z, step = rows.split([self.channels, self.width, self.heads // self.groups], dim=-1)
        xbc, conv_state = self.convolve(xbc, conv_state, real)
        xbc = F.silu(xbc + self.conv_bias.to(xbc.dtype))
        v, k, q = xbc.split([self.width, self.state_dim, self.state_dim], dim=-1)
        v = v.reshape(batch, length, self.heads, self.head_dim)
        step = F.softplus(step.flatten(2).to(state.dtype) + self.dt_bias.to(state.dtype))
        if real is not None:
            step = step * real.unsqueeze(-1)
        decay = (-self.A_log.to(state.dtype).exp() * step).exp()
        q, k = (t.to(state.dtype).repeat_interleave(self.heads // self.groups, dim=2) for t in (q, k))
        written, outputs = step.unsqueeze(-1) * v.to(state.dtype), []
        for t in range(length):
            state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * written[:, t, :, None, :]
            outputs.append(torch.einsum("bhn,bhnp->bhp", q[:, t], state))
        output = torch.stack(outputs, dim=1).to(x.dtype) + self.D.to(v.dtype).unsqueeze(-1) * v
        output = F.rms_norm(output.reshape(z.shape) * F.silu(z), (self.width,), eps=self.eps)
        return self.out_proj((output * self.norm_weight.to(output.dtype)).flatten(2)), state, conv_state


def delta_rule_by_token(q, k, v, g, beta, state):
    """S = alpha (I - beta k k^T) S + beta k v^T, o = S^T q; q, k [B, T, H, K], v [B, T, H, V], state [B, H, K, V]."""
    outputs, alpha = [], g.exp()
    for t in range(q.shape[1]):
        state = alpha[:, t].view(*alpha.shape[:1], alpha.shape[2], -1, 1) * state
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + k[:, t, :, :, None] * written[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def delta_rule_by_chunk(q, k, v, g, beta, state):
    """The same by matrix products within chunks (arXiv 2412.06464, section 3.3); one decay a head."""
    q, k, v, g, beta = (t.transpose(1, 2) for t in (q, k, v, g, beta))  # [B, H, T, ...]
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        q_c, k_c, v_c, gamma, b = (
            q[:, :, part],
            k[:, :, part],
            v[:, :, part],
            g[:, :, part].cumsum(-1),
            beta[:, :, part],
        )
        above = torch.ones(q_c.shape[2], q_c.shape[2], dtype=torch.bool, device=q.device).triu(1)
        decay = (gamma.unsqueeze(-1) - gamma.unsqueeze(-2)).masked_fill(above, -math.inf).exp()
        from_start, to_end = gamma.exp().unsqueeze(-1), (gamma[..., -1:] - gamma).exp().unsqueeze(-1)
        system = (k_c @ k_c.transpose(-1, -2)) * decay * b.unsqueeze(-1)
        right = b.unsqueeze(-1) * (v_c - from_start * (k_c @ state))
        u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        outputs.append(from_start * (q_c @ state) + ((q_c @ k_c.transpose(-1, -2)) * decay) @ u)
        state = gamma[..., -1:].exp().unsqueeze(-1) * state + (to_end * k_c).transpose(-1, -2) @ u
    return torch.cat(outputs, dim=2).transpose(1, 2), state


class SlidingAttention(Attention):
    """Letter S: a token sees itself and the reach - 1 tokens before it."""

    section = "sliding_attention"

    def __init__(self, model: dict):
        super().__init__(model)
        self.reach = model[self.section]["reach"]

    def seen(self, mask: torch.Tensor) -> torch.Tensor:
        queries, keys = mask.shape[-2:]
        distance = torch.arange(keys - queries, keys, device=mask.device)[:, None] - torch.arange(
            keys, device=mask.device
        )
        return mask & (distance < self.reach)


MIXERS = {
    "A": Attention,
    "S": SlidingAttention,
    "G": GatedDeltaNet,
    "J": JetBlock,
    "K": KimiDeltaAttention,
    "M": Mamba2,
}


class Layer(nn.Module):
    """A mixer and an MLP, with norms before them, after them or both; a small letter has no MLP."""

    def __init__(self, model: dict, letter: str):
        super().__init__()
        kind = MIXERS[letter.upper()]
        where = model[kind.section].get("norms", "pre")
        eps, zero_centred = model.get("norm_eps", 1e-6), model.get("zero_centred_norms", False)

        def norm(is_there: bool) -> nn.Module:
            return Norm(model["hidden_size"], eps, zero_centred) if is_there else nn.Identity()

        has_mlp = letter.isupper()
        self.input_layernorm, self.post_mixer_layernorm = norm(where != "post"), norm(where != "pre")
        self.self_attention = kind(model)
        self.pre_mlp_layernorm, self.post_mlp_layernorm = (
            norm(has_mlp and where != "post"),
            norm(has_mlp and where != "pre"),
        )
        self.mlp = MLP(model) if has_mlp else None

    def add(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The mixer's output and the MLP's on top of x."""
        x = x + self.post_mixer_layernorm(mixed)
        return x if self.mlp is None else x + self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self, model: dict):
        super().__init__()
        self.layers = nn.ModuleList(Layer(model, letter) for letter in model["pattern"])
        eps, zero_centred = model.get("norm_eps", 1e-6), model.get("zero_centred_norms", False)
        self.final_layernorm = Norm(model["hidden_size"], eps, zero_centred)


class PowernapForCausalLM(PreTrainedModel, GenerationMixin):
    """Batches of texts of one length: windows begin at the same tokens in all of them."""

    config_class = PowernapConfig
    base_model_prefix = "decoder"
    _is_stateful = True  # a text that was slept on cannot be taken back
    _no_split_modules = ["Layer"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    def __init__(self, config: PowernapConfig):
        super().__init__(config)
        model = config.model
        self.embedding = nn.Embedding(model["vocab_size"], model["hidden_size"])
        self.decoder = Decoder(model)
        self.pass_norm = None
        if config.sleep.get("pass_norm"):
            zero_centred = model.get("zero_centred_norms", False)
            self.pass_norm = Norm(model["hidden_size"], model.get("norm_eps", 1e-6), zero_centred)
        self.output_layer = None
        if not model.get("tie_embeddings"):
            self.output_layer = nn.Linear(model["hidden_size"], model["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.output_layer

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids, cache=None, past_key_values=None, attention_mask=None, **_):
        cache = cache if cache is not None else past_key_values
        # All tokens so far, or only those that are new.
        new = input_ids[:, cache.seen :] if cache is not None and input_ids.shape[1] > cache.seen else input_ids
        return {"input_ids": new, "cache": cache, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: PowernapCache | None = None,
        past_key_values: PowernapCache | None = None,
        logits_to_keep: int = 0,
        **_,
    ) -> CausalLMOutputWithPast:
        """Read tokens [B, n] after those in `cache`, sleeping on full windows.

        Args:
            attention_mask: must be all ones: texts of one length.
            logits_to_keep: logits of the last tokens only; 0: of all.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "texts of different lengths: windows begin at the same tokens in all rows; call the model for each length"
            )
        cache = cache if cache is not None else past_key_values
        if cache is None:
            like = self.embedding.weight
            layers = [layer.self_attention.empty(len(input_ids), like) for layer in self.decoder.layers]
            cache = PowernapCache(len(input_ids), layers, input_ids.device)
        kept, left = [], input_ids
        while left.shape[1]:
            if cache.read == self.config.model["window"]:
                self.sleep(cache)
            new, left = left.tensor_split([self.config.model["window"] - cache.read], dim=1)
            kept.append(self.read(cache, new))
        hidden_states = torch.cat(kept, dim=1)
        if logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        head = self.embedding if self.output_layer is None else self.output_layer
        logits = F.linear(self.decoder.final_layernorm(hidden_states), head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def read(self, cache: PowernapCache, tokens: torch.LongTensor) -> torch.Tensor:
        """Read tokens that fit into the current window, awake; their hidden states [B, n, D]."""
        first, position = cache.tokens.shape[1], self.position(cache) + cache.read
        cache.tokens = torch.cat([cache.tokens, tokens], dim=1)
        mask, real = self.mask(cache.tokens, first), self.real(tokens)
        x = self.embedding(tokens)
        for layer, held in zip(self.decoder.layers, cache.layers, strict=True):
            mixer, normed = layer.self_attention, layer.input_layernorm(x)
            if mixer.has_fast_weights:
                mixed, held["state"], held["conv_state"] = mixer(normed, held["state"], held["conv_state"], real)
            else:
                mixed, held["keys_values"] = mixer(normed, held["keys_values"], position, mask)
            x = layer.add(x, mixed)
        cache.seen += tokens.shape[1]
        return x

    @torch.no_grad()
    def sleep(self, cache: PowernapCache) -> None:
        """N passes over the full window; then its keys and values are dropped."""
        sleep, tokens = self.config.sleep, cache.tokens[:, cache.kept :]
        mask, real, position = self.mask(cache.tokens, cache.kept), self.real(tokens), self.position(cache)
        # A window that is read before it sleeps has written already, where every pass writes.
        read_first = sleep.get("every_window") and sleep.get("write", "every") == "every"
        begin = "state" if read_first else "at_start"
        states = [held.get(begin) for held in cache.layers]
        before = [
            held["keys_values"][:, :, :, : cache.kept] if "keys_values" in held else None for held in cache.layers
        ]
        left = list(before)
        embedded = x = self.embedding(tokens)
        passes = self.config.passes
        for number in range(1, passes + 1):
            if number > 1:
                x = embedded if sleep.get("pass_input") == "embeddings" else self.again(x, embedded)
            for index in self.blocks_of_pass(number, passes):
                layer, is_final = self.decoder.layers[index], self.is_final(index, number, passes)
                mixer, normed = layer.self_attention, layer.input_layernorm(x)
                if mixer.has_fast_weights:
                    first = mixer.empty(len(tokens), x)["conv_state"]
                    mixed, written, _ = mixer(normed, states[index], first, real)
                    if is_final or sleep.get("write", "every") == "every":
                        states[index] = written
                else:
                    mixed, seen = mixer(normed, before[index], position, mask)
                    left[index] = seen if is_final else left[index]
                x = layer.add(x, mixed)
        stays = self.config.model["window"] - 1 if sleep.get("eviction") == "sliding" else 0
        stays = min(stays, cache.tokens.shape[1])
        for index, (layer, held) in enumerate(zip(self.decoder.layers, cache.layers, strict=True)):
            if "keys_values" in held:
                seen = left[index]
                held["keys_values"] = seen[:, :, :, seen.shape[3] - min(stays, seen.shape[3]) :].clone()
            else:
                held.update(layer.self_attention.empty(len(tokens), embedded))
                held["state"] = held["at_start"] = states[index]
        cache.tokens = cache.tokens[:, cache.tokens.shape[1] - stays :]
        cache.kept = stays

    def again(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """The input of a pass after the first."""
        x = x if self.pass_norm is None else self.pass_norm(x)
        return x + embedded if self.config.sleep.get("reinject_embeddings") else x

    def blocks_of_pass(self, number: int, passes: int) -> range:
        """Blocks before the loop run in the first pass, those after it in the last."""
        blocks = len(self.decoder.layers)
        first, stop = self.config.sleep.get("loop_range") or (0, blocks)
        return range(0 if number == 1 else first, blocks if number == passes else stop)

    def is_final(self, block: int, number: int, passes: int) -> bool:
        """Whether no later pass runs the block."""
        return not any(block in self.blocks_of_pass(later, passes) for later in range(number + 1, passes + 1))

    def position(self, cache: PowernapCache) -> int:
        """Of the current window's first token: with hard eviction positions begin anew in every window."""
        return cache.seen - cache.read if self.config.sleep.get("eviction") == "sliding" else 0

    def real(self, tokens: torch.LongTensor) -> torch.Tensor | None:
        """[B, n], False at pads, which leave no trace; None: there are none."""
        pad = self.config.model.get("pad_token_id")
        real = None if pad is None else tokens != pad
        return None if real is None or bool(real.all()) else real

    def mask(self, tokens: torch.LongTensor, first: int) -> torch.Tensor:
        """[B or 1, 1, n, tokens]: which of `tokens` those from `first` on see: themselves and the L-1 before, no pads."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        distance = place[first:, None] - place
        seen = ((distance >= 0) & (distance < self.config.model["window"]))[None]
        real = self.real(tokens)
        if real is not None:
            seen = seen & (real[:, None] | (distance == 0))
        return seen[:, None]


PowernapConfig.register_for_auto_class()
PowernapForCausalLM.register_for_auto_class("AutoModelForCausalLM")
