"""docs/retrofit.md: every command of the page runs, on a tiny model; the recipes that it walks through fit together."""

import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from powernap.launch import cli
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.recipe_file import load_recipe, shipped_recipes
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.test_docs import ROOT

RECIPES = [name for name in shipped_recipes() if name.startswith("retrofit/")]
SMALL = [
    "model.hidden_size=16", "model.mlp.ffn_hidden_size=16", "model.attention.heads=2",
    "model.gdn={heads: 2, key_dim: 8, value_dim: 8}", "train.steps=2", "train.global_batch_size=4", "data.lanes=1",
    "optimizer.warmup_steps=1", "evaluation.samples=4", "evaluation.every=null", "checkpoint.every=2", "run.trackers=[]",
]  # fmt: skip
BUILD = ["--test-samples", "8", "--workers", "1"]
# Blocks that each run trains, and those of its model.
TRAINED = {"retrofit-1": {1, 3}, "retrofit-1-taught": {1, 3}, "retrofit-2": set(range(6)), "hybrid-1": {1, 3}}


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "retrofit.md").read_text()
    fences = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    return [shlex.split(line) for fence in fences for line in fence.replace("\\\n", " ").splitlines()]


def small(command: list[str]) -> list[str]:
    """The command's arguments with fewer samples and steps, a smaller model."""
    name, *arguments = command[1:]
    if name == "data":
        more = [] if "--train-samples" in arguments else ["--train-samples", "40"]
        arguments = [word if word != "6000" else "40" for word in arguments]
        return [name, *arguments, *more, *BUILD]
    if name in ("train", "plan"):
        return [name, *(word.replace("150:", "1:") for word in arguments), *SMALL]
    return [name, *arguments]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each command printed, in a folder where all have run."""
    folder = tmp_path_factory.mktemp("retrofit")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands():
            # Each as in a shell of its own: a command on a single process leaves torchrun's variables.
            environment = mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": ""})
            with environment, open("output", "w+") as output, mock.patch("sys.stdout", output):
                assert cli.main(small(command)) == 0, command
                output.seek(0)
                printed[" ".join(command[1:])] = output.read()
    return folder, printed


@pytest.mark.wide
def test_every_command_runs(said):
    folder, printed = said
    table = printed["eval retrofit-2 --passes 1,2,4"]
    for part in ("N=1", "N=2", "N=4", "1 window", "3 windows"):
        assert part in table, table
    assert all(len(read_metrics(folder / "runs" / name / "metrics.jsonl")) == 2 for name in TRAINED)
    taught = read_metrics(folder / "runs" / "retrofit-1-taught" / "metrics.jsonl")
    assert all("loss/distillation" in record for record in taught)
    assert (folder / "retrofit-2-export" / "config.json").is_file()


@pytest.mark.parametrize("name", TRAINED)
def test_a_stage_trains_what_it_says(said, name):
    folder, _ = said
    checkpoint = RunFolder(folder / "runs" / name).newest_checkpoint()
    trained = {
        parameter for parameter, entry in checkpoint.manifest["parameters"].items() if entry["group"] is not None
    }
    blocks = {int(parameter.split(".")[2]) for parameter in trained if parameter.startswith("decoder.layers.")}
    assert blocks == TRAINED[name] and ("embedding.weight" in trained) == (name == "retrofit-2")
    assert isinstance(checkpoint, Checkpoint)


def test_the_recipes_follow_each_other():
    assert [name.removeprefix("retrofit/") for name in RECIPES] == [
        "attention", "attention_all", "base", "hybrid", "hybrid_all", "hybrid_base",
    ]  # fmt: skip
    for source, first, second in (("base", "attention", "attention_all"), ("hybrid_base", "hybrid", "hybrid_all")):
        base, one, two = (load_recipe(f"retrofit/{name}") for name in (source, first, second))
        assert one.train.start_from == base.run.name and two.train.start_from == one.run.name
        assert one.model.without_blocks(one.train.insert).pattern == base.model.pattern
        assert (one.sleep.eviction, two.sleep.eviction) == ("hard", "sliding") and one.model == two.model
        assert one.train.only and two.train.only is None and two.train.insert is None
        assert one.windows == 2 and base.windows == 1


def test_the_recipes_data_is_the_pages():
    page = {" ".join(command[1:]) for command in commands() if command[1] == "data"}
    files = [Path(path).read_text() for name, path in shipped_recipes().items() if name in RECIPES]
    assert page == set(re.findall(r"^#   powernap (data build .*)$", "\n".join(files), re.M))
