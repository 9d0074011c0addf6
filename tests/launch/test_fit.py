"""powernap.fit: the command's run from Python, with callbacks and loss terms of one's own, in one process and in several."""

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from powernap import Callback, LossTerm, fit, load_recipe
from powernap.launch import cli
from powernap.launch.torchrun import LaunchError
from powernap.parallel.topology import alone as alone_in_this_process
from powernap.train.callbacks import CallbackError, Callbacks
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.cases import asked_for, names
from tests.helpers.loss_terms import confidence
from tests.helpers.processes import in_processes
from tests.test_docs import ROOT, load_example

STEPS = 6
LAYOUTS = {  # processes, overrides
    "zero3": (2, ["parallel.data=2", "zero.stage=3"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
}


class Recorder(Callback):
    """Notes what is called, and counts steps in its state."""

    def __init__(self, stop_at: int | None = None, rank: int = 0):
        self.calls, self.steps, self.stop_at, self.rank = [], 0, stop_at, rank

    def on_train_begin(self, trainer):
        self.calls.append(f"begin {trainer.state.step}")

    def on_step_end(self, trainer, metrics):
        self.calls.append(f"step {trainer.state.step}")
        self.steps += 1
        metrics["steps_seen"] = self.steps
        if trainer.state.step == self.stop_at and trainer.topology.rank == self.rank:
            trainer.stop()

    def on_evaluate(self, trainer, metrics):
        assert math.isfinite(metrics["held_out_loss/N2"])
        self.calls.append("evaluate")

    def on_save(self, trainer):
        self.calls.append(f"save {trainer.state.step}")

    def on_train_end(self, trainer):
        self.calls.append("end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


TERM = LossTerm("confidence", confidence, weight=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    train = {"steps": STEPS, "global_batch_size": 8, "log_every": 1}
    sections = {"train": train, "checkpoint": {"every": 3}, "model": {"vocab_size": 16}}
    runs.prepare(folder, train_samples=128, evaluation={"every": None, "samples": 8}, **sections)
    return folder


def train_in_turn(folder, processes, layouts):
    """As torchrun's processes: each of `layouts`, with callbacks and a term, stopped by the last rank and gone on with."""
    names = [[uuid.uuid4().hex for _ in range(2)] for _ in layouts]
    return dict(
        zip(layouts, zip(*in_processes(_train, processes, processes, folder, layouts, names), strict=True), strict=True)
    )


def _train(rank, store, processes, folder, layouts, names):
    os.chdir(folder)
    found = []
    for (name, (_, overrides)), meetings in zip(layouts.items(), names, strict=True):
        recipe, calls = load_recipe("tiny.yaml", [f"run.name={name}", *overrides]), []
        for meeting, resume in zip(meetings, (False, True), strict=True):
            os.environ.pop("MASTER_PORT", None)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "POWERNAP_RENDEZVOUS": meeting, "MLFLOW_TRACKING_URI": "",
            }  # fmt: skip
            recorder = Recorder(stop_at=2, rank=processes - 1)
            finished = fit(recipe, [recorder], [TERM], resume=resume)
            calls.append((finished, recorder.calls))
        found.append(calls)
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """A run without a stop in this process; its calls, and its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recorder = Recorder()
        assert fit(load_recipe("tiny.yaml", ["run.name=alone"]), [recorder], [TERM])
    return recorder.calls, read_metrics(folder / "runs" / "alone" / "metrics.jsonl")


def test_hooks_are_called_at_their_places_and_metrics_are_recorded(folder, alone):
    calls, metrics = alone
    assert calls == [
        "begin 0", "step 1", "step 2", "step 3", "save 3", "step 4", "step 5", "step 6", "evaluate", "save 6", "end",
    ]  # fmt: skip
    assert [record["steps_seen"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert len({record["loss/confidence"] for record in metrics}) == STEPS
    log = (folder / "runs" / "alone" / "logs" / "train.log").read_text()
    assert "callbacks: Recorder" in log and "loss terms: confidence" in log
    state = RunFolder(folder / "runs" / "alone").newest_checkpoint().state
    assert state["callbacks"] == {"Recorder": {"steps": STEPS}}


@pytest.fixture(scope="module")
def in_layouts(request, folder):
    return train_in_turn(folder, 2, asked_for(request, LAYOUTS))


@pytest.mark.parametrize("name", names([*LAYOUTS][:1], LAYOUTS))
def test_every_layout_stops_together_goes_on_and_trains_the_same(folder, alone, in_layouts, name):
    for first, second in in_layouts[name]:  # of each rank
        assert first == (False, ["begin 0", "step 1", "step 2", "save 2", "end"])
        assert second[0] and second[1][0] == "begin 2" and second[1][-1] == "end"
    found = read_metrics(folder / "runs" / name / "metrics.jsonl")
    for field in ("loss", "grad_norm", "loss/confidence"):
        assert [r[field] for r in found] == pytest.approx([r[field] for r in alone[1]], rel=1e-4), field
    assert [record["steps_seen"] for record in found] == [1, 2, 3, 4, 5, 6]


def test_without_callbacks_it_is_the_commands_run(folder, alone, monkeypatch):
    """To the last digit; and a second call in the same process, after an interrupted one."""
    monkeypatch.chdir(folder)
    before = dict(os.environ)

    class Interrupt(Callback):
        def on_step_end(self, trainer, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(load_recipe("tiny.yaml", ["run.name=interrupted", "train.steps=2"]), [Interrupt()])
    assert fit(load_recipe("tiny.yaml", ["run.name=called", "train.steps=2", "optimizer.warmup_steps=1"]))
    assert dict(os.environ) == before
    with mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": ""}):
        assert cli.main(["train", "tiny.yaml", "run.name=command", "train.steps=2", "optimizer.warmup_steps=1"]) == 0
    called, command = (read_metrics(folder / "runs" / name / "metrics.jsonl") for name in ("called", "command"))
    assert [r["loss"] for r in called] == [r["loss"] for r in command]
    assert called[1]["loss"] != pytest.approx(alone[1][1]["loss"], rel=1e-6)  # the term changes the second step


class Odd(Callback):
    def __init__(self, change):
        self.change = change

    def on_step_end(self, trainer, metrics):
        self.change(metrics)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(odd=torch.ones(())), r"adds odd, a Tensor: a metric is a number, such as float\(tensor\)"),
        (lambda m: m.update(loss=0.0), "changes the metric loss: add one of another name"),
    ],
)
def test_a_metric_that_rank_0_could_not_write_fails_on_all_ranks(change, words):
    with pytest.raises(CallbackError, match=f"callback Odd {words}"):
        Callbacks([Odd(change)]).step_end(None, {"loss": 1.0})


def test_groups_that_were_there_stay(folder, monkeypatch):
    """Another model of this process computes in them: that of `powernap.load_run`."""
    monkeypatch.chdir(folder)
    before = alone_in_this_process()
    assert fit(load_recipe("tiny.yaml", ["run.name=beside", "train.steps=1", "optimizer.warmup_steps=1"]))
    assert dist.is_initialized() and alone_in_this_process().groups.tp is before.groups.tp


def test_names_and_states_are_checked():
    with pytest.raises(CallbackError, match="two callbacks are named Recorder: give one another `name`"):
        Callbacks([Recorder(), Recorder()])
    recorder = Recorder()
    recorder.steps = {1, 2}
    with pytest.raises(CallbackError, match="state_dict of callback Recorder is not JSON"):
        Callbacks([recorder]).states()


def test_a_layout_of_several_processes_says_how_to_start_them(folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe("tiny.yaml", ["run.name=two", "parallel.tensor=2"])
    with pytest.raises(
        LaunchError, match="needs 2 processes, this script is one: start it by torchrun --nproc-per-node 2"
    ):
        fit(recipe)
    raised = []

    def call():
        with pytest.raises(LaunchError, match="call it from the main thread") as error:
            fit(recipe)
        raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert raised


def test_the_example_trains_stops_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load_example(ROOT / "examples" / "fit" / "train.py")
    short = [
        "optimizer.warmup_steps=1",
        "checkpoint.every=2",
        "evaluation.every=2",
        "evaluation.samples=8",
        "train.log_every=1",
    ]
    assert example.main([*short, "train.steps=4"])
    records = read_metrics(tmp_path / "runs" / "recall" / "metrics.jsonl")
    mean = records[0]["loss"]
    for record in records:
        mean = 0.95 * mean + 0.05 * record["loss"]
        assert record["loss_mean"] == pytest.approx(mean)
    # the penalty's weight is gone after half of the steps
    assert [("loss/confidence" in record) for record in records] == [True, False, False, False]
    monkeypatch.setattr(example, "StopAt", lambda loss, kind=example.StopAt: kind(100.0))
    assert not example.main([*short, "run.name=early", "train.steps=4"])
    assert RunFolder(tmp_path / "runs" / "early").newest_checkpoint().step == 2


def test_the_snippets_of_the_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copy("tiny.yaml", "recipe.yaml")
    example = load_example(ROOT / "examples" / "fit" / "train.py")
    recipe = load_recipe("tiny.yaml", ["run.name=penalised", "train.steps=2", "optimizer.warmup_steps=1"])
    names = {"recipe": recipe, "confidence": example.confidence, "Recall": example.Recall}
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, names)
    assert len(read_metrics(Path("runs/mine/metrics.jsonl"))) == 20
    assert "loss/confidence" in read_metrics(Path("runs/penalised/metrics.jsonl"))[0]
    assert Path("shards/manifest.json").exists()


@pytest.mark.wide  # test_every_layout_stops_together_goes_on_and_trains_the_same has what torchrun sets
def test_the_example_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ROOT / "examples" / "fit" / "train.py"
    example = load_example(script)
    short = ["train.steps=2", "optimizer.warmup_steps=1", "evaluation.samples=8", "evaluation.every=null"]
    assert example.main(["run.name=one", *short])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    result = subprocess.run([*command, "parallel.data=2", *short], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 2
    one, two = (read_metrics(Path("runs") / name / "metrics.jsonl") for name in ("one", "recall"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)
