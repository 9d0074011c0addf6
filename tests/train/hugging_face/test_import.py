"""Models in Hugging Face's format against transformers: logits, gradients, decoding, every bit; what does not fit is named."""

import itertools
import json
import shutil
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from powernap.launch import cli
from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.parameters import count_parameters
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.planning.plan import in_units
from powernap.train.hugging_face.families import find_family
from powernap.train.hugging_face.folder import HuggingFaceFolder
from powernap.train.hugging_face.recipe import recipe_of
from powernap.train.hugging_face.rules import rules
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.hugging_face import HYBRIDS, MODELS, WINDOW, family, gradients_of, ours, segments, some_tokens
from tests.helpers.mixers import training_logits


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
    stage.token_losses(hidden_states, targets[:, 1:], loss_mask[:, 1:]).sum().backward()
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


# As released: parameters of the text model, width, blocks, query heads, key and value heads, MLP, value heads of a net, tied.
RELEASED = {
    "0.8B": ("752M", 1024, 24, 8, 2, 3584, 16, True),
    "2B": ("1.9G", 2048, 24, 8, 2, 6144, 16, True),
    "4B": ("4.2G", 2560, 32, 16, 4, 9216, 32, True),
    "9B": ("9.0G", 4096, 32, 16, 4, 12288, 32, False),
    "27B": ("26.9G", 5120, 64, 24, 4, 17408, 48, False),
}


@pytest.mark.parametrize("size", RELEASED)
def test_shapes_of_the_released_models(size):
    """On the meta device: every tensor that transformers' class has is in a rule, with its shape, and nothing else is."""
    import transformers

    numbers, width, blocks, heads, kv_heads, ffn, value_heads, tied = RELEASED[size]
    config = transformers.Qwen3_5TextConfig(
        vocab_size=248_320, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=256, intermediate_size=ffn, linear_num_key_heads=16,
        linear_num_value_heads=value_heads, linear_key_head_dim=128, linear_value_head_dim=128, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        reference = transformers.Qwen3_5ForCausalLM(config)
    expected = {name.removeprefix("model."): tuple(p.shape) for name, p in reference.named_parameters()}
    family, fields = find_family(config.to_dict())
    model = ModelConfig(window=1024, **family.section(fields))
    found = [rule.theirs for rule in rules(model, family)]
    assert {name: shape for theirs in found for name, shape in theirs.items()} == expected
    assert sum(map(len, found)) == len(expected)  # none twice
    assert in_units(count_parameters(model, SleepConfig())) == numbers
    assert model.pattern == "GGGA" * (blocks // 4)


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


@contextmanager
def in_float64(name, reference):
    """The model of transformers with nothing in float32: what is left is not rounding that hides a difference."""
    import transformers

    model_class, config_class, fields = MODELS[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # tables that it makes when it is built
    try:
        with InFloat64():
            exact = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).double().eval()
            exact.load_state_dict(reference.state_dict())
            exact.config._attn_implementation = "eager"
            yield exact
    finally:
        torch.set_default_dtype(default)


def assert_gradients_are(exact, stage, folder):
    """All of them, to 1e-12 of the largest of each parameter."""
    theirs, found = dict(exact.named_parameters()), dict(stage.named_parameters())
    for rule in rules(stage.model, family(HuggingFaceFolder.read(folder))):
        expected = rule.join(gradients_of(rule, theirs))
        torch.testing.assert_close(found[rule.ours].grad, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_in_float64(models, topology, name):
    """Logits and all gradients."""
    reference, folder = models[name]
    stage, tokens = ours(folder, topology, torch.float64), some_tokens(21)
    with in_float64(name, reference) as exact:
        logits = exact(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    assert logits.dtype == torch.float64
    torch.testing.assert_close(training_logits(stage, tokens[:, :-1], 1), logits, rtol=0, atol=1e-12)
    loss_mask = torch.ones(2, 21, dtype=torch.bool)
    (segment,) = segments(stage, tokens, loss_mask)
    hidden_states, _ = stage(segment, tokens[:, :-1], None, stage.empty_layer_states(2))
    stage.token_losses(hidden_states, tokens[:, 1:], loss_mask[:, 1:]).sum().backward()
    assert_gradients_are(exact, stage, folder)


def asleep_by_hand(model, tokens, passes):
    """Logits of the second of two windows, by transformers' own layers: the first is read `passes` times, each pass from the hidden
    states of the one before; every gated delta net goes on from the state that it had last, attention sees the window alone."""
    code, inner = sys.modules[type(model).__module__], model.model
    its_rule, states, called = code.torch_chunk_gated_delta_rule, {}, itertools.count()

    def rule(*arguments, **options):
        net = next(called) % inner.config.layer_types.count("linear_attention")
        options |= {"initial_state": states.get(net), "output_final_state": True}
        output, states[net] = its_rule(*arguments, **options)
        return output, states[net]

    with mock.patch.object(code, "torch_chunk_gated_delta_rule", rule):
        with mock.patch.object(inner.norm, "forward", lambda x: x):
            x = inner.embed_tokens(tokens[:, :WINDOW])
            for _ in range(passes):
                x = inner(inputs_embeds=x).last_hidden_state
        return model(tokens[:, WINDOW:]).logits


@pytest.mark.parametrize("name", HYBRIDS)
def test_asleep_in_float64(models, topology, name):
    """Two windows, the first with a sleep of two passes: the loss and all gradients."""
    reference, folder = models[name]
    stage, tokens = ours(folder, topology, torch.float64), some_tokens(2 * WINDOW + 1)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, WINDOW + 1 :] = True
    with in_float64(name, reference) as exact:
        logits = asleep_by_hand(exact, tokens[:, :-1], passes=2)
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, WINDOW + 1 :].flatten(), reduction="sum"
        )
        awake = asleep_by_hand(exact, tokens[:, :-1], passes=1)
        expected.backward()
    assert (awake - logits).abs().max() > 1e-3  # the second pass matters
    planned = plan_segments(tokens, loss_mask, stage.model, stage.sleep, 2)
    found = sleep_and_predict(stage, planned, tokens, loss_mask, recompute="segment").loss
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found.backward()
    assert_gradients_are(exact, stage, folder)


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


@pytest.mark.wide
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
