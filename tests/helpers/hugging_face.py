"""Tiny random models that transformers itself makes and saves, and ours with their weights: its code is the reference, and no
weights can be downloaded here."""

from pathlib import Path

import torch

from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.stage import HybridStage
from powernap.train.hugging_face.families import find_family
from powernap.train.hugging_face.folder import HuggingFaceFolder, HuggingFaceShards

WINDOW = 24
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
LINEAR = dict(
    linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
)  # fmt: skip
NONE = {"pad_token_id": None, "eos_token_id": None}  # their defaults are beyond these vocabularies
SIZES_OF_HEADS = NONE | {name: size for name, size in SIZES.items() if name != "head_dim"}  # width: that of all heads
# name: transformers' class and config, fields
MODELS = {
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", SIZES | LINEAR),
    "qwen3_5, tied": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", SIZES | LINEAR | {"tie_word_embeddings": True}),
    "qwen3_5, shared keys": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", SIZES | LINEAR | {"linear_num_key_heads": 2}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SIZES | LINEAR | {"linear_num_key_heads": 2, "num_experts": 0}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES_OF_HEADS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES_OF_HEADS),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", SIZES_OF_HEADS | LINEAR | {"linear_num_key_heads": 2}),
    "olmo_hybrid, no positions": (
        "OlmoHybridForCausalLM", "OlmoHybridConfig", SIZES_OF_HEADS | LINEAR | {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    ),
}  # fmt: skip
HYBRIDS = [name for name, (_, _, fields) in MODELS.items() if fields.keys() >= LINEAR.keys()]


def make(name: str, folder: Path, **changes):
    """transformers' model of that name, saved in `folder`; changes: of the fields that it has."""
    import transformers

    model_class, config_class, fields = MODELS[name]
    fields = fields | {field: value for field, value in changes.items() if field in fields}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
    with torch.no_grad():  # norms and gates away from their initial values, projections larger than 0.02
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def ours(folder, topology, dtype=torch.float32) -> HybridStage:
    read = HuggingFaceFolder.read(folder)
    model = ModelConfig(window=WINDOW, **read.section)
    read.check(model)
    stage = HybridStage(model, SleepConfig(), topology.groups).to(dtype)
    shards = HuggingFaceShards(read, model)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(shards.shard(name, None, 0, 1))
    return stage


def some_tokens(length=20):
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))


def gradients_of(rule, parameters):
    """Of the tensors of a rule, from transformers' parameters: OLMo-Hybrid's convolution is three in files, one in memory."""
    names = [name if name.startswith("lm_head.") else f"model.{name}" for name in rule.theirs]
    if names[0] in parameters:
        return [parameters[name].grad for name in names]
    whole = parameters[names[0].replace("q_conv1d", "conv1d")].grad
    return list(whole.split([shape[0] for shape in rule.theirs.values()]))


def segments(stage, tokens, loss_mask):
    return plan_segments(tokens, loss_mask, stage.model, stage.sleep, 1)


def family(read):
    return find_family(read.config)[0]
