"""Models in Hugging Face's format, in and out, against transformers: logits, gradients, decoding, every bit; what does not fit
is named.

Tiny random models that transformers itself makes and saves: its code is the reference, and no weights can be downloaded here.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from powernap.launch import cli
from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.mixers.delta_rule import sequential_delta_rule
from powernap.model.stage import HybridStage
from powernap.train.hugging_face.export import export_hugging_face, family_of
from powernap.train.hugging_face.families import HuggingFaceError, find_family
from powernap.train.hugging_face.folder import HuggingFaceFolder, HuggingFaceShards
from powernap.train.hugging_face.recipe import recipe_of
from powernap.train.hugging_face.rules import rules
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs, tiny
from tests.helpers.mixers import training_logits

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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (transformers' model, the folder it was saved in)."""
    import transformers

    made = {}
    for name, (model_class, config_class, fields) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
        with torch.no_grad():  # norms and gates away from their initial values, projections larger than 0.02
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("hf") / name.replace(", ", "-").replace(" ", "-")
        model.save_pretrained(folder)
        made[name] = (model, folder)
    return made


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


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(models, topology, name):
    reference, folder = models[name]
    stage, tokens = ours(folder, topology), some_tokens()
    found = training_logits(stage, tokens, 1)
    expected = reference(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    targets, loss_mask = some_tokens(21), torch.ones(2, 21, dtype=torch.bool)
    (segment,) = segments(stage, targets, loss_mask)
    hidden_states, _ = stage(segment, targets[:, :-1], None, stage.empty_layer_states(2))
    stage.loss(hidden_states, targets[:, 1:], loss_mask[:, 1:]).backward()
    reference.zero_grad()
    logits = reference(targets[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").backward()
    read, theirs = HuggingFaceFolder.read(folder), dict(reference.named_parameters())
    gradients = dict(stage.named_parameters())
    for rule in rules(stage.model, family(read)):
        expected = rule.join(gradients_of(rule, theirs))
        torch.testing.assert_close(
            gradients[rule.ours].grad, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max())
        )


MUTATIONS = {  # what an importer may get wrong -> the model, fields that are so
    "epsilon of the norms": ("qwen3", {"norm_eps": 1e-4}),
    "scale of the queries": ("qwen3_5", {"gdn": {"scale_queries": False}}),
    "epsilon of the L2 norm": ("qwen3_5", {"gdn": {"l2_eps": 0.0}}),
    "epsilon of the output's norm": ("olmo_hybrid", {"gdn": {"norm_eps": 1e-6}}),
    "write strength to 1": ("olmo_hybrid", {"gdn": {"allow_neg_eigval": False}}),
    "rotated dimensions": ("qwen3_5", {"attention": {"rotary_dims": 16}}),
    "base of the rotation": ("llama", {"attention": {"rope_base": 1e5}}),
    "1 + w": ("qwen3_5", {"zero_centred_norms": False}),
    "norms over heads": ("olmo2", "q_norm of each head"),
    "gate and query exchanged": ("qwen3_5", "gate before query"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(models, topology, mutation):
    name, fields = MUTATIONS[mutation]
    reference, folder = models[name]
    stage = ours(folder, topology)
    if isinstance(fields, dict):
        section = stage.model.model_dump()
        changed = {k: section[k] | v if isinstance(v, dict) else v for k, v in fields.items()}
        model = ModelConfig(**{k: v for k, v in section.items() if v is not None} | changed)
        mutated = HybridStage(model, SleepConfig(), topology.groups)
        mutated.load_state_dict(stage.state_dict())
        stage = mutated
    for layer in stage.decoder.layers:
        mixer = layer.self_attention
        if fields == "q_norm of each head":
            mixer.q_norm.forward = lambda x, norm=mixer.q_norm: torch.nn.functional.rms_norm(
                x, x.shape[-1:], eps=norm.eps
            )
        elif fields == "gate before query" and hasattr(mixer, "q_norm"):
            rows = mixer.qkv_proj.weight.data.view(2, -1, 16, 32)  # groups, [two queries | two gates | k | v]
            rows[:, :4] = rows[:, [2, 3, 0, 1]]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(
            training_logits(stage, some_tokens(), 1), reference(some_tokens()).logits, rtol=0, atol=2e-5
        )


def ouro(weights, config, tokens):
    """Ouro's block (arXiv 2510.25741) written out: a norm before and after attention and MLP; one step of its loop."""

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weights[f"model.{name}.weight"], config["rms_norm_eps"])

    heads, length = config["num_attention_heads"], tokens.shape[1]
    x = weights["model.embed_tokens.weight"][tokens]
    width = x.shape[-1] // heads
    angles = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    for block in range(config["num_hidden_layers"]):
        prefix = f"layers.{block}."

        def project(y, name, prefix=prefix):
            return y @ weights[f"model.{prefix}{name}.weight"].T

        y = norm(x, f"{prefix}input_layernorm")
        q, k, v = (project(y, f"self_attn.{n}_proj").unflatten(-1, (heads, width)).transpose(1, 2) for n in "qkv")
        q, k = (
            torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
            for a, b in (t.chunk(2, -1) for t in (q, k))
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + norm(project(attended, "self_attn.o_proj"), f"{prefix}input_layernorm_2")
        y = norm(x, f"{prefix}post_attention_layernorm")
        y = project(torch.nn.functional.silu(project(y, "mlp.gate_proj")) * project(y, "mlp.up_proj"), "mlp.down_proj")
        x = x + norm(y, f"{prefix}post_attention_layernorm_2")
    return norm(x, "norm") @ weights["lm_head.weight"].T


def test_ouro(topology, tmp_path, monkeypatch):
    """Random weights of its shape: its own are not to be had here, nor is a class of transformers."""
    config = {
        "model_type": "ouro", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "total_ut_steps": 4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder = tmp_path / "ouro"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(window=WINDOW, **find_family(config)[0].section(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {n: s for rule in rules(model, find_family(config)[0]) for n, s in rule.theirs.items()}
    weights = {
        n if n.startswith("lm_head.") else f"model.{n}": torch.randn(s, generator=generator)
        / (s[-1] ** 0.5 if len(s) == 2 else 1)
        for n, s in shapes.items()
    }
    save_file(weights | {"model.early_exit_gate.weight": torch.ones(1, 32)}, folder / "model.safetensors")
    assert {n for n in weights if "layers.0." in n and "norm" in n} == {
        f"model.layers.0.{n}.weight"
        for side in ("input_layernorm", "post_attention_layernorm")
        for n in (side, f"{side}_2")
    }
    found = training_logits(ours(folder, topology), some_tokens(), 1)
    torch.testing.assert_close(found, ouro(weights, config, some_tokens()), rtol=0, atol=2e-5)

    # Its loop norms between steps with the last norm: so does a run whose passes have one.
    monkeypatch.chdir(tmp_path)
    runs.prepare(tmp_path)
    assert cli.main(["import", str(folder), "--recipe", "ouro.yaml", "--window", "12"]) == 0
    shutil.copyfile("ouro.yaml", "tiny.yaml")
    changes = [
        "sleep.pass_norm=true",
        "sleep.every_window=false",
        "data.train=data/train-*.tar",
        "data.sequence_length=24",
    ]
    small = [
        "train.steps=1",
        "optimizer.lr=1e-30",
        "optimizer.warmup_steps=1",
        "train.global_batch_size=4",
        "model.pad_token_id=0",
    ]
    run = runs.train_in_turn(tmp_path, 1, {"looped": [*changes, *small, "train.precision=fp32"]})["looped"]
    assert torch.equal(runs.weights(run)["pass_norm.weight"], weights["model.norm.weight"])


def jet(weights, config, tokens):
    """Jet-Nemotron written out: attention with biases, over all or the nearest tokens, and Jet blocks token by token."""

    def norm(x, name):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weights[f"model.{name}.weight"], config["rms_norm_eps"])

    own, (batch, length) = config["efficient_attention_config"], tokens.shape
    x, silu = weights["model.embed_tokens.weight"][tokens], torch.nn.functional.silu
    for block, kind in enumerate(config["layer_types"]):

        def p(name, block=block):
            return weights.get(f"model.layers.{block}.{name}")

        def project(y, name, p=p):
            return torch.nn.functional.linear(y, p(f"{name}.weight"), p(f"{name}.bias"))

        y = norm(x, f"layers.{block}.input_layernorm")
        q, k, v = (project(y, f"self_attn.{n}_proj") for n in "qkv")
        if kind == "jet":
            heads, d_k = own["jet"]["num_heads"], own["jet"]["head_dim"]
            kernels = project(silu(project(y, f"{DYNAMIC}w1")), f"{DYNAMIC}w2").view(batch, length, v.shape[-1], -1)
            taps, mixed = kernels.shape[-1], torch.zeros_like(v)
            for t in range(length):
                for i in range(max(0, taps - 1 - t), taps):
                    mixed[:, t] += kernels[:, t, :, i] * v[:, t - taps + 1 + i]
            q, k, v = (silu(u).unflatten(-1, (heads, -1)) for u in (q, k, mixed))
            q, k = (u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6) for u in (q, k))
            beta = project(y, "self_attn.b_proj").sigmoid()
            step = torch.nn.functional.softplus(project(y, "self_attn.a_proj") + p("self_attn.dt_bias"))
            g = -p("self_attn.A_log").exp() * step
            empty = torch.zeros(batch, heads, d_k, v.shape[-1])
            mixed, _ = sequential_delta_rule(q / d_k**0.5, k, v, g, beta, empty)
            mixed = torch.nn.functional.rms_norm(
                mixed, mixed.shape[-1:], p("self_attn.o_norm.weight"), own["jet"]["norm_eps"]
            )
            mixed = (mixed * silu(project(y, "self_attn.g_proj").unflatten(-1, (heads, -1)))).flatten(2)
        else:
            heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
            width = x.shape[-1] // heads
            q, k, v = (u.unflatten(-1, (-1, width)).transpose(1, 2) for u in (q, k, v))
            angles = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
            q, k = (
                torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
                for a, b in (u.chunk(2, -1) for u in (q, k))
            )
            k, v = (u.repeat_interleave(heads // groups, dim=1) for u in (k, v))
            reach = own["swa"]["window_size"] if kind == "swa" else length
            distance = torch.arange(length)[:, None] - torch.arange(length)
            mask = (distance >= 0) & (distance < reach)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + project(mixed, "self_attn.o_proj")
        y = norm(x, f"layers.{block}.post_attention_layernorm")
        x = x + project(silu(project(y, "mlp.gate_proj")) * project(y, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "norm") @ weights["model.embed_tokens.weight"].T


DYNAMIC = "self_attn.dynamic_conv1d.kernel_generator."


def test_jet_nemotron(topology, tmp_path, monkeypatch):
    """Random weights of its shape: its own are not to be had here, and its code needs kernels."""
    config = {
        "model_type": "jet_nemotron", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "layer_types": ["jet", "swa", "jet", "attn"], "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "efficient_attention_config": {
            "swa": {"window_size": 5},
            "jet": {"num_heads": 2, "head_dim": 8, "expand_v": 1.5, "norm_eps": 1e-5, "dconv_generator_reduction": 4},
        },
    }  # fmt: skip
    folder = tmp_path / "jet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(window=WINDOW, **find_family(config)[0].section(config))
    assert model.pattern == "JSJA" and model.jet.generator_dim == 6 and model.sliding_attention.reach == 5
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.{n}": s for rule in rules(model, find_family(config)[0]) for n, s in rule.theirs.items()}
    weights = {n: torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) == 2 else 1) for n, s in shapes.items()}
    assert {n.split("self_attn.")[1] for n in weights if "layers.0.self_attn" in n} == {
        *(f"{n}_proj.weight" for n in "qkvbago"), "A_log", "dt_bias", "o_norm.weight",
        *(f"dynamic_conv1d.kernel_generator.{n}" for n in ("w1.weight", "w2.weight", "w2.bias")),
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors")
    found = training_logits(ours(folder, topology, torch.float64), some_tokens(), 1)
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    expected = jet({name: weight.double() for name, weight in weights.items()}, config, some_tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the reference's angles are float32


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


class InFloat64(TorchFunctionMode):
    """Inside, float64 where transformers asks for float32, as in its norms, angles and delta rule."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value in (torch.float32, torch.float) else value

        if function is torch.Tensor.float:
            return args[0].double()
        kwargs = {
            name: wide(value) if isinstance(value, torch.dtype) else value for name, value in (kwargs or {}).items()
        }
        return function(*(wide(v) if isinstance(v, torch.dtype) else v for v in args), **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_in_float64(models, topology, name):
    """Logits and all gradients of both, with nothing in float32: what is left is not rounding that hides a difference."""
    import transformers

    reference, folder = models[name]
    stage, tokens = ours(folder, topology, torch.float64), some_tokens(21)
    model_class, config_class, fields = MODELS[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # tables that it makes when it is built
    try:
        with InFloat64():
            exact = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).double().eval()
            exact.load_state_dict(reference.state_dict())
            exact.config._attn_implementation = "eager"
            logits = exact(tokens[:, :-1]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    finally:
        torch.set_default_dtype(default)
    assert logits.dtype == torch.float64
    found = training_logits(stage, tokens[:, :-1], 1)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)
    loss_mask = torch.ones(2, 21, dtype=torch.bool)
    (segment,) = segments(stage, tokens, loss_mask)
    hidden_states, _ = stage(segment, tokens[:, :-1], None, stage.empty_layer_states(2))
    stage.loss(hidden_states, tokens[:, 1:], loss_mask[:, 1:]).backward()
    read, theirs, gradients = (
        HuggingFaceFolder.read(folder),
        dict(exact.named_parameters()),
        dict(stage.named_parameters()),
    )
    for rule in rules(stage.model, family(read)):
        expected = rule.join(gradients_of(rule, theirs))
        torch.testing.assert_close(
            gradients[rule.ours].grad, expected, rtol=0, atol=1e-12 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", ["qwen3_5, shared keys", "qwen3", "olmo_hybrid"])
def test_decoding_token_by_token(models, topology, name):
    reference, folder = models[name]
    decoder = Decoder(ours(folder, topology), 1, 2)
    found = torch.cat(
        [torch.stack(decoder.feed_with_logits(part.tolist())) for part in some_tokens().split(1, 1)], dim=1
    )
    torch.testing.assert_close(found, reference(some_tokens()).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit(models, name):
    read = HuggingFaceFolder.read(models[name][1])
    for rule in rules(ModelConfig(window=8, **read.section), family(read)):
        tensors = [read.tensor(read.name_of(tensor)) for tensor in rule.theirs]
        back = rule.part(rule.join(tensors))
        assert [tuple(t.shape) for t in back] == list(rule.theirs.values())
        if rule.added_up:
            tensors, back = [torch.cat(tensors)], [torch.cat(back)]
        assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))


@pytest.fixture
def nested(models, tmp_path):
    """As released: the text model inside one that sees, two files with an index, bfloat16, further heads."""
    source = models["qwen3_5"][1]
    weights = {
        name.replace("model.", "model.language_model.", 1): t.bfloat16()
        for name, t in load_file(source / "model.safetensors").items()
    }
    weights |= {"model.visual.patch.weight": torch.ones(3, 4), "mtp.fc.weight": torch.ones(2, 2)}
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in files.items():
        save_file({name: weights[name].contiguous() for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    return tmp_path  # fmt: skip


def test_a_text_model_inside_a_larger_one(nested, models, topology, capsys):
    found = training_logits(ours(nested, topology), some_tokens(), 1)
    assert (found - models["qwen3_5"][0](some_tokens()).logits).abs().max() < 0.5  # weights rounded to bfloat16
    assert cli.main(["import", str(nested)]) == 0
    said = capsys.readouterr().out
    assert "qwen3_5_text, 53.2k numbers in 2 files" in said
    assert "not read: 1 tensors model.visual.*" in said and "not read: 1 tensors mtp.*" in said


@pytest.mark.parametrize(("pad", "end", "expected"), [(5, 6, 5), (6, 6, None), (None, 6, None)])
def test_the_end_of_a_document_is_no_pad(models, tmp_path, pad, end, expected):
    folder = shutil.copytree(models["llama"][1], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    assert recipe_of(HuggingFaceFolder.read(folder), 12)[0].model.pad_token_id == expected


LAYOUTS = {"one": (1, []), "tensor": (2, ["parallel.tensor=2"]), "pipeline": (2, ["parallel.pipeline=2"]),
           "zero3": (2, ["parallel.data=2", "zero.stage=3"])}  # fmt: skip


def test_training_starts_from_it_in_every_layout_and_sleeps(models, tmp_path):
    """The first loss at N=2 over two windows is the same in each, and near what the next steps have."""
    folder = shutil.copytree(models["qwen3_5, shared keys"][1], tmp_path / "base")
    assert cli.main(["import", str(folder), "--recipe", str(tmp_path / "tiny.yaml"), "--window", "12"]) == 0
    runs.prepare(tmp_path / "shards")
    changes = [
        "data.train=shards/data/train-*.tar", "data.sequence_length=24", "model.pad_token_id=0", "train.precision=fp32",
        "train.steps=2", "train.global_batch_size=8", "optimizer.warmup_steps=1", "sleep.every_window=false",
    ]  # fmt: skip
    found = {}
    for processes in (1, 2):
        chosen = {name: [*changes, *overrides] for name, (needs, overrides) in LAYOUTS.items() if needs == processes}
        found |= runs.train_in_turn(tmp_path, processes, chosen)
    losses = {name: [line["loss"] for line in read_metrics(run / "metrics.jsonl")] for name, run in found.items()}
    for name in LAYOUTS:
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
    assert f"weights of {folder}" in (found["one"] / "logs" / "train.log").read_text()
    assert RunFolder(found["one"]).recipe().train.start_from == str(folder)


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


Q, MISSING = "model.layers.3.self_attn.q_proj.weight", "model.layers.0.linear_attn.A_log"
WRONG = {
    "missing": (lambda folder: damage(folder, lambda w: w.pop(MISSING)), f"has no {MISSING}"),
    "transposed": (lambda folder: damage(folder, lambda w: w.update({Q: w[Q].T})), f"{Q} is [32, 128], not [128, 32]"),
    "of another type": (
        lambda folder: damage(folder, lambda w: w.update({Q: w[Q].to(torch.int8)})),
        f"{Q} is I8: weights are read as BF16, F16, F32, F64",
    ),
    "one more": (
        lambda folder: damage(folder, lambda w: w.update({"model.layers.0.bias": w[MISSING] + 1})),
        "has model.layers.0.bias, which no rule reads",
    ),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900]),
        "model.safetensors: cannot be read",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    "another family": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        "config.json: model_type=gpt2: computed are qwen3_5_text, qwen3_next, olmo_hybrid, qwen3, qwen2, olmo2, ouro, jet_nemotron, llama",
    ),
    "half a config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        "config.json: num_attention_heads is missing",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_folder_that_does_not_fit_is_one_line(models, tmp_path, capfd, wrong):
    folder = shutil.copytree(models["qwen3_5"][1], tmp_path / "base")
    change, message = WRONG[wrong]
    change(folder)
    runs.assert_refused(["import", str(folder)], capfd, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act=gelu: only silu is computed"),
        ("attention_bias", True, "attention_bias=true is not computed"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_type=yarn: only plain rotary"),
        ("num_experts", 8, "num_experts=8: mixtures of experts"),
        ("layer_types", ["sliding_attention"] * 4, "layer_types: sliding_attention is not computed"),
    ],
)
def test_what_is_not_computed_is_refused(models, tmp_path, capfd, field, value, message):
    folder = shutil.copytree(models["qwen3_5"][1], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    runs.assert_refused(["import", str(folder)], capfd, message)


def test_a_recipe_of_another_function_is_refused(models, tmp_path, capfd, monkeypatch):
    """No shape tells that the base of the rotation differs."""
    monkeypatch.chdir(tmp_path)
    folder = models["qwen3_5"][1]
    assert cli.main(["import", str(folder), "--recipe", "base.yaml", "--window", "12"]) == 0
    runs.prepare(tmp_path)
    changes = [
        "data.train=data/train-*.tar",
        "data.sequence_length=24",
        "model.pad_token_id=0",
        "sleep.every_window=false",
    ]
    load_recipe("base.yaml", changes)
    runs.assert_refused(
        ["train", "base.yaml", *changes, "model.attention.rope_base=500"],
        capfd,
        "attention.rope_base is 10000.0 there, 500.0",
    )
    runs.assert_refused(["import", str(folder), "--recipe", "base.yaml"], capfd, "base.yaml exists")


EXPORTED = {"qwen3_5, tied": ["parallel.tensor=2"], "qwen3_5, shared keys": ["parallel.tensor=2", "parallel.pipeline=1"],
            "qwen3_next": ["parallel.pipeline=2"], "llama": ["parallel.data=2", "zero.stage=3"],
            "qwen2": ["parallel.tensor=2"], "olmo2": ["parallel.tensor=2", "parallel.sequence=true"],
            "olmo_hybrid, no positions": ["parallel.tensor=2"],
            "qwen3_5": ["parallel.tensor=2", "parallel.pipeline=2"]}  # fmt: skip


@pytest.fixture(scope="module")
def untouched(models, tmp_path_factory):
    """name -> a run that started from the model and took one step, too small to change a bit."""
    place = tmp_path_factory.mktemp("untouched")
    runs.prepare(place)
    found = {}
    for number, (name, layout) in enumerate(EXPORTED.items()):
        recipe = place / f"{number}.yaml"
        assert cli.main(["import", str(models[name][1]), "--recipe", str(recipe), "--window", "12"]) == 0
        (place / "tiny.yaml").write_text(recipe.read_text())
        changes = [
            "data.train=data/train-*.tar", "data.sequence_length=24", "model.pad_token_id=0", "train.precision=fp32",
            "train.steps=1", "train.global_batch_size=8", "optimizer.warmup_steps=1", "optimizer.lr=1e-30",
            "sleep.every_window=false", *layout,
        ]  # fmt: skip
        processes = 4 if {"parallel.tensor=2", "parallel.pipeline=2"} <= {*layout} else 2
        found[name] = runs.train_in_turn(place, processes, {f"run{number}": changes})[f"run{number}"]
    return found


def all_tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", EXPORTED)
def test_out_again_every_bit(models, untouched, tmp_path, name):
    """Through training in another layout; and what came out computes in transformers what went in."""
    import transformers

    reference, source = models[name]
    for options in ([], ["--like", str(source)]):
        to = tmp_path / f"out{len(options)}"
        assert cli.main(["checkpoint", "export", str(untouched[name]), str(to), "--format", "hf", *options]) == 0
        one, other = all_tensors(source), all_tensors(to)
        if name == "qwen3_next" and not options:  # without --like it is written as Qwen3.5, which groups other rows
            assert sum(t.numel() for t in one.values()) == sum(t.numel() for t in other.values())
        else:
            assert one.keys() == other.keys()
            cut = [key for key in one if "_conv1d" in key]  # elsewhere than transformers cuts it: see rules.py
            assert all(torch.equal(one[key], other[key]) for key in one if key not in cut)
        again = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
        torch.testing.assert_close(again(some_tokens()).logits, reference(some_tokens()).logits, rtol=0, atol=2e-5)
        assert "evicts them after every 12" in (to / "README.md").read_text()


def test_like_keeps_precision_and_what_is_no_text_model(nested, models, untouched, tmp_path, monkeypatch):
    monkeypatch.setattr("powernap.train.weights_folder.FILE_BYTES", 40_000)
    run = shutil.copytree(untouched["qwen3_5, shared keys"], tmp_path / "run")  # of another model
    with pytest.raises(HuggingFaceError, match="gdn.key_heads is 4 there, 2 here"):
        export_hugging_face(RunFolder(run).newest_checkpoint(), RunFolder(run).recipe(), tmp_path / "other", nested)
    assert not (tmp_path / "other").exists()

    place = tmp_path / "train"
    place.mkdir()
    runs.prepare(place)
    assert cli.main(["import", str(nested), "--recipe", str(place / "again.yaml"), "--window", "12"]) == 0
    (nested / "tokenizer.json").write_text("{}")  # any file: it is copied
    shutil.copy(place / "again.yaml", place / "tiny.yaml")
    changes = [
        "data.train=data/train-*.tar",
        "data.sequence_length=24",
        "model.pad_token_id=0",
        "train.steps=1",
        "optimizer.lr=1e-30",
    ]
    changes += ["train.global_batch_size=8", "optimizer.warmup_steps=1", "sleep.every_window=false"]
    trained = RunFolder(runs.train_in_turn(place, 1, {"bf16": changes})["bf16"])
    export_hugging_face(trained.newest_checkpoint(), trained.recipe(), tmp_path / "out", nested)
    one, other = all_tensors(nested), all_tensors(tmp_path / "out")
    assert one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (
        len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        and HuggingFaceFolder.read(tmp_path / "out").section
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "AM", "mamba2": {"heads": 2, "head_dim": 4, "state_dim": 4}}, "model.pattern=AM: no class of transformers"),
        ({"pattern": "AG"}, "qwen3_5_text does not compute this model: model.attention.qk_norm is True there, False here"),
        ({"pattern": "A", "attention": {"heads": 2, "output_gate": True}}, "llama does not compute this model: model.attention.output_gate"),
    ],
    ids=lambda value: value["pattern"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_model_that_no_class_computes_is_named(fields, message):
    with pytest.raises(HuggingFaceError, match=message.replace(".", r"\.")):
        family_of(tiny.model_config(**fields))
