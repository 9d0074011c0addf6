"""Parameters in Hugging Face's files and ours: one table, used both ways.

Ours are fused and grouped by heads, so that a tensor rank's part is a slice of rows; theirs are apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from powernap.model.config import ModelConfig
from powernap.model.mixers.attention import Attention
from powernap.model.mixers.gated_delta_net import GatedDeltaNet
from powernap.model.mixers.jet_block import JetBlock
from powernap.train.hugging_face.families import Family

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """One parameter of ours.

    Attributes:
        ours: its name.
        theirs: names, without what precedes "layers.", and shapes of the tensors that it is made of.
        join, part: from theirs to ours, and back; views or copies, no arithmetic.
        added_up: rows may be cut elsewhere than at these shapes, as long as there are as many.
    """

    ours: str
    theirs: Mapping[str, tuple[int, ...]]
    join: Callable[[Tensors], torch.Tensor]
    part: Callable[[torch.Tensor], Tensors]
    added_up: bool = False


NORMS = {  # of a block, by where they are; around both as in Ouro
    "pre": {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"},
    "post": {"post_mixer_layernorm": "post_attention_layernorm", "post_mlp_layernorm": "post_feedforward_layernorm"},
    "sandwich": {
        "input_layernorm": "input_layernorm",
        "post_mixer_layernorm": "input_layernorm_2",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "post_mlp_layernorm": "post_attention_layernorm_2",
    },
}


def rules(model: ModelConfig, family: Family) -> list[Rule]:
    """A rule for every parameter of `model`."""
    width, found = model.hidden_size, []
    found.append(_same("embedding.weight", "embed_tokens.weight", model.vocab_size, width))
    for number, mixer in enumerate(model.mixers):
        ours, theirs = f"decoder.layers.{number}.", f"layers.{number}."
        names = NORMS[mixer.norms]
        norms = model.block_norms(number)
        found += [_same(f"{ours}{norm}.weight", f"{theirs}{names[norm]}.weight", width) for norm in norms]
        found += _mlp(f"{ours}mlp.", f"{theirs}mlp.", model)
        if isinstance(mixer, Attention):
            found += _attention(f"{ours}self_attention.", f"{theirs}self_attn.", model, mixer)
        elif isinstance(mixer, JetBlock):
            found += _jet_block(f"{ours}self_attention.", f"{theirs}self_attn.", model, mixer, family)
        else:
            assert isinstance(mixer, GatedDeltaNet)
            found += _gated_delta_net(f"{ours}self_attention.", f"{theirs}linear_attn.", model, mixer, family)
    found.append(_same("decoder.final_layernorm.weight", "norm.weight", width))
    if not model.tie_embeddings:
        found.append(_same("output_layer.weight", "lm_head.weight", model.vocab_size, width))
    return found


def _same(ours: str, theirs: str, *shape: int) -> Rule:
    return Rule(ours, {theirs: shape}, lambda tensors: tensors[0], lambda tensor: [tensor])


def _mlp(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    inner, width = model.mlp.ffn_hidden_size, model.hidden_size
    gate_and_up = {f"{theirs}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return [
        Rule(f"{ours}linear_fc1.weight", gate_and_up, torch.cat, lambda tensor: list(tensor.chunk(2))),
        _same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", width, inner),
    ]


def _attention(ours: str, theirs: str, model: ModelConfig, mixer: Attention) -> list[Rule]:
    """Ours: for each head of keys [q of its queries | their gates | k | v]; theirs: q_proj has [q | gate] for each query."""
    groups, width, hidden = mixer.groups, mixer.width(model), model.hidden_size
    queries, kinds = mixer.heads // groups, 1 + mixer.output_gate

    def join(tensors: Tensors) -> torch.Tensor:
        """Of weights [rows, D] or biases [rows]."""
        q, k, v = tensors
        q = q.unflatten(0, (groups, queries, kinds, width)).transpose(1, 2).flatten(1, 3)
        return torch.cat([q, *(x.unflatten(0, (groups, width)) for x in (k, v))], dim=1).flatten(0, 1)

    def part(tensor: torch.Tensor) -> Tensors:
        q, k, v = tensor.unflatten(0, (groups, -1)).split([queries * kinds * width, width, width], dim=1)
        q = q.unflatten(1, (kinds, queries, width)).transpose(1, 2)
        return [q.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)]

    pairs = (groups * width, hidden)
    projections = {"q": (mixer.heads * kinds * width, hidden), "k": pairs, "v": pairs}
    found = [
        Rule(f"{ours}qkv_proj.weight", {f"{theirs}{n}_proj.weight": s for n, s in projections.items()}, join, part),
        _same(f"{ours}out_proj.weight", f"{theirs}o_proj.weight", hidden, mixer.heads * width),
    ]
    if mixer.qkv_bias:
        biases = {f"{theirs}{n}_proj.bias": (shape[0],) for n, shape in projections.items()}
        found.append(Rule(f"{ours}qkv_proj.bias", biases, join, part))
    heads = {"q": mixer.heads, "k": groups} if mixer.qk_norm_over == "width" else {"q": 1, "k": 1}
    norms = {f"{name}_norm.weight": n * width for name, n in heads.items()} if mixer.qk_norm else {}
    return found + [_same(ours + norm, theirs + norm, size) for norm, size in norms.items()]


def _gated_delta_net(ours: str, theirs: str, model: ModelConfig, mixer: GatedDeltaNet, family: Family) -> list[Rule]:
    """Ours: for each head of keys [q | k | v | z | beta | alpha], the last four of all its heads of values."""
    groups, values, hidden = mixer.groups, mixer.heads // mixer.groups, model.hidden_size
    d_k, all_v, taps = mixer.key_dim, values * mixer.value_dim, mixer.conv_kernel
    sizes = [d_k, d_k, all_v, all_v, values, values]  # rows of a head of keys: q, k, v, z, beta, alpha

    def by_head(tensor: torch.Tensor, *rows: int) -> Tensors:
        """Rows of all heads of the first part, of the second, ... -> each [groups, rows, ...]."""
        return [x.unflatten(0, (groups, -1)) for x in tensor.split([groups * n for n in rows])]

    def join(tensors: Tensors) -> torch.Tensor:
        if family.projections == "keys first":
            qkv, *others = tensors
            parts = [*by_head(qkv, *sizes[:3]), *(x.unflatten(0, (groups, -1)) for x in others)]
        else:
            parts = [x.unflatten(0, (groups, -1)) for x in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def part(tensor: torch.Tensor) -> Tensors:
        rows = tensor.unflatten(0, (groups, -1))
        if family.projections == "apart":
            return [x.flatten(0, 1) for x in rows.split(sizes, dim=1)]
        if family.projections == "keys first":
            q, k, v, *others = (x.flatten(0, 1) for x in rows.split(sizes, dim=1))
            return [torch.cat([q, k, v]), *others]
        return [x.flatten(0, 1) for x in rows.split([sum(sizes[:4]), sum(sizes[4:])], dim=1)]

    def join_taps(tensors: Tensors) -> torch.Tensor:
        return torch.cat(by_head(torch.cat(tensors).squeeze(1), *sizes[:3]), dim=1)

    def part_taps(tensor: torch.Tensor) -> Tensors:
        parts = [x.flatten(0, 1).unsqueeze(1) for x in tensor.split(sizes[:3], dim=1)]
        return parts if family.projections == "apart" else [torch.cat(parts)]

    apart = family.projections == "apart"
    if apart:
        rows = dict(zip("qkvgba", (groups * size for size in sizes), strict=True))
    elif family.projections == "keys first":
        rows = {"qkv": groups * sum(sizes[:3]), "z": groups * all_v, "b": mixer.heads, "a": mixer.heads}
    else:
        rows = {"qkvz": groups * sum(sizes[:4]), "ba": 2 * mixer.heads}
    projections = {
        f"{theirs}{n}_proj.weight" if apart else f"{theirs}in_proj_{n}.weight": (r, hidden) for n, r in rows.items()
    }
    convolutions = {f"{n}_conv1d": groups * size for n, size in zip("qkv", sizes[:3], strict=True)}
    if not apart:
        convolutions = {"conv1d": groups * sum(sizes[:3])}
    kernels = {f"{theirs}{n}.weight": (channels, 1, taps) for n, channels in convolutions.items()}
    norm, out = ("o_norm", "o_proj") if apart else ("norm", "out_proj")
    return [
        Rule(f"{ours}in_proj.weight", projections, join, part),
        # transformers 5 cuts the convolution of OLMo-Hybrid into equal thirds when it saves it.
        Rule(f"{ours}conv_weight", kernels, join_taps, part_taps, added_up=apart),
        _same(f"{ours}A_log", f"{theirs}A_log", mixer.heads),
        _same(f"{ours}dt_bias", f"{theirs}dt_bias", mixer.heads),
        _same(f"{ours}norm.weight", f"{theirs}{norm}.weight", mixer.value_dim),
        _same(f"{ours}out_proj.weight", f"{theirs}{out}.weight", hidden, mixer.heads * mixer.value_dim),
    ]


def _jet_block(ours: str, theirs: str, model: ModelConfig, mixer: JetBlock, family: Family) -> list[Rule]:
    """A gated delta net's, but for the convolution: W_1, W_2 and its bias."""
    width, taps, narrow = mixer.heads * mixer.value_dim, mixer.conv_kernel, mixer.generator_dim
    generator, groups = f"{theirs}dynamic_conv1d.kernel_generator.", mixer.groups

    def join(tensors: Tensors) -> torch.Tensor:
        return tensors[0].unflatten(0, (groups, -1))

    def part(tensor: torch.Tensor) -> Tensors:
        return [tensor.flatten(0, 1)]

    others = [r for r in _gated_delta_net(ours, theirs, model, mixer, family) if r.ours != f"{ours}conv_weight"]
    return [
        *others,
        _same(f"{ours}generator_in.weight", f"{generator}w1.weight", narrow, model.hidden_size),
        Rule(f"{ours}generator_out", {f"{generator}w2.weight": (width * taps, narrow)}, join, part),
        Rule(f"{ours}generator_bias", {f"{generator}w2.bias": (width * taps,)}, join, part),
    ]
