"""The model that is exported with its own code: logits after every token are the decoder's, sleep included, in float64; in a process
of its own, without Powernap, transformers generates what `powernap generate` does."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import torch

from powernap.launch import cli
from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.mixers import MIXERS
from powernap.train.hugging_face.with_code import CODE, LETTERS
from tests.helpers import runs, tiny
from tests.helpers.cases import names
from tests.model.test_decoder import SLEEPS, WINDOWS, stream

GROUPED = {
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "rotary_dims": 4, "qk_norm": True, "output_gate": True},
    "gdn": {"heads": 4, "key_heads": 2, "scale_queries": True, "l2_eps": 1e-6, "allow_neg_eigval": True},
    "zero_centred_norms": True,
}
OLMO = {
    "pattern": "AgGa",
    "attention": {
        "heads": 4, "kv_heads": 2, "qk_norm": True, "qk_norm_over": "width", "qkv_bias": True, "norms": "post",
    },
    "gdn": {"norms": "sandwich", "norm_eps": 1e-3},
}  # fmt: skip
# name: fields of the model, of sleep
CASES = {
    **{f"AGAG, {name}": ({}, sleep) for name, sleep in SLEEPS.items()},
    **{f"{kind}{other}": ({"pattern": f"A{kind}{other}"}, {}) for kind, other in ("GA", "KM", "MG", "JA")},
    "SG": ({"pattern": "SGAS", "sliding_attention": {"reach": 4}}, {}),
    "sliding, S": ({"pattern": "SGAS", "sliding_attention": {"reach": 4}}, {"eviction": "sliding"}),
    "sliding, K": ({"pattern": "AKA"}, {"eviction": "sliding", "every_window": True}),
    "norms over the width and after": (OLMO, {"every_window": True}),
    "grouped": (GROUPED, {"every_window": True}),
    "tied, a long window": ({"tie_embeddings": True, "window": 70, "pattern": "GA"}, {}),
}


@pytest.fixture(scope="module")
def code():
    """The exported module, imported as a package of its own."""
    package = types.ModuleType("exported_code")
    package.__path__ = [str(CODE)]
    sys.modules["exported_code"] = package
    yield importlib.import_module("exported_code.modeling_powernap")
    for name in [name for name in sys.modules if name.startswith("exported_code")]:
        del sys.modules[name]


def exported(code, stage):
    """The stage's weights in the exported class."""
    config = code.PowernapConfig(
        model=stage.model.model_dump(mode="json"), sleep=stage.sleep.model_dump(mode="json") | {"passes": 3}
    )
    model = code.PowernapForCausalLM(config).to(stage.dtype).eval()
    weights = dict(stage.named_parameters())
    theirs = dict(model.named_parameters())
    assert theirs.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return model


@pytest.mark.parametrize("pads", names([True], [False]))
@pytest.mark.parametrize("name", CASES)
def test_logits_after_every_token_are_the_decoders(code, topology, name, pads):
    fields, sleep = CASES[name]
    stage = tiny.build_stage(topology, tiny.model_config(**fields), SleepConfig(**sleep))
    model, window = exported(code, stage), stage.model.window
    tokens = stream(tokens=WINDOWS * window - 2, pads=pads)
    expected = torch.stack(Decoder(stage, 3, len(tokens)).feed_with_logits(tokens.tolist()))
    with torch.no_grad():
        whole = model(tokens)
        torch.testing.assert_close(whole.logits, expected, rtol=0, atol=1e-10)
        cache, parts = None, []
        for piece in tokens.split([window + 3, 1, 2, 1, tokens.shape[1] - window - 7], dim=1):
            output = model(piece, cache=cache)
            cache = output.cache
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)
    held = sum(t.numel() for layer in cache.layers for t in layer.values())
    assert cache.seen == tokens.shape[1] and cache.tokens.shape[1] < 2 * window and held < 40_000


def test_gradients_of_a_loss_within_a_window(code, topology):
    """As for a retrofit inside transformers: labels give the loss of ordinary training."""
    stage = tiny.build_stage(topology)
    model, tokens = exported(code, stage), stream(tokens=tiny.WINDOW)
    model(tokens, labels=tokens).loss.backward()
    logits = torch.stack(Decoder(stage, 1, 3).feed_with_logits(tokens.tolist()))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, labels=tokens).loss.double(), expected, rtol=1e-6, atol=0)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_texts_of_different_lengths_are_refused(code, topology):
    model = exported(code, tiny.build_stage(topology))
    with pytest.raises(ValueError, match="texts of different lengths"):
        model(stream(), attention_mask=torch.tensor([[0] + [1] * 15, [1] * 16, [1] * 16]))


def test_it_knows_every_mixer_of_ours():
    assert {letter for letter, mixer in MIXERS.items() if mixer.__module__.startswith("powernap.")} == set(LETTERS)


SCRIPT = """
import sys, json, torch, transformers
folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
tokens = torch.tensor([prompt, prompt[::-1]])
greedy = model.generate(tokens, max_new_tokens=new, do_sample=False, eos_token_id=None)
without_cache = model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
assert without_cache.tolist() == greedy[:, : without_cache.shape[1]].tolist()
torch.manual_seed(0)
drawn = model.generate(tokens[:1], max_new_tokens=new, do_sample=True, top_k=5, num_return_sequences=2, eos_token_id=None)
assert drawn.shape == (2, len(prompt) + new) and len(set(map(tuple, drawn.tolist()))) == 2
assert not any(name.split(".")[0] in ("powernap", "megatron", "deepspeed") for name in sys.modules), "not self-contained"
print(json.dumps({"passes": config.passes, "tokens": greedy[0, len(prompt):].tolist()}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with N=4 and its export with code."""
    folder = tmp_path_factory.mktemp("code")
    runs.prepare(folder, sleep={"passes": 4}, train={"steps": 3}, evaluation={"every": None})
    run = runs.train_in_turn(folder, 1, {"one": []})["one"]
    to = folder / "exported"
    assert cli.main(["checkpoint", "export", str(run), str(to), "--format", "hf", "--remote-code"]) == 0
    return folder, to


@pytest.mark.wide  # the logits are compared above
def test_transformers_generates_what_powernap_does(trained, tmp_path, capfd, monkeypatch):
    folder, to = trained
    monkeypatch.chdir(folder)
    prompt = [1, 2, 14, 2, 3, 14, 3, 4, 14, 4, 5, 14, 5, 6]
    asked = ["--tokens", ",".join(map(str, prompt)), "--max-tokens", "30", "--json"]
    assert cli.main(["generate", "exported", *asked]) == 0
    own = json.loads(capfd.readouterr().out)["tokens"]
    assert len(prompt) + len(own) > 3 * 12  # three windows are slept on
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(to), json.dumps(prompt), "30"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"passes": 4, "tokens": own}


def test_the_folder_is_an_export_of_ours_too(trained, monkeypatch, capfd):
    folder, to = trained
    monkeypatch.chdir(folder)
    started = runs.train_in_turn(folder, 1, {"again": ["train.start_from=exported", "train.steps=2"]})["again"]
    assert "weights of exported, step 3" in (started / "logs" / "train.log").read_text()
    card = (to / "README.md").read_text()
    assert "N=4" in card and "trust_remote_code=True" in card
    assert json.loads((to / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].startswith(
        "modeling_powernap."
    )
    capfd.readouterr()
    runs.assert_refused(
        ["checkpoint", "export", "one", "new", "--remote-code"], capfd, "--remote-code is for --format hf"
    )
