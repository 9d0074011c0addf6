"""The demo, cut short: its commands, its files, going on where it was stopped. What it shows takes minutes: `make demo`."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress

import psutil
import pytest

from powernap.launch.cli import command_parser, main
from powernap.launch.commands.demo import DEMOS
from powernap.launch.side_by_side import powernap_side_by_side
from powernap.train.data.build import build_task
from powernap.train.recipe_file import check, load_recipe, parse_overrides
from powernap.train.tasks import TASKS
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.track import Track
from tests.helpers import runs
from tests.helpers.cases import names

SHORT = ("train.steps=6", "optimizer.warmup_steps=2", "checkpoint.every=3", "evaluation.samples=16")
DEPO = ("--task", "depo", "--folder", "depo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Where it ran, and what it said; its shards to train on are there, fewer than it would build."""
    place = tmp_path_factory.mktemp("demo")
    sizes = dict(train_samples=256, test_samples=32, samples_per_shard=64, seed=3, workers=1)
    build_task("track", Track(asked="each", min_windows=8), place / "runs" / "demo" / "data", **sizes)
    return place, runs.warm_powernap("demo", "--seed", "3", *SHORT, cwd=place)


@pytest.fixture(scope="module")
def depo(tmp_path_factory):
    place = tmp_path_factory.mktemp("depo")
    sizes = dict(train_samples=288, test_samples=64, samples_per_shard=96, seed=3, workers=1)
    build_task("depo", Depo(nodes=8, max_hop=4, queries=18, names="ends"), place / "depo" / "data", **sizes)
    return place, runs.warm_powernap("demo", *DEPO, "--seed", "3", *SHORT, cwd=place)


def test_the_demo_from_shards_to_picture(demo):
    place, result = demo
    assert result.returncode == 0, result.stderr
    folder = place / "runs" / "demo"
    results = json.loads((folder / "results.json").read_text())
    models = {"sleep": "2", "no_sleep": "1", "transformer": "1"}
    assert {model: list(of) for model, of in results["accuracy"].items()} == {m: [n] for m, n in models.items()}
    depths = [str(depth) for depth in range(1, 9)]
    assert (
        list(results["accuracy"]["sleep"]["2"]) == list(results["floor"]) == list(results["constant_guess"]) == depths
    )
    assert {w: list(of["accuracy"]) for w, of in results["lengths"].items()} == {w: list(models) for w in ("16", "64")}
    assert list(results["lengths"]["16"]["accuracy"]["sleep"]["2"])[-1] == "16"
    assert results["seed"] == 3 and results["seconds"] > 0
    spent = {model: steps * results["flops_per_step"][model] for model, steps in results["steps"].items()}
    assert results["steps"]["sleep"] == 6 and results["steps"]["no_sleep"] == 11
    assert all(flops == pytest.approx(spent["sleep"], rel=0.1) for flops in spent.values())
    for model, steps in results["steps"].items():
        assert [run["step"] for run in metrics(folder, model)] == list(range(1, steps + 1))
        work = json.loads((folder / model / "work.json").read_text())
        assert work["flops_per_step"] == {models[model]: results["flops_per_step"][model]}
        assert work["task"] == "track" and work["predicts"] == [False, True] * 8
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    commands = [line.split()[2] for line in result.stdout.splitlines() if line.startswith("$ powernap ")]
    assert commands == ["data"] * 2 + ["train"] * 3 + ["eval"] * 3
    assert "step 6/6 of sleep" in result.stdout
    table = result.stdout[result.stdout.index("Share of right answers") :]
    assert "16 windows, a length never trained" in table and "powernap ui --root " in table
    assert max(len(line) for line in table.splitlines()) <= 80
    again = runs.warm_powernap("demo", "--seed", "3", *SHORT, cwd=place)
    runs.assert_one_line(again, "results.json exists")


