"""Memory of ranks that start from a model: each holds its part of the weights and one block, however it is split."""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from powernap.parallel.topology import init_distributed, shutdown_distributed
from powernap.train import trainer
from powernap.train.config import Recipe
from powernap.train.hugging_face.export import CLASSES
from powernap.train.hugging_face.families import FAMILIES
from powernap.train.hugging_face.folder import HuggingFaceFolder
from powernap.train.hugging_face.recipe import recipe_of
from powernap.train.hugging_face.rules import rules
from powernap.train.recipe_file import check
from powernap.train.run.start import Start, find_together
from tests.helpers.cases import names
from tests.helpers.processes import in_processes

SMALL = {"layers": 16, "hidden": 512, "vocabulary": 4096}  # 218 MB in float32, 13 of a block
GIGABYTE = {"layers": 32, "hidden": 1024, "vocabulary": 32768}
LAYOUTS = {
    "one": {},
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "zero 3": {"parallel": {"data": 2}, "zero": {"stage": 3}},
}


def make(folder: Path, layers: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> Path:
    """A model of Qwen3's shape, all numbers the same."""
    config = {
        "architectures": [CLASSES["qwen3"]], "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "head_dim": hidden // 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1e4,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = check(Recipe, _values(config, hidden)).model
    names = {}
    for rule in rules(model, FAMILIES["qwen3"]):
        for name, shape in rule.theirs.items():
            names[name if name.startswith("lm_head.") else f"model.{name}"] = torch.full(shape, 0.01, dtype=dtype)
    save_file(names, folder / "model.safetensors", {"format": "pt"})
    return folder


def _values(config: dict, hidden: int) -> dict:
    section = FAMILIES["qwen3"].section(config)
    return {
        "run": {"name": "memory"}, "model": {"window": 16, **section}, "data": {"train": "none", "sequence_length": 17},
        "train": {"steps": 1, "global_batch_size": 4}, "optimizer": {"warmup_steps": 0},
    }  # fmt: skip


def own_memory() -> int:
    """Resident bytes that no file backs: pages of the source are the system's cache."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Collects `own_memory` every two milliseconds."""
    seen, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def start(rank, store, world_size, folder, changes):
    """Bytes of this rank's part of the weights ("own"), and the peak above the beginning until they are there ("above")."""
    parallel = {"data": 1, "tensor": 1, "pipeline": 1, **changes.get("parallel", {})}
    topology = init_distributed(
        parallel["tensor"], parallel["pipeline"], rank=rank, world_size=world_size, store=store, timeout_seconds=300
    )
    recipe, values = recipe_of(HuggingFaceFolder.read(folder), 16)
    values["train"] |= {"start_from": str(folder), "precision": "fp32"}
    recipe = check(Recipe, values | changes)
    source = Start(find_together(recipe, topology), recipe, topology)
    measured = {}

    class Stop(Exception):
        pass

    def stop(stage, *_, **__):
        """In the place of the optimizer: all weights are here."""
        measured["own"] = sum(getattr(p, "ds_tensor", p).numel() * 4 for p in stage.parameters())
        measured["right"] = all(
            torch.allclose(getattr(p, "ds_tensor", p)[:1], torch.tensor(0.01), rtol=1e-2) for p in stage.parameters()
        )
        raise Stop

    if os.environ.get("POWERNAP_TEST_WHOLE"):  # planted: nothing is split before all is there
        trainer.EarlyPartition = lambda *_: lambda module: None  # type: ignore[misc, assignment]
    with watched() as seen, mock.patch.object(trainer, "build_optimizer", stop), pytest.raises(Stop):
        trainer.build(recipe, topology, source)
    shutdown_distributed()
    return measured | {"above": max(seen) - seen[0]}


def run(folder: Path, changes: dict) -> list[dict]:
    processes = math.prod(changes.get("parallel", {"data": 1}).values())
    return in_processes(start, processes, processes, folder, changes)


def assert_bounded(sizes: dict, results: list[dict], changes: dict) -> None:
    whole, block = size_of(sizes), 13 * sizes["hidden"] ** 2 * 4
    embedding = sizes["vocabulary"] * sizes["hidden"] * 4
    for result in results:
        assert result["right"]
        # An embedding or head has a rank of its own in a pipeline.
        assert result["own"] < whole / len(results) + embedding
        assert result["above"] < result["own"] + embedding + 2 * block, (result, embedding, block)


def size_of(sizes: dict) -> int:
    """Of the model in float32, without norms."""
    return 4 * sizes["hidden"] * (13 * sizes["layers"] * sizes["hidden"] + 2 * sizes["vocabulary"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small") / "model", **SMALL, dtype=torch.float32)


@pytest.mark.parametrize("layout", names(["zero 3"], LAYOUTS))
def test_a_rank_holds_its_part_and_a_block(small, layout):
    assert_bounded(SMALL, run(small, LAYOUTS[layout]), LAYOUTS[layout])


def test_a_rank_that_held_all_would_be_seen(small):
    with mock.patch.dict(os.environ, {"POWERNAP_TEST_WHOLE": "1"}):
        (one, _) = run(small, LAYOUTS["zero 3"])
    assert one["above"] > size_of(SMALL) * 0.95


@pytest.mark.wide  # a gigabyte in the file; the faster ones are above
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gigabyte(tmp_path, layout):
    folder = make(tmp_path / "model", **GIGABYTE, dtype=torch.bfloat16)
    assert (folder / "model.safetensors").stat().st_size > 1e9
    results = run(folder, LAYOUTS[layout])
    print([{name: f"{result[name] / 1e6:.0f} MB" for name in ("own", "above")} for result in results])
    assert_bounded(GIGABYTE, results, LAYOUTS[layout])
