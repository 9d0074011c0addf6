"""Whole runs through the command: data parallelism, resuming, learning, what a run leaves in its folder."""

import hashlib
import json
import re
import shutil
import subprocess

import pytest
import torch
import yaml

from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.data.build import build_task
from powernap.train.evaluation.evaluate import evaluate
from powernap.train.recipe_file import load_recipe
from powernap.train.tasks import TASKS
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs, tiny, warm
from tests.helpers.cases import asked_for, names
from tests.helpers.runs import weights

# The batch of a model's first rank, which alone reads, tells the others where the probes are.
PROBES = [
    "data.train=probes/train-*.tar",
    "data.test=null",
    "data.sequence_length=16",
    "model.window=2",
    "model.vocab_size=10",
    "train.steps=3",  # before rounding is taken up: which step does that depends on the processor
]
SIX_STEPS = {"train": {"steps": 6, "log_every": 3}, "checkpoint": {"every": 3}}
# name: processes, overrides.
RUNS = {
    "one": (1, []),
    "micro": (1, ["train.micro_batch_size=4", "train.recompute=true"]),
    "half": (1, ["train.global_batch_size=8"]),
    "sliding": (1, ["sleep.eviction=sliding", "train.micro_batch_size=8"]),
    "muon": (1, ["optimizer.name=muon"]),
    "bf16": (1, ["train.precision=bf16"]),
    "readers": (1, ["data.workers=2"]),
    "data": (2, ["parallel.data=2"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "zero3": (2, ["parallel.data=2", "zero.stage=3"]),
    "drawn": (2, ["parallel.data=2", "sleep.passes=[1,2,4]"]),
    "muon_data": (2, ["parallel.data=2", "optimizer.name=muon"]),
    "muon_pipeline": (2, ["parallel.pipeline=2", "optimizer.name=muon"]),
    "bf16_data": (2, ["parallel.data=2", "train.precision=bf16"]),
    "probes": (1, PROBES),
    "probes_tensor": (2, [*PROBES, "parallel.tensor=2"]),
    "probes_pipeline": (2, [*PROBES, "parallel.pipeline=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs.prepare(folder, **SIX_STEPS)
    track = TASKS["track"](asked="each", windows=4, min_windows=4)
    sizes = dict(train_samples=160, test_samples=8, samples_per_shard=80, seed=0, workers=1)
    build_task("track", track, folder / "probes", **sizes)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    """name -> the folder of that run of RUNS."""
    found, asked = {}, asked_for(request, RUNS, "one", "half", "data")
    for processes in (1, 2):
        chosen = {name: overrides for name, (needs, overrides) in asked.items() if needs == processes}
        found |= runs.train_in_turn(folder, processes, chosen)
    return found


def column(run, name):
    return [record[name] for record in read_metrics(run / "metrics.jsonl")]


def assert_same_training(one, other, bound):
    # At single steps the norm takes up rounding a hundred times as much as at those before and after (1.6e-5 in float32),
    # and Adam hands it on to the weights; two halves of a batch differ by over 1e-3 (the control below).
    for name, factor in ("loss", 1), ("grad_norm", 10), ("lr", 1):
        assert column(one, name) == pytest.approx(column(other, name), rel=factor * bound), name
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].float() - b[name].float()).abs().max() < 10 * bound, name


def test_two_processes_equal_one(trained):
    assert_same_training(trained["data"], trained["one"], 1e-5)
    assert max(column(trained["data"], "grad_norm")) > 0.5  # clipping was active
    assert column(trained["data"], "tokens") == [16 * 23] * 6  # of the global batch


@pytest.mark.parametrize("name", names([], ["micro"]))  # test_layouts.py has both
def test_micro_batches_and_recomputation_change_nothing(trained, name):
    assert_same_training(trained[name], trained["one"], 1e-5)


@pytest.mark.wide  # test_layouts.py has probes
@pytest.mark.parametrize(("layout", "alone"), [("probes_tensor", "probes"), ("probes_pipeline", "probes")])
def test_ranks_that_read_no_shards_know_the_probes(trained, layout, alone):
    assert_same_training(trained[layout], trained[alone], 3e-5)


@pytest.mark.parametrize("name", names([], ["readers"]))  # test_order.py has many numbers of readers
def test_two_readers_change_nothing(trained, name):
    assert column(trained[name], "loss") == column(trained["one"], "loss")


@pytest.mark.wide  # parallel/test_muon.py has every layout
@pytest.mark.parametrize(("layout", "alone"), [("muon_data", "muon"), ("muon_pipeline", "muon")])
def test_muon_on_two_processes_equals_one(trained, layout, alone):
    # Muon's orthogonalisation runs in bfloat16, where the last bits of an averaged gradient may tip a rounding.
    assert_same_training(trained[layout], trained[alone], 5e-3)


def test_a_broken_all_reduce_would_be_seen(trained):
    """The control: two ranks that each step on their own half drift apart by far more than the bound."""
    a, b = weights(trained["half"]), weights(trained["one"])
    assert max((a[name] - b[name]).abs().max() for name in a) > 1e-3


RESUMED = ["zero3", "pipeline", "one", "data"]


@pytest.fixture(scope="module")
def resumed(request, folder, trained):
    """Copies of some runs, which go on from the middle with other readers; name -> folder."""
    asked = [name for name in RESUMED if name in asked_for(request, RUNS)]
    for name in asked:
        broken = shutil.copytree(trained[name], folder / "again" / name)
        shutil.rmtree(broken / "checkpoints" / "step_00000006")  # as if it had been stopped between 3 and 6
    for processes in (1, 2):
        chosen = {name: RUNS[name][1] for name in asked if RUNS[name][0] == processes}
        further = ["data.workers=2", "run.root=again", "--resume"]
        runs.train_in_turn(folder, processes, {name: [*overrides, *further] for name, overrides in chosen.items()})
    return {name: folder / "again" / name for name in asked}


@pytest.mark.parametrize("name", names([], RESUMED))  # make test-faults resumes in several layouts
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(trained, resumed, name):
    broken = resumed[name]
    assert "resumed after step 3 of 6" in (broken / "logs" / "train.log").read_text()
    assert column(broken, "step") == list(range(1, 7))
    assert column(broken, "seconds") != column(trained[name], "seconds")
    for key in ("loss", "grad_norm"):
        assert column(broken, key) == column(trained[name], key)
    a, b = weights(broken), weights(trained[name])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_other_shards_are_refused_on_resume(folder, trained, tmp_path):
    runs.prepare(tmp_path, seed=1, **SIX_STEPS)  # as large as those of the run
    shutil.copytree(trained["one"], tmp_path / "runs" / "one")
    shutil.rmtree(tmp_path / "runs" / "one" / "checkpoints" / "step_00000006")
    result = runs.warm_powernap("train", "tiny.yaml", "run.name=one", "--resume", cwd=tmp_path)
    assert (
        result.returncode != 0 and "data.train: the shards are not those the run was trained on so far" in result.stderr
    )
    assert column(tmp_path / "runs" / "one", "step")[-1] == 3


@pytest.mark.parametrize("name", names([], ["bf16_data", "bf16"]))  # test_zero_layouts.py has bf16
def test_bf16_trains_close_to_fp32_on_one_process_and_on_two(trained, name):
    low, one = trained[name], trained["one"]
    assert column(low, "loss") == pytest.approx(column(one, "loss"), rel=0.03)
    assert column(low, "loss") != column(one, "loss")
    assert column(low, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=0.15)


@pytest.mark.parametrize("name", names([], ["drawn"]))  # test_by_step.py draws in a pipeline
def test_n_drawn_per_step_is_the_same_on_all_ranks_and_used(trained, name):
    run = trained[name]
    assert len(set(column(run, "passes"))) > 1
    health = [record for record in read_metrics(run / "metrics.jsonl") if "fast_weights/block_1/pass_1/norm" in record]
    assert [record["step"] for record in health] == [1, 3, 6]


@pytest.mark.parametrize("name", names([], ["sliding"]))  # test_layouts.py and test_evaluate.py have sliding windows
def test_sliding_windows_train_and_evaluate(trained, name):
    """The weights are those of hard eviction: a model may be trained with one and go on with the other."""
    run = trained[name]
    records = read_metrics(run / "metrics.jsonl")
    assert {"accuracy/N2/depth_1", "accuracy/N2/depth_2"} <= set(records[-1])
    assert {name.split("/")[1] for name in records[0] if name.startswith("fast_weights")} == {"block_1"}
    assert {name: x.shape for name, x in weights(run).items()} == {
        name: x.shape for name, x in weights(trained["one"]).items()
    }
    assert column(run, "loss") != pytest.approx(column(trained["one"], "loss"), rel=1e-3)


def test_what_a_run_leaves_behind(trained):
    one_process = trained["one"]
    assert {path.name for path in one_process.iterdir()} == {
        "config.yaml", "origin.json", "metrics.jsonl", "checkpoints", "logs", "mlflow_run_id", "lock", "work.json", "history.jsonl",
        "mlflow_spool.jsonl", "mlflow_spool.position", "mlflow_spool.lock",
    }  # fmt: skip
    config = yaml.safe_load((one_process / "config.yaml").read_text())
    origin = json.loads((one_process / "origin.json").read_text())
    assert set(origin) == {"date", "commit", "uncommitted_changes", "machine"} and origin["machine"]["cores"] >= 1
    assert config["run"]["name"] == "one" and config["zero"] == {"stage": 1, "offload": False}
    first, *_, last = (json.loads(line) for line in (one_process / "metrics.jsonl").read_text().splitlines())
    assert list(first)[:6] == ["step", "loss", "grad_norm", "lr", "tokens", "seconds"]
    assert {f"fast_weights/block_1/pass_{n}/{what}" for n in (1, 2) for what in ("norm", "alpha", "beta")} <= set(first)
    assert {"accuracy/N2/depth_1", "accuracy/N2/depth_2", "tokens_per_second", "peak_memory_bytes"} <= set(last)
    log = (one_process / "logs" / "train.log").read_text()
    assert "step 6/6  loss" in log and "tokens/s" in log and "\r" not in log
    assert {path.name for path in (one_process / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}


def test_mlflow_has_the_run(trained):
    one_process = trained["one"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{one_process.parent / 'mlflow.db'}")
    run = client.get_run((one_process / "mlflow_run_id").read_text().strip())
    assert run.info.status == "FINISHED"
    assert run.data.params["sleep.passes"] == "2" and run.data.params["zero.stage"] == "1"
    recorded = {
        "loss", "grad_norm", "grad_norm_max", "skipped_steps", "gradient_spikes", "lr", "tokens_per_second", "seconds_per_step",
        "peak_memory_bytes", "with_N2_accuracy_depth_2", "accuracy", "held_out_loss",
        "max_norm_of_fast_weights", "min_alpha_of_fast_weights", "max_beta_of_fast_weights", "total_tokens", "total_flops",
        "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes",
    }  # fmt: skip
    assert recorded <= set(run.data.metrics) and not any("block_" in name for name in run.data.metrics)
    assert not {"tokens", "flops", "passes"} & set(run.data.metrics)  # they never change
    assert run.data.metrics["total_tokens"] == 6 * 16 * 23
    assert run.data.metrics["skipped_steps"] == run.data.metrics["gradient_spikes"] == 0
    assert "train.log" in {file.path for file in client.list_artifacts(run.info.run_id)}
    work = json.loads((one_process / "work.json").read_text())
    assert run.data.metrics["total_flops"] == 6 * work["flops_per_step"]["2"]
    depths = [run.data.metrics[f"with_N2_accuracy_depth_{depth}"] for depth in (1, 2)]
    assert run.data.metrics["accuracy"] == pytest.approx(sum(depths) / 2)
    origin = json.loads((one_process / "origin.json").read_text())
    assert run.data.tags["mlflow.source.git.commit"] == origin["commit"]
    assert run.data.tags["folder"] == str(one_process) and run.data.tags["mlflow.source.type"] == "LOCAL"
    what, result, where = run.data.tags["mlflow.note.content"].split("\n\n")
    assert what.startswith("Task depo (nodes=6 max_hop=2 queries=4 ")
    assert what.endswith("N=2; 6 steps of 16 sequences of 23 tokens: 2,208 tokens; 1 process, fp32.")
    assert re.fullmatch(r"Result: loss \d\.\d{4}; held out, N=2: loss .*, accuracy at depth 1 to 2: .*\.", result)
    assert where == f"Checkpoints: `{one_process}/checkpoints`."
    shards = json.loads((one_process.parents[1] / "data" / "manifest.json").read_text())["shards"]
    inputs = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    for context in ("training", "testing"):
        hashes = "".join(
            shard["sha256"]
            for shard in shards
            if shard["file"].startswith({"training": "train", "testing": "test"}[context])
        )
        digest = hashlib.sha256(hashes.encode()).hexdigest()[:36]
        assert (inputs[context].name, inputs[context].digest) == ("data", digest)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")][-1] == column(one_process, "loss")[-1]
    assert "config.yaml" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


def test_a_finished_run_that_is_resumed_stays_as_it_is(folder, trained):
    from mlflow import MlflowClient

    run = trained["one"]
    client, number = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}"), (run / "mlflow_run_id").read_text().strip()
    before = client.get_run(number).data
    done = runs.warm_powernap("train", "runs/one/config.yaml", "--resume", cwd=folder)
    assert done.returncode == 0 and "finished before: all 6 steps are done" in done.stderr, done.stderr
    after = client.get_run(number)
    assert (after.data.tags, after.data.metrics) == (before.tags, before.metrics) and after.info.status == "FINISHED"


@pytest.mark.wide
def test_torchrun_may_start_the_processes(folder, trained):
    command = [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "powernap.launch.cli", "train", "tiny.yaml", "run.name=torchrun", "parallel.data=2"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert_same_training(folder / "runs" / "torchrun", trained["one"], 1e-5)


@pytest.mark.wide  # test_demo.py learns
def test_a_short_training_beats_chance_and_what_was_learned_is_in_the_fast_weights(tmp_path, topology, monkeypatch):
    sections = {"train": {"steps": 90, "global_batch_size": 32, "log_every": 30}, "checkpoint": {"every": 90}}
    runs.prepare(tmp_path, train_samples=2880, max_hop=1, **sections)
    overrides = ["optimizer.lr=0.01", "optimizer.warmup_steps=15"]
    result = runs.warm_powernap("train", "tiny.yaml", "run.name=learns", *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "learns"
    losses = column(run, "loss")
    assert sum(losses[-20:]) / 20 < 0.5 * losses[0]
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["accuracy/N2/depth_1"] > 0.9  # a constant guess gets about 1/6

    # The same model with its fast weights emptied at the window's end is back at chance.
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny.yaml")
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups).to(topology.device)
    Checkpoint.open(run / "checkpoints" / "step_00000090").load_weights(stage)

    def without_memory(stage, segments, *arguments, **options):
        empty = lambda fast_weights: tuple(torch.zeros_like(state) for state in fast_weights)  # noqa: E731
        with tiny.crossing(stage, segments, empty):
            return sleep_and_predict(stage, segments, *arguments, **options)

    kept = evaluate(stage, recipe, [2], 64, topology)
    monkeypatch.setattr("powernap.parallel.schedule.sleep_and_predict", without_memory)
    emptied = evaluate(stage, recipe, [2], 64, topology)
    assert kept.accuracy["2"]["1"] > 0.9 and emptied.accuracy["2"]["1"] < 0.35
