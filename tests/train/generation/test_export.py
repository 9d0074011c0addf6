"""A model by itself says what its run says, with no run and no shards beside it."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from powernap.model.config import RENAMED
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.config import Recipe
from powernap.train.data.vocabulary import Numbers
from powernap.train.generation.export import ExportError, export, read_exported
from powernap.train.generation.generate import load_run
from powernap.train.recipe_file import RecipeError, check
from powernap.train.run.folder import RunFolder
from powernap.train.yaml_core import dump
from tests.helpers import runs


def write_run(folder, topology, manifest, precision="fp32"):
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-000000.tar").touch()
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    sections = {
        "model": {**runs.RECIPE["model"], "window": 8, "vocab_size": 264, "pad_token_id": 263},
        "data": {"train": f"{folder}/data/train-*.tar", "test": None, "sequence_length": 17},
        "train": {**runs.RECIPE["train"], "precision": precision},
    }
    run = RunFolder(folder / "runs" / "tiny")
    run.create(check(Recipe, {**runs.RECIPE, **sections}))
    runs.write_drawn(run, topology)
    return run


def as_before_sections(model):
    """The model's fields as runs and exports had them before each part had a section."""
    flat = {name: value for name, value in model.items() if not isinstance(value, dict) and value is not None}
    return flat | {old: model[section][field] for old, (section, field) in RENAMED.items()}


def test_runs_and_exports_of_before_are_read(tmp_path, topology):
    run = write_run(tmp_path, topology, {"task": "text", "fields": {"inputs": "-", "tokenizer": "bytes"}})
    recipe = run.recipe()
    folder = export(run.newest_checkpoint(), recipe, tmp_path / "exported")
    expected = said(folder)
    old = recipe.model_dump(mode="json")
    old["model"] = as_before_sections(old["model"])
    assert "gdn" not in old["model"] and old["model"]["gdn_heads"] == 2
    run.config.write_text(dump(old))
    assert run.recipe() == recipe
    with pytest.raises(RecipeError, match="ffn_hidden_size is now mlp.ffn_hidden_size"):
        check(Recipe, old)  # but a recipe says it as it is now
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": old["model"]}))
    assert said(folder) == expected


@pytest.fixture
def exported(tmp_path, topology):
    """A run with a trained tokenizer, exported in bfloat16; the run, its shards and its tokenizer are gone."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        ["the cat sat on the mat"], tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet)
    )
    place = tmp_path / "work" / "tokenizer.json"
    place.parent.mkdir()
    own.save(str(place))
    manifest = {"task": "text", "fields": {"inputs": "/home/somebody/corpus", "tokenizer": str(place)}}
    run = write_run(tmp_path / "work" / "run", topology, manifest, "bf16")
    expected = said(run.path)
    export(run.newest_checkpoint(), run.recipe(), tmp_path / "model")
    shutil.rmtree(tmp_path / "work")
    return tmp_path / "model", expected


def said(folder):
    model = load_run(folder)
    return [(piece.token, piece.text) for piece in model.generate(["the cat sat on"], max_tokens=20)]


def test_an_export_speaks_as_its_run_did(exported):
    folder, expected = exported
    assert said(folder) == expected
    weights = load_file(folder / "model.safetensors")
    assert {name.rpartition(".")[2] for name, value in weights.items() if value.dtype == torch.float32} == {
        "A_log",
        "dt_bias",
    }
    assert {value.dtype for value in weights.values()} == {torch.bfloat16, torch.float32}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "somebody" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_in_the_precision_that_training_reads(tmp_path, topology, monkeypatch, precision, dtype):
    whole = Checkpoint.whole  # master weights begin as bfloat16 rounds them, and soon are others
    monkeypatch.setattr(Checkpoint, "whole", lambda self, name: whole(self, name) * (1 + 2**-10))
    run = write_run(tmp_path, topology, {"task": "unknown"}, precision)
    checkpoint = run.newest_checkpoint()
    found = load_file(export(checkpoint, run.recipe(), tmp_path / "model") / "model.safetensors")
    read = dict(load_run(run.path).stage.named_parameters())
    assert found.keys() == read.keys() == set(checkpoint.parameters)
    for name in found:
        own = torch.float32 if name.endswith((".A_log", ".dt_bias")) else dtype
        expected = checkpoint.whole(name).to(own)
        assert found[name].dtype == own and torch.equal(found[name], expected)
        assert torch.equal(read[name].detach(), expected.float())


def test_what_is_no_export_is_answered_in_one_line(exported, tmp_path):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    for wrong in ("", "[]", "{", '{"format": "other"}', json.dumps({**config, "model": {"pattern": "X"}})):
        (folder / "config.json").write_text(wrong)
        with pytest.raises(ExportError, match="config.json: not what powernap checkpoint export writes") as error:
            load_run(folder)
        assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps({**config, "vocabulary": {"task": "text", "fields": 3}}))
    assert isinstance(read_exported(folder).vocabulary, Numbers)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["output_layer.weight"] = weights["output_layer.weight"][1:].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match="not the weights of the model in config.json: 38,868 numbers, not 38,900"):
        load_run(folder)
    weights["other"] = weights.pop("output_layer.weight")
    weights["other"] = torch.zeros(264, 32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match="not the weights of the model in config.json: other differs"):
        load_run(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ExportError, match="model.safetensors: cannot be read"):
        load_run(folder)


def test_an_export_is_whole_or_not_there(tmp_path, topology):
    run = write_run(tmp_path / "run", topology, {})
    checkpoint = run.newest_checkpoint()
    file = checkpoint.folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError):
        export(checkpoint, run.recipe(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "model").mkdir()
    with pytest.raises(ExportError, match="model exists: choose a new folder"):
        export(checkpoint, run.recipe(), tmp_path / "model")


def test_where_an_export_goes_is_checked_before_the_checkpoint_is_read(tmp_path, monkeypatch, capfd):
    run = RunFolder(tmp_path / "run")
    run.create(check(Recipe, runs.RECIPE))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(RunFolder, "newest_checkpoint", lambda _: pytest.fail("read too early"))
    for to, words in [
        ("file/model", f"{tmp_path}/file is no folder"),
        ("full", "full exists: choose a new folder"),
        ("/proc/model", "/proc cannot be written"),
    ]:
        runs.assert_refused(["checkpoint", "export", str(run.path), str(tmp_path / to)], capfd, words)
