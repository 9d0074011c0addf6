"""A new run from another's weights: the first loss is that of those weights in every layout; mistakes before any process."""

import json
import shutil

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.data.loader import training_batches
from powernap.train.generation.export import export
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.cases import asked_for, names

ALONE = ["checkpoint.every=1", "train.steps=1", "optimizer.warmup_steps=1"]  # what starts from the sources, one step
SOURCES = {"one": (1, []), "tensor": (2, ["parallel.tensor=2"]), "muon": (1, ["optimizer.name=muon"])}
# name: processes, source, overrides
STARTED = {
    "again": (1, "one", []),
    "from_checkpoint": (1, "runs/one/checkpoints/step_00000002", []),
    "from_export": (1, "exported", []),
    "states": (1, "one", ["train.start_optimizer=true"]),
    "muon_states": (1, "muon", ["train.start_optimizer=true", "optimizer.name=muon"]),
    "norm": (1, "one", ["sleep.pass_norm=true"]),
    "tensor_of_export": (2, "exported", ["parallel.tensor=2"]),
    "zero3": (2, "one", ["parallel.data=2", "zero.stage=3"]),
    "zero3_states": (2, "one", ["parallel.data=2", "zero.stage=3", "train.start_optimizer=true"]),
    "bf16": (2, "one", ["parallel.data=2", "train.precision=bf16"]),
    "tensor_pipeline": (4, "tensor", ["parallel.tensor=2", "parallel.pipeline=2"]),
}
WIDE = {
    "from_tensor": (1, "tensor", []),
    "data": (2, "one", ["parallel.data=2"]),
    "tensor_of_one": (2, "one", ["parallel.tensor=2"]),
    "pipeline": (2, "tensor", ["parallel.pipeline=2"]),
    "zero2": (2, "one", ["parallel.data=2", "zero.stage=2"]),
}
FAST = ["again", "from_export", "states", "norm"]  # one of each kind, for `make test`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    sections = {"train": {"steps": 4, "log_every": 1, "global_batch_size": 8}, "checkpoint": {"every": 2}}
    runs.prepare(folder, model={"vocab_size": 17}, evaluation={"every": None}, **sections)
    return folder


@pytest.fixture(scope="module")
def started(request, folder):
    """name -> the folder of that run of SOURCES, STARTED or WIDE."""
    found = {}
    asked = asked_for(request, STARTED | WIDE, *FAST)
    sources = {"one", "muon", *(source for _, source, _ in asked.values())}
    for processes in (1, 2):
        chosen = {n: o for n, (p, o) in SOURCES.items() if p == processes and n in sources}
        found |= runs.train_in_turn(folder, processes, chosen)
    export(RunFolder(found["one"]).newest_checkpoint(), RunFolder(found["one"]).recipe(), folder / "exported")
    for processes in (1, 2, 4):
        chosen = {
            name: [f"train.start_from={source}", *overrides, *ALONE]
            for name, (needs, source, overrides) in asked.items()
            if needs == processes
        }
        found |= runs.train_in_turn(folder, processes, chosen)
    return found


def first_loss(run):
    return read_metrics(run / "metrics.jsonl")[0]["loss"]


