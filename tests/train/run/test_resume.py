"""What may change when a run continues, in its own folder or as a branch; the steps that are done stay those of the recipe."""

import json
import shutil

import pytest

from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs

PLATEAU = ["train.steps=4", "optimizer.hold=1.0", "checkpoint.every=1", "checkpoint.keep_last=9"]
DECAY = ["train.steps=6", "optimizer.hold=0.5", "checkpoint.every=5"]  # as the plateau until step 4
STEP_3 = "train.branch_from=plateau/checkpoints/step_00000003"


pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    sections = {"train": {"log_every": 1, "global_batch_size": 8}, "evaluation": {"every": None}}
    runs.prepare(folder, **sections)
    shutil.copytree(folder / "data", folder / "moved")
    shutil.copytree(folder / "data", folder / "other")
    shards = sorted((folder / "other").glob("train-*.tar"))
    shutil.copyfile(shards[0], shards[1])
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    found = runs.train_in_turn(folder, 1, {"plateau": PLATEAU, "unbroken": DECAY})
    branches = {
        "branch": [STEP_3, *DECAY],
        "newest": ["train.branch_from=plateau", "train.steps=5", "optimizer.hold=0.8"],
    }
    found |= runs.train_in_turn(folder, 1, branches)
    found |= runs.train_in_turn(folder, 2, {"tensor": [STEP_3, *DECAY, "parallel.data=2"]})
    further = ["train.steps=6", "optimizer.hold=0.7", "data.train=moved/train-*.tar", "data.test=other/test-*.tar"]
    shutil.copytree(found["plateau"], folder / "again" / "plateau")
    runs.train_in_turn(folder, 1, {"plateau": ["run.root=again", *further, "checkpoint.every=6", "--resume"]})
    return found | {"again": folder / "again" / "plateau"}


def losses(run):
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl")}


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_a_resume_without_the_fields_of_the_start_names_the_command_that_has_them(folder, trained, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    command = "powernap train runs/plateau/config.yaml --resume"
    runs.assert_refused(
        ["train", "tiny.yaml", "run.name=plateau", "train.global_batch_size=16", "--resume"], capfd,
        "cannot change on --resume", f"to continue with all its fields: {command}; for a new run: train.start_from=runs/plateau",
    )  # fmt: skip
    _, _, recipe, _ = command.split()
    RunFolder(folder / "runs" / "plateau").check_start(load_recipe(recipe, []), resume=True)


def test_a_branch_of_a_plateau_is_the_unbroken_run(trained):
    branch, unbroken = trained["branch"], trained["unbroken"]
    assert losses(branch) == losses(unbroken) and sorted(losses(branch)) == [1, 2, 3, 4, 5, 6]
    weights = runs.weights(unbroken)
    assert all(weights[name].equal(value) for name, value in runs.weights(branch).items())
    samples = [[line["samples"] for line in read_metrics(run / "metrics.jsonl")] for run in (branch, unbroken)]
    assert samples[0] == samples[1]
    assert losses(trained["tensor"]) == pytest.approx(losses(unbroken), rel=1e-6)
    assert losses(trained["newest"]).keys() == {1, 2, 3, 4, 5}
    assert sorted(losses(trained["plateau"])) == [1, 2, 3, 4]  # as it was


def test_a_branch_says_what_it_is(trained):
    source = {"folder": "runs/plateau/checkpoints/step_00000003", "step": 3, "branch": True}
    (line,) = history(trained["branch"])
    assert line["step"] == 3 and line["started_from"] == source
    assert line["changes"]["train.steps"] == [4, 6] and line["changes"]["optimizer.hold"] == [1.0, 0.5]
    assert json.loads((trained["branch"] / "origin.json").read_text())["started_from"] == source
    log = (trained["branch"] / "logs" / "train.log").read_text()
    assert "branch of runs/plateau/checkpoints/step_00000003: continues after step 3" in log
    assert "changed: optimizer.hold=0.5, was 1.0" in log


def test_a_branch_is_resumed_without_its_source(folder, trained):
    copy = shutil.copytree(trained["branch"], folder / "alone" / "branch")
    shutil.rmtree(copy / "checkpoints" / "step_00000006")
    runs.train_in_turn(folder, 1, {"branch": [STEP_3, *DECAY, "run.root=alone", "--resume"]})
    assert "resumed after step 5 of 6" in (copy / "logs" / "train.log").read_text()
    assert losses(copy) == losses(trained["unbroken"])


def test_more_steps_another_decay_and_moved_shards(trained):
    run, past = trained["again"], losses(trained["plateau"])
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert {step: loss for step, loss in losses(run).items() if step <= 4} == past
    first, second = history(run)
    assert first["step"] == 0 and "changes" not in first
    assert second["step"] == 4
    assert second["changes"]["data.train"] == ["data/train-*.tar", "moved/train-*.tar"]
    assert {"train.steps", "optimizer.hold", "data.test", "checkpoint.every", "run.root"} < second["changes"].keys()
    assert RunFolder(run).recipe().train.steps == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.steps=3"], "train.steps=3 on --resume: runs/plateau has done 4 steps"),
        (["train.steps=6", "optimizer.hold=0.25"], "step 3, which is done, had 1 of the learning rate's peak, would have 0.8889"),
        (["optimizer.warmup_steps=1"], "step 1, which is done, had 0.5 of the learning rate's peak, would have 1"),
        (["data.train=other/train-*.tar"], "data.train=other/train-*.tar cannot change on --resume: its steps have read other"),
        (["data.train={a: {shards: data/train-*.tar, weight: 1}}"], "cannot change on --resume"),
        (["sleep.passes=4"], "sleep.passes=4 cannot change on --resume: runs/plateau has sleep.passes=2"),
        (["optimizer.lr=1e-4"], "optimizer.lr=0.0001 cannot change on --resume"),
        (["run.seed=5"], "run.seed=5 cannot change on --resume"),
    ],
)  # fmt: skip
def test_a_change_of_steps_that_are_done_is_refused(folder, trained, monkeypatch, capfd, changes, words):
    monkeypatch.chdir(folder)
    arguments = ["train", "tiny.yaml", "run.name=plateau", *PLATEAU, *changes, "--resume"]
    runs.assert_refused(arguments, capfd, words, *([] if "steps=3" in words else ["train.start_from=runs/plateau"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.branch_from=nobody"], "train.branch_from=nobody: no run below run.root=runs"),
        (["train.branch_from=plateau", "train.start_from=plateau"], "branch_from and start_from are both given"),
        (["train.branch_from=plateau", "train.steps=3"], "train.steps=3 in a branch: runs/plateau/checkpoints/step_00000004 has"),
        (["train.branch_from=plateau", "optimizer.hold=0.25"], "step 3, which is done, had 1 of the learning rate's peak"),
        (["train.branch_from=plateau", "model.hidden_size=64"], "model.hidden_size=64 cannot change in a branch"),
    ],
)  # fmt: skip
def test_a_branch_of_another_past_is_refused(folder, trained, monkeypatch, capfd, overrides, words):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=new", *PLATEAU[:2], "train.steps=6", *overrides], capfd, words)
    assert not (folder / "runs" / "new").exists()
