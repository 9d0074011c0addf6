"""Out to Hugging Face's format through training in every layout: every bit, and what transformers computes from it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from powernap.launch import cli
from powernap.train.hugging_face.export import export_hugging_face, family_of
from powernap.train.hugging_face.families import HuggingFaceError
from powernap.train.hugging_face.folder import HuggingFaceFolder
from powernap.train.run.folder import RunFolder
from tests.helpers import runs, tiny
from tests.helpers.cases import asked_for, names
from tests.helpers.hugging_face import some_tokens

EXPORTED = {"qwen3_5, tied": ["parallel.tensor=2"], "qwen3_5, shared keys": ["parallel.tensor=2", "parallel.pipeline=1"],
            "qwen3_next": ["parallel.pipeline=2"], "llama": ["parallel.data=2", "zero.stage=3"],
            "qwen2": ["parallel.tensor=2"], "olmo2": ["parallel.tensor=2", "parallel.sequence=true"],
            "olmo_hybrid, no positions": ["parallel.tensor=2"],
            "qwen3_5": ["parallel.tensor=2", "parallel.pipeline=2"]}  # fmt: skip


@pytest.fixture(scope="module")
def untouched(request, models, tmp_path_factory):
    """name -> a run that started from the model and took one step, too small to change a bit."""
    place = tmp_path_factory.mktemp("untouched")
    runs.prepare(place)
    found = {}
    for number, (name, layout) in enumerate(asked_for(request, EXPORTED, "qwen3_5, shared keys").items()):
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


@pytest.mark.parametrize("name", names(["olmo_hybrid, no positions", "qwen3_5, shared keys"], EXPORTED))
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
        ({"pattern": "AG"}, "qwen3_5_text does not compute this model: model.attention.qk_norm is true there, false here, model.attention.output_gate"),
        ({"pattern": "A", "attention": {"heads": 2, "output_gate": True}}, "llama does not compute this model: model.attention.output_gate is false there, true here; train with"),
    ],
    ids=lambda value: value["pattern"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_model_that_no_class_computes_is_named(fields, message):
    with pytest.raises(HuggingFaceError, match=message.replace(".", r"\.")):
        family_of(tiny.model_config(**fields))
