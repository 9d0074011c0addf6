"""The demo, cut short: its commands, its files, going on where it was stopped. What it shows takes minutes: `make demo`."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress

import psutil
import pytest

from powernap.launch.cli import main
from tests.helpers import runs

SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=3", "evaluation.samples=64")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Where it ran, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, runs.warm_powernap("demo", "--seed", "3", *SHORT, cwd=folder)


def test_the_demo_from_shards_to_picture(demo):
    place, result = demo
    assert result.returncode == 0, result.stderr
    folder = place / "runs" / "demo"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["accuracy"]) == ["4", "1"]
    assert list(results["accuracy"]["4"]) == ["4"] and list(results["accuracy"]["1"]) == ["1"]  # each at its own N
    assert list(results["accuracy"]["4"]["4"]) == ["1", "2", "3", "4"]
    assert list(results["floor"]) == list(results["constant_guess"]) == ["1", "2", "3", "4"]
    assert all(results["floor"][hop] > 0.2 > results["constant_guess"][hop] for hop in results["floor"])
    for n in ("4", "1"):  # the windows that predict are in the run's folder: no shard is needed for its FLOPs
        work = json.loads((folder / f"N{n}" / "work.json").read_text())
        assert work["predicts"] == [False, True, True, True] and list(work["flops_per_step"]) == [n]
        assert work["task"] == "depo" and work["fields"]["queries"] == 18
    assert results["steps"] == 6 and results["seed"] == 3 and results["seconds"] > 0
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    commands = [line for line in result.stdout.splitlines() if line.startswith("$ powernap ")]
    assert [command.split()[2] for command in commands] == ["data", "train", "eval", "train", "eval"]
    table = result.stdout[result.stdout.index("Share of right answers") :]
    assert "make ui" in table and max(len(line) for line in table.splitlines()) <= 80
    steps, data = ([run["step"] for run in metrics(folder, n)] for n in ("N4", "N1")), folder / "data"
    assert all(step == [1, 2, 3, 4, 5, 6] for step in steps)
    assert json.loads((data / "manifest.json").read_text())["fields"]["nodes"] == 8
    again = runs.warm_powernap("demo", "--seed", "3", *SHORT, cwd=place)
    runs.assert_one_line(again, "results.json exists")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.root=other", "run.root is set by the demo: use --folder"),
        ("run={seed: 4}", "run.seed is set by the demo: use --seed"),
        ("sleep.passes=2", "sleep.passes is set by the demo: train your own run"),
        ("data.train.mine.shards=a.tar", "data.train.mine.shards is set by the demo"),
        ("train.stepz=6", "did you mean train.steps?"),
    ],
)
def test_what_the_demo_sets_itself_is_refused_before_anything_is_built(
    tmp_path, capsys, monkeypatch, override, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_demo_that_was_stopped_in_its_second_training_goes_on(demo):
    place, _ = demo
    folder = place / "runs" / "demo"
    results = json.loads((folder / "results.json").read_text())
    losses = [run["loss"] for run in metrics(folder, "N1")]
    (folder / "results.json").unlink()
    (folder / "N1" / "evaluation.json").unlink()
    shutil.rmtree(folder / "N1" / "checkpoints" / "step_00000006")
    resumed = runs.warm_powernap("demo", "--seed", "3", *SHORT, cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 3 of 6" in resumed.stderr
    assert [line.split()[2] for line in resumed.stdout.splitlines() if line.startswith("$ ")] == ["train", "eval"]
    assert [run["loss"] for run in metrics(folder, "N1")] == losses
    assert json.loads((folder / "results.json").read_text())["accuracy"] == results["accuracy"]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_alone_leaves_no_rank_behind(demo, number):
    place, folder = demo[0], f"ended-{number.name}"
    shutil.copytree(place / "runs" / "demo" / "data", place / folder / "data")
    options = ["--folder", folder, "train.steps=100000", "evaluation.samples=64", "parallel.data=2"]
    process = subprocess.Popen(
        [*runs.COMMAND, "demo", *options],
        cwd=place,
        env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        start_new_session=True,
    )
    family = []
    try:
        steps = place / folder / "N4" / "metrics.jsonl"
        runs.wait_for(
            lambda: process.poll() is not None or (steps.is_file() and steps.read_bytes().count(b"\n") > 1), 180
        )
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3  # powernap train and its ranks
        process.send_signal(number)
        left = psutil.wait_procs(family, 60)[1]
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        code = process.wait(30)
    assert not left and code == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -9}[number]
    assert bool(list((place / folder / "N4" / "checkpoints").glob("step_*"))) == (number != signal.SIGINT)


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
