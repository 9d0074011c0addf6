"""Ouro and Jet-Nemotron, of which transformers has no class: references written out here, from their public descriptions."""

import json
import shutil
from functools import partial

import torch
from safetensors.torch import save_file

from powernap.launch import cli
from powernap.model.config import ModelConfig
from powernap.model.mixers.delta_rule import sequential_delta_rule
from powernap.train.hugging_face.families import find_family
from powernap.train.hugging_face.rules import rules
from tests.helpers import runs
from tests.helpers.hugging_face import WINDOW, ours, some_tokens
from tests.helpers.mixers import training_logits


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
