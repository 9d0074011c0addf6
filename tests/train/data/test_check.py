"""What is wrong with a recipe's shards is said before any process starts, in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from webdataset.writer import TarWriter

from powernap.train.config import Recipe
from powernap.train.data.build import build_task
from powernap.train.data.check import check_data
from powernap.train.data.sample import DataError, encode
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.rule110 import Rule110
from powernap.train.tasks.sample import Sample
from tests.helpers import tiny

ENDS = Depo(nodes=8, max_hop=4, queries=5, names="ends")  # L = 18, T = 33, 21 tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tmp_path):
    build_task(
        "depo", ENDS, tmp_path / "data", train_samples=20, test_samples=6, samples_per_shard=5, seed=0, workers=1
    )
    return tmp_path / "data"


def recipe(folder, model=None, sleep=None, parallel=None, **data):
    return Recipe.model_validate(
        {
            "run": {"name": "test"},
            "model": tiny.model_config(**{"window": 18, "vocab_size": 21, **(model or {})}).model_dump(),
            "sleep": sleep or {"passes": 2},
            "data": {"train": f"{folder}/train-*.tar", "test": f"{folder}/test-*.tar", "sequence_length": 33, **data},
            "train": {"steps": 1, "global_batch_size": 12},
            "optimizer": {"warmup_steps": 0},
            "parallel": parallel or {},
        }
    )


def error_of(checked):
    with pytest.raises(DataError) as error:
        check_data(checked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_that_fit_pass(data):
    check_data(recipe(data))
    check_data(recipe(data, test=None, workers=2, lanes=4, parallel={"data": 2}))
    check_data(recipe(data, model={"window": 9}))
    check_data(recipe(data, train=f"pipe:cat {data}/train-000000.tar"))


@pytest.mark.parametrize("task", [Depo(nodes=18, max_hop=3, queries=3), Rule110()], ids=["words", "rule110"])
def test_the_tasks_own_sizes_pass(tmp_path, task):
    build_task(
        "task", task, tmp_path / "data", train_samples=70, test_samples=5, samples_per_shard=70, seed=0, workers=1
    )
    model = {"window": task.window, "vocab_size": task.vocab_size}
    check_data(recipe(tmp_path / "data", model=model, sequence_length=task.sequence_length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "none-*.tar"}, "data.train=none-*.tar: no file matches"),
        ({"test": "none.tar"}, "data.test=none.tar: no such file"),
        ({"train": []}, "data.train is empty"),
        ({"lanes": 5}, "data.train has 4 shards, fewer than data.lanes=5: write data.lanes=4 or null"),
        ({"train": {"a": {"shards": "none.tar"}}}, "data.train.a=none.tar: no such file"),
        ({"sequence_length": 40}, "has 33 tokens, data.sequence_length=40: write data.sequence_length=33"),
        ({"model": {"vocab_size": 20}}, "model.vocab_size=20: write model.vocab_size=21 or more"),
        ({"model": {"window": 12}}, "model.window=12 must divide the 18 tokens before the first question"),
        ({"model": {"window": 32}}, "model.window=32 must divide the 18 tokens before the first question"),
    ],
)
def test_a_recipe_that_does_not_fit_names_field_and_value(data, changes, message):
    assert message in error_of(recipe(data, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: b"garbage" * 1000, "not a tar"),
        (lambda whole: whole[:300], "not a tar"),
        (lambda whole: whole[: len(whole) // 2 + 100], "cut off after"),
        (lambda whole: whole[: len(whole) // 2 // 512 * 512], "cut off after"),
    ],
    ids=["empty", "text", "300-bytes", "half", "half-at-a-border"],
)
@pytest.mark.parametrize("shard", ["train-000002.tar", "test-000001.tar"])
def test_every_local_shard_is_looked_at(data, shard, content, message):
    path = data / shard
    path.write_bytes(content(path.read_bytes()))
    text = error_of(recipe(data))
    assert text.startswith(f"{path}: ") and message in text


def test_a_local_shard_is_as_large_as_its_manifest_records(data):
    """Of all of them before the start; their SHA-256 are compared when they are first read."""
    path = data / "train-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    text = error_of(recipe(data))
    assert text.startswith(f"{path}: not the shard that {data}/manifest.json records (") and "bytes, not" in text


def test_a_remote_shard_is_opened(data):
    text = error_of(recipe(data, test=f"pipe:cat {data}/none.tar 2>/dev/null", retries=0))
    assert f"pipe:cat {data}/none.tar 2>/dev/null: cannot be read (its command ended with exit code 1)" in text


def test_pads_that_the_model_does_not_know(tmp_path):
    padded = Depo(nodes=7, max_hop=4, queries=5, names="ends")  # 14 tokens of context in a window of 15
    build_task(
        "depo", padded, tmp_path / "data", train_samples=2, test_samples=1, samples_per_shard=2, seed=0, workers=1
    )
    settings = dict(sequence_length=30)
    check_data(recipe(tmp_path / "data", model={"window": 15}, **settings))
    text = error_of(recipe(tmp_path / "data", model={"window": 15, "pad_token_id": None}, **settings))
    assert "model.pad_token_id=null" in text and "write model.pad_token_id=0" in text


def test_a_manifest_is_optional_but_must_be_one(data):
    manifest = data / "manifest.json"
    manifest.write_text(json.dumps({"version": 3}))
    check_data(recipe(data))
    for text in ("{", "[1]"):
        manifest.write_text(text)
        assert error_of(recipe(data)).startswith(f"{manifest}: not a manifest")
    manifest.unlink()
    check_data(recipe(data))
    assert "model.window=32 leaves nothing to sleep on" in error_of(recipe(data, model={"window": 32}))
    check_data(recipe(data, model={"window": 32}, sleep={"passes": 1}))
    assert "nothing to sleep on" in error_of(
        recipe(data, model={"window": 32}, sleep={"passes": 2, "every_window": True})
    )
    check_data(recipe(data, model={"window": 30}, sleep={"passes": 2, "every_window": True}))


def test_samples_that_disagree_about_a_window(tmp_path):
    with open(tmp_path / "train-0.tar", "wb") as file, TarWriter(file) as tar:
        for number, first in enumerate((20, 20, 12)):
            sample = Sample(np.ones(33, np.int32), np.arange(33) >= first, np.zeros((0, 3), np.int32))
            tar.write(encode(f"sample-{number}", sample))
    text = error_of(recipe(tmp_path, test=None))
    assert "model.window=18: window 0 (tokens 0..17) holds loss tokens in some samples of" in text


def test_lists_are_checked_without_importing_torch():
    code = (
        "import sys; import powernap.train.data.check, powernap.train.tasks, powernap.train.data.build; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_two_vocabularies_in_one_recipe(data):
    """Each list of shards counts its own tokens: a model would take the words of one for those of the other."""
    held_out = shutil.copytree(data, data.parent / "other")
    for folder, tokenizer in ((data, "bytes"), (held_out, "tiktoken:gpt2")):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"task": "text", "fields": {"tokenizer": tokenizer}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    check_data(recipe(data))
    text = error_of(recipe(data, test=f"{held_out}/test-*.tar"))
    assert "data.train has the vocabulary bytes, data.test tiktoken:gpt2: build both with the same tokenizer" in text


def test_a_vocabulary_larger_than_the_models(data):
    """Also where no token of the first samples shows it."""
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 500}))
    assert "counts 500 tokens: write model.vocab_size=500 or more" in error_of(recipe(data))
