"""Families of models in Hugging Face's format that Powernap computes: their config.json as a recipe's model section.

Nothing here imports torch, and nothing needs transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from powernap.model.errors import PowernapError

L2_EPS = 1e-6  # of the L2 norm in transformers' gated delta nets, which no config holds
OLMO_NORM_EPS = 1e-5  # of the output's norm in OLMo-Hybrid's, FLA's default
LETTERS = {"full_attention": "A", "linear_attention": "G"}


class HuggingFaceError(PowernapError):
    """A folder that cannot be read as a model, in one line."""


@dataclass(frozen=True)
class Family:
    """A model_type.

    Attributes:
        model_type: in config.json, or in its text_config.
        section: config -> fields of the model section that decide what the weights compute.
        projections: of a gated delta net: "keys first", [q | k | v] and z, b, a over all heads; "grouped" by heads of keys,
            [q | k | v | z] and [b | a]; or all six "apart".
        on_disk: parts of names in files -> those in memory, where both are found; exports have the former.
    """

    model_type: str
    section: Callable[[Mapping[str, Any]], dict[str, Any]]
    projections: Literal["keys first", "grouped", "apart"] = "keys first"
    on_disk: Mapping[str, str] = field(default_factory=dict)


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", None if config.get("model_type") == "olmo_hybrid" else 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    has_positions = rope.get("rope_theta") is not None
    rotated = round(width * rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(kind == "default", f"rope_type={kind}: only plain rotary embeddings are computed")
    for switch in ("attention_bias", "mlp_bias", "use_sliding_window"):
        _require(not config.get(switch), f"{switch}=true is not computed")
    _require(
        config.get("hidden_act", "silu") == "silu", f"hidden_act={config.get('hidden_act')}: only silu is computed"
    )
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "mlp": {"ffn_hidden_size": config["intermediate_size"]},
        "attention": {
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": width,
            **({"rope_base": float(rope["rope_theta"])} if has_positions else {}),
            "rotary_dims": rotated if has_positions else 0,
            "qk_norm": False, "output_gate": False, "qkv_bias": False, "norms": "pre",
        },
    }  # fmt: skip


NORMED = {"qk_norm": True, "qk_norm_over": "head"}
OLMO = {"qk_norm": True, "qk_norm_over": "width", "norms": "post"}


def _plain(**attention: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Attention alone, with these fields."""

    def section(config: Mapping[str, Any]) -> dict[str, Any]:
        found = _common(config)
        found["attention"] |= attention
        return found | {"pattern": "A" * config["num_hidden_layers"], "zero_centred_norms": False}

    return section


def _qwen_hybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _hybrid(config)
    found["attention"] |= {**NORMED, "output_gate": True}
    found["gdn"] |= {"allow_neg_eigval": False}
    return found | {"zero_centred_norms": True}


def _olmo_hybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _hybrid(config)
    found["attention"] |= OLMO
    found["gdn"] |= {"allow_neg_eigval": config["linear_allow_neg_eigval"], "norm_eps": OLMO_NORM_EPS}
    return found | {"zero_centred_norms": False}


JET_LETTERS = {"attn": "A", "swa": "S", "jet": "J"}


def _jet_nemotron(config: Mapping[str, Any]) -> dict[str, Any]:
    """Attention with biases, the same with a reach, and Jet blocks (jetai/modeling/hf of its repository)."""
    found, kinds, own = _common(config), config["layer_types"], config["efficient_attention_config"]
    unknown = [kind for kind in kinds if kind not in JET_LETTERS]
    _require(not unknown, f"layer_types: {', '.join(unknown[:1])} is not computed")
    found["attention"] |= {"qkv_bias": True}
    if "swa" in kinds:
        found["sliding_attention"] = {**found["attention"], "reach": own["swa"]["window_size"]}
    if "jet" in kinds:
        jet = {
            "expand_v": 2.0,
            "num_heads": 6,
            "head_dim": 256,
            "norm_eps": 1e-5,
            "conv_size": 4,
            "dconv_generator_reduction": 8,
        }
        jet |= own["jet"]
        d_v = int(jet["head_dim"] * jet["expand_v"])
        found["jet"] = {
            "heads": jet["num_heads"], "key_dim": jet["head_dim"], "value_dim": d_v, "conv_kernel": jet["conv_size"],
            "generator_dim": jet["num_heads"] * d_v // jet["dconv_generator_reduction"],
            "norm_eps": float(jet["norm_eps"]), "scale_queries": True, "l2_eps": L2_EPS, "norms": "pre",
            "allow_neg_eigval": False,
        }  # fmt: skip
    return found | {"pattern": "".join(JET_LETTERS[kind] for kind in kinds), "zero_centred_norms": False}


def _hybrid(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(
        not config.get("num_experts"), f"num_experts={config.get('num_experts')}: mixtures of experts are not computed"
    )
    found = _common(config)
    gdn = {
        "heads": config["linear_num_value_heads"],
        "key_heads": config["linear_num_key_heads"],
        "key_dim": config["linear_key_head_dim"],
        "value_dim": config["linear_value_head_dim"],
        "conv_kernel": config["linear_conv_kernel_dim"],
        "scale_queries": True,
        "l2_eps": L2_EPS,
        "norms": "pre",
    }
    kinds = config["layer_types"]
    unknown = [kind for kind in kinds if kind not in LETTERS]
    _require(not unknown, f"layer_types: {', '.join(unknown[:1])} is not computed")
    return found | {"pattern": "".join(LETTERS[kind] for kind in kinds), "gdn": gdn}


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3_5_text", _qwen_hybrid),
        Family("qwen3_next", _qwen_hybrid, projections="grouped"),
        Family(
            "olmo_hybrid",
            _olmo_hybrid,
            projections="apart",
            on_disk={"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"},
        ),
        Family("qwen3", _plain(**NORMED)),
        Family("qwen2", _plain(qkv_bias=True)),
        Family("olmo2", _plain(**OLMO)),
        Family("ouro", _plain(norms="sandwich")),
        Family("jet_nemotron", _jet_nemotron, projections="apart"),
        Family("llama", _plain()),
    )
}


def find_family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, and the part of it that describes the text model.

    Raises:
        HuggingFaceError: if it is of another family.
    """
    text = config.get("text_config", config)  # in models of several modalities the text model is a part
    kind = text.get("model_type")
    if kind not in FAMILIES:
        raise HuggingFaceError(f"model_type={kind}: computed are {', '.join(FAMILIES)}")
    return FAMILIES[kind], text


def model_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe's model section that a config.json fixes.

    Raises:
        HuggingFaceError: naming the field that is missing or has a value that Powernap does not compute.
    """
    family, text = find_family(config)
    try:
        return family.section(text)
    except KeyError as error:
        raise HuggingFaceError(f"{error.args[0]} is missing") from None


def _require(condition: object, message: str) -> None:
    if not condition:
        raise HuggingFaceError(message)