def loss_of(weights: Checkpoint, folder, topology, monkeypatch, dtype=torch.float32) -> float:
    """Of the first batch, by model/sleep.py's loop alone."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("tiny.yaml")
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups)
    weights.load_weights(stage)
    for name, parameter in stage.named_parameters():
        if not name.endswith((".A_log", ".dt_bias")):
            parameter.data = parameter.to(dtype)
    batch, _ = next(training_batches(recipe.data, batch_size=8, vocab_size=17, rank=0, world_size=1, seed=0))
    segments = plan_segments(batch.tokens, batch.loss_mask, recipe.model, recipe.sleep, 2)
    with torch.no_grad():
        total = sleep_and_predict(stage, segments, batch.tokens, batch.loss_mask, recompute="none").loss
    return float(total / batch.loss_mask[:, 1:].sum())


@pytest.mark.parametrize("name", names(FAST, STARTED | WIDE))
def test_the_first_loss_is_that_of_the_source(folder, started, topology, monkeypatch, name):
    source = (STARTED | WIDE)[name][1]
    run = {"exported": "one", "runs/one/checkpoints/step_00000002": "one"}.get(source, source)
    weights = Checkpoint.open(
        started[run] / "checkpoints" / ("step_00000002" if "step_" in source else "step_00000004")
    )
    expected = loss_of(weights, folder, topology, monkeypatch, torch.bfloat16 if name == "bf16" else torch.float32)
    if name == "norm":  # its own weight is drawn
        assert first_loss(started[name]) != pytest.approx(expected, rel=1e-6)
    else:
        assert first_loss(started[name]) == pytest.approx(expected, rel=1e-6)
    drawn = read_metrics(started["one"] / "metrics.jsonl")[0]["loss"]
    assert abs(first_loss(started[name]) / drawn - 1) > 0.05


@pytest.mark.parametrize(
    ("with_states", "without"), [("states", "again"), pytest.param("zero3_states", "zero3", marks=pytest.mark.wide)]
)
def test_states_are_taken_when_asked_for(folder, started, with_states, without):
    """The first gradient is the same with and without: the moments differ by what the source had."""
    b1 = load_recipe(str(folder / "tiny.yaml")).optimizer.betas[0]
    source = RunFolder(started["one"]).newest_checkpoint()
    one, other = (RunFolder(started[name]).newest_checkpoint() for name in (with_states, without))
    for name in source.parameters:
        had = one.whole(name, "exp_avg") - other.whole(name, "exp_avg")
        torch.testing.assert_close(had, b1 * source.whole(name, "exp_avg"), rtol=1e-4, atol=1e-6)


def test_what_a_run_started_from_is_recorded(started):
    log = (started["norm"] / "logs" / "train.log").read_text()
    assert "weights of runs/one/checkpoints/step_00000004, step 4" in log
    assert "1 of 20 parameters are not there and drawn: pass_norm.weight" in log
    origin = json.loads((started["norm"] / "origin.json").read_text())
    assert origin["started_from"] == {"folder": "runs/one/checkpoints/step_00000004", "step": 4}
    assert RunFolder(started["norm"]).recipe().train.start_from == "one"
    tracked = [json.loads(line) for line in (started["norm"] / "mlflow_spool.jsonl").read_text().splitlines()]
    assert tracked[0]["parameters"]["train.start_from"] == "one"
    assert [r["path"] for r in tracked if r["type"] == "artifact"][:3] == [
        "config.yaml",
        "origin.json",
        "history.jsonl",
    ]


@pytest.mark.faults
def test_a_resumed_run_does_not_read_its_source_again(folder, started):
    source = shutil.copytree(started["one"], folder / "runs" / "brief")
    chosen = ["train.start_from=brief", "train.steps=2", "checkpoint.every=1"]
    unbroken = runs.train_in_turn(folder, 1, {"unbroken": chosen})["unbroken"]
    broken = shutil.copytree(unbroken, folder / "again" / "unbroken")
    shutil.rmtree(broken / "checkpoints" / "step_00000002")
    shutil.rmtree(source)
    runs.train_in_turn(folder, 1, {"unbroken": [*chosen, "run.root=again", "--resume"]})
    one, other = (read_metrics(run / "metrics.jsonl") for run in (unbroken, broken))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert json.loads((broken / "origin.json").read_text())["started_from"]["step"] == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.start_from=nobody"], "train.start_from=nobody: no run below run.root=runs, and no folder of a run"),
        (
            ["train.start_from=one", "model.mlp.ffn_hidden_size=48"],
            "mlp.linear_fc1.weight is [128, 32] there, [96, 32]",
        ),
        (
            ["train.start_from=one", "model.tie_embeddings=true"],
            "has output_layer.weight, which the model of this recipe",
        ),
        (["train.start_from=exported", "train.start_optimizer=true"], "is a model without optimizer states"),
        (["train.start_from=muon", "train.start_optimizer=true"], "are of muon, not of adamw"),
        (["train.start_optimizer=true"], "write train.start_from"),
        (
            ["train.start_from=one", "train.start_optimizer=true", "sleep.pass_norm=true"],
            "train.start_optimizer=true: runs/one/checkpoints/step_00000004 has no pass_norm.weight",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_source_that_does_not_fit_is_refused_before_any_process_starts(
    folder, started, capfd, monkeypatch, overrides, words
):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", "parallel.data=2", *overrides], capfd, words)
    assert not (folder / "runs" / "refused").exists()


def test_a_damaged_source_is_one_line(folder, started, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    source = shutil.copytree(started["one"], folder / "runs" / "damaged")
    file = source / "checkpoints" / "step_00000004" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = runs.warm_powernap("train", "tiny.yaml", "run.name=mine", "train.start_from=damaged", cwd=folder)
    runs.assert_one_line(result, "rank-00000.safetensors: damaged")