@pytest.mark.wide
@pytest.mark.faults
def test_depo_by_the_same_steps(depo):
    place, result = depo
    assert result.returncode == 0, result.stderr
    results = json.loads((place / "depo" / "results.json").read_text())
    assert {model: list(of) for model, of in results["accuracy"].items()} == {"4": ["4"], "1": ["1"]}
    assert list(results["floor"]) == list(results["constant_guess"]) == ["1", "2", "3", "4"]
    assert all(results["floor"][hop] > results["constant_guess"][hop] for hop in results["floor"])
    assert results["steps"] == 6 and all(len(metrics(place / "depo", n)) == 6 for n in ("N4", "N1"))
    assert "powernap ui --root depo" in result.stdout


@pytest.mark.parametrize("name", DEMOS)
def test_what_a_demo_would_build_and_train_fits(name):
    """The shards that the other tests have made smaller: their arguments are those of `data build`."""
    demo = DEMOS[name]
    for task, *arguments in demo.shards.values():
        fields = dict(argument.split("=") for argument in arguments if "=" in argument)
        built = check(TASKS[task], {field: parse_overrides([f"{field}={fields[field]}"])[field] for field in fields})
        assert command_parser().parse_args(["data", "build", task, "folder", *arguments])
        assert built.vocab_size == load_recipe(demo.recipe, []).model.vocab_size
    for model in demo.models:
        load_recipe(demo.recipe, list(model.overrides))


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
def test_a_demo_that_was_stopped_in_its_second_training_goes_on(depo):
    place, _ = depo
    folder = place / "depo"
    results = json.loads((folder / "results.json").read_text())
    losses = [run["loss"] for run in metrics(folder, "N1")]
    (folder / "results.json").unlink()
    (folder / "N1" / "evaluation.json").unlink()
    shutil.rmtree(folder / "N1" / "checkpoints" / "step_00000006")
    resumed = runs.warm_powernap("demo", *DEPO, "--seed", "3", *SHORT, cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 3 of 6" in resumed.stderr
    assert [line.split()[2] for line in resumed.stdout.splitlines() if line.startswith("$ ")] == ["train", "eval"]
    assert [run["loss"] for run in metrics(folder, "N1")] == losses
    assert json.loads((folder / "results.json").read_text())["accuracy"] == results["accuracy"]


@pytest.mark.faults
@pytest.mark.parametrize("number", names([signal.SIGKILL], [signal.SIGINT, signal.SIGTERM]))
def test_a_demo_that_is_ended_alone_leaves_no_process_behind(demo, number):
    place, folder = demo[0], f"ended-{number.name}"
    for data in ("data", "data16", "data64"):
        shutil.copytree(place / "runs" / "demo" / data, place / folder / data)
    process = subprocess.Popen(
        [*runs.COMMAND, "demo", "--folder", folder, "train.steps=100000", "evaluation.samples=16"],
        cwd=place,
        env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        start_new_session=True,
    )
    family = []
    try:
        steps = [place / folder / model / "metrics.jsonl" for model in ("sleep", "no_sleep")]
        runs.wait_for(
            lambda: process.poll() is not None
            or all(file.is_file() and file.read_bytes().count(b"\n") > 1 for file in steps),
            180,
        )
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2  # side by side
        process.send_signal(number)
        left = psutil.wait_procs(family, 60)[1]
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        code = process.wait(30)
    assert not left and code == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -9}[number]
    assert list((place / folder / "sleep" / "checkpoints").glob("step_*"))


def test_one_that_fails_ends_the_others_and_its_last_line_is_shown(tmp_path, capfd):
    commands = {
        "fails": ["train", "nowhere"],
        "waits": ["ui", "--root", str(tmp_path), "--port", str(runs.free_port())],
    }
    before = psutil.Process().children()  # the server that the tests' processes are forked from
    with pytest.raises(SystemExit) as exit:
        powernap_side_by_side(commands, tmp_path, 2, lambda: "so far")
    assert exit.value.code == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and "nowhere" in said.err and "so far" in said.out
    assert psutil.Process().children() == before


def test_one_that_fails_without_a_word_is_a_line_too(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("powernap.launch.side_by_side._start", lambda arguments, log: subprocess.Popen(["false"]))
    with pytest.raises(SystemExit) as exit:
        powernap_side_by_side({"quiet": ["train"]}, tmp_path, 1, lambda: "")
    assert exit.value.code == 1 and capfd.readouterr().err == "quiet: exit code 1, without a word\n"


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
