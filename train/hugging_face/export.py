"""A checkpoint as a folder that stock transformers classes load: config.json, safetensors with an index, model card.

A stock class keeps all keys and never sleeps: within one window it computes what Powernap does awake, beyond it does not.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from powernap.model.config import ModelConfig
from powernap.model.parameters import float32_names
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import FILE_MODE
from powernap.train.config import Recipe
from powernap.train.generation.export import export_vocabulary, new_folder
from powernap.train.hugging_face.families import FAMILIES, LETTERS, Family, HuggingFaceError, find_family, model_section
from powernap.train.hugging_face.folder import HuggingFaceFolder, disk_name
from powernap.train.hugging_face.rules import rules
from powernap.train.hugging_face.token_files import write_tokens
from powernap.train.recipe_file import flatten
from powernap.train.weights_folder import CONFIG, INDEX, write_weights

COPIED = ("*.json", "*.txt", "*.jinja", "*.model")  # a tokenizer's and the generation's files
CLASSES = {
    "qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_next": "Qwen3NextForCausalLM", "olmo_hybrid": "OlmoHybridForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "olmo2": "Olmo2ForCausalLM", "llama": "LlamaForCausalLM",
}  # fmt: skip
CARD = """# {name}

Trained with Powernap, exported after step {step:,}. transformers, vLLM and others load it as {kind}.

What they compute is the model awake, with the keys and values of the whole text kept. Powernap evicts them after every {window}
tokens and writes them into fast weights in {passes} passes of sleep; positions and convolutions begin anew there. Up to {window}
tokens both compute the same.
"""


def export_hugging_face(checkpoint: Checkpoint, recipe: Recipe, to: Path, like: Path | None = None) -> Path:
    """Write a checkpoint's model into the new folder `to`, which appears complete or not at all.

    Args:
        like: a folder that the model was started from: its config, its tokenizer, the tensors that are no text model's, and
            the precision of each tensor are kept.

    Raises:
        HuggingFaceError: if no class of transformers computes the model, or `like` is another one.
    """
    source = HuggingFaceFolder.read(like) if like else None
    if source:
        _check_same(source, recipe.model)
        config, family = dict(source.config), find_family(source.config)[0]
    else:
        family = family_of(recipe.model)
        config = {
            "architectures": [CLASSES[family.model_type]],
            "dtype": _dtype_name(recipe),
            **config_of(recipe.model, family),
        }
    with new_folder(to) as unfinished:
        write_weights(unfinished, _tensors(checkpoint, recipe, family, source), FILE_MODE)
        if source:
            for pattern in COPIED:
                for file in sorted(source.path.glob(pattern)):
                    if file.name not in (CONFIG, INDEX):
                        shutil.copyfile(file, unfinished / file.name)
        else:
            config |= write_tokens(unfinished, export_vocabulary(recipe, unfinished) or {}, recipe.model.pad_token_id)
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        card = CARD.format(
            name=recipe.run.name, step=checkpoint.step, kind=family.model_type, window=recipe.model.window,
            passes=max(recipe.sleep.pass_choices),
        )  # fmt: skip
        (unfinished / "README.md").write_text(card)
    return to


def family_of(model: ModelConfig) -> Family:
    """The family that computes `model`.

    Raises:
        HuggingFaceError: naming all fields in which the nearest one differs.
    """
    fields = next((m.model_dump() for m in model.mixers if m.section == "attention"), {})
    if set(model.pattern) == {"A"}:
        kind = "qwen2" if fields["qkv_bias"] else "qwen3" if fields["qk_norm"] else "llama"
        family = FAMILIES["olmo2" if fields["norms"] == "post" else kind]
    elif set(model.pattern) <= {"A", "G"}:
        family = FAMILIES["olmo_hybrid" if fields.get("norms") == "post" else "qwen3_5_text"]
    else:
        raise HuggingFaceError(
            f"model.pattern={model.pattern}: no class of transformers has its blocks; export with --remote-code"
        )
    try:
        section = model_section(config_of(model, family))
    except HuggingFaceError as error:
        raise HuggingFaceError(f"{family.model_type} does not compute this model: {error}") from None
    _compare(
        section,
        model,
        f"{family.model_type} does not compute this model",
        "train with what is there, or export with --remote-code",
    )
    return family


def config_of(model: ModelConfig, family: Family) -> dict[str, Any]:
    """The config.json of `model` as a member of `family`, as far as its fields go."""
    found: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "pad_token_id": model.pad_token_id,
    }
    sections = {mixer.section: mixer for mixer in model.mixers}
    if attention := sections.get("attention"):
        width = attention.width(model)  # type: ignore[attr-defined]
        fields = attention.model_dump()
        rotated = attention.rotated(model)  # type: ignore[attr-defined]
        rope = {"rope_type": "default", "rope_theta": fields["rope_base"] if rotated else None}
        if family.model_type in ("qwen3_5_text", "qwen3_next"):
            rope = {"rope_type": "default", "rope_theta": fields["rope_base"], "partial_rotary_factor": rotated / width}
        found |= {
            "num_attention_heads": fields["heads"],
            "num_key_value_heads": fields["kv_heads"] or fields["heads"],
            "head_dim": width,
            "rope_parameters": rope,
            "attention_bias": False,
        }
    if gdn := sections.get("gdn"):
        fields = gdn.model_dump()
        kinds = {letter: kind for kind, letter in LETTERS.items()}
        found |= {
            "linear_num_value_heads": fields["heads"],
            "linear_num_key_heads": fields["key_heads"] or fields["heads"],
            "linear_key_head_dim": fields["key_dim"],
            "linear_value_head_dim": fields["value_dim"],
            "linear_conv_kernel_dim": fields["conv_kernel"],
            **({"linear_allow_neg_eigval": fields["allow_neg_eigval"]} if family.model_type == "olmo_hybrid" else {}),
            "layer_types": [kinds[letter] for letter in model.pattern],
        }
    return found


def _compare(section: Mapping[str, Any], model: ModelConfig, why: str, instead: str = "") -> None:
    """Raise HuggingFaceError, naming all fields, unless `model` has the fields of `section`; null is the number it stands for."""
    here = flatten(model.model_dump(mode="json"))
    implied = {"attention.kv_heads": here.get("attention.heads"), "gdn.key_heads": here.get("gdn.heads")}
    if (attention := next((m for m in model.mixers if m.section == "attention"), None)) is not None:
        implied["attention.head_dim"] = attention.width(model)  # type: ignore[attr-defined]
        implied["attention.rotary_dims"] = attention.rotated(model)  # type: ignore[attr-defined]
    differ = []
    for key, there in flatten(section).items():
        own = implied.get(key) if here.get(key) is None else here.get(key)
        if own != there:
            differ.append(f"model.{key} is {json.dumps(there)} there, {json.dumps(own)} here")
    if differ:
        raise HuggingFaceError(f"{why}: {', '.join(differ)}{'; ' * bool(instead)}{instead}")


def _check_same(source: HuggingFaceFolder, model: ModelConfig) -> None:
    _compare(source.section, model, f"--like {source.path}: another model")
    source.check(model)


def _tensors(
    checkpoint: Checkpoint, recipe: Recipe, family: Family, source: HuggingFaceFolder | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, in the order of the rules; then what `source` has besides."""
    written, unrounded = set(), float32_names(recipe.model, recipe.sleep)
    for rule in rules(recipe.model, family):
        for name, tensor in zip(rule.theirs, rule.part(checkpoint.whole(rule.ours)), strict=True):
            if source:
                name = source.name_of(name)
                tensor = tensor.to(source.tensor(name).dtype)
            else:
                name = disk_name(name if name.startswith("lm_head.") else f"model.{name}", family)
                is_bf16 = recipe.train.precision == "bf16" and rule.ours not in unrounded
                tensor = tensor.to(torch.bfloat16 if is_bf16 else torch.float32)
            written.add(name)
            yield name, tensor.contiguous()
    for name in source.files if source else ():
        if name not in written:
            assert source is not None
            yield name, source.tensor(name)


def _dtype_name(recipe: Recipe) -> str:
    return "bfloat16" if recipe.train.precision == "bf16" else "float32"
