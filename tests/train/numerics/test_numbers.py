"""Numbers that are not finite, or leave what they were: skipped steps, spikes, the module at fault, the same bits."""

import json
import os
import re
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from powernap.parallel.checkpoint.manifest import read_manifest
from powernap.train.config import DataConfig
from powernap.train.data.cache import cache_of
from powernap.train.data.order import Cursor, Lane, Mixture, Order
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards
from powernap.train.numerics.deterministic import ENVIRONMENT, deterministic
from powernap.train.numerics.skipped_steps import reset_nonfinite_lanes
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import bad_runs, runs
from tests.helpers.bad_runs import PARAMETER

pytestmark = pytest.mark.faults

STEPS = 14
BAD = {5: "nan", 7: "nan", 13: "large"}
CARRY = ["sleep.carry=true", "sleep.every_window=true", "model.window=23", "train.global_batch_size=4", "data.lanes=4"]
SAME = ["train.deterministic=true"]

# name: processes, what goes wrong, arguments
CASES = {
    "good": (1, {}, SAME),
    "again": (1, {}, SAME),
    "bad": (1, BAD, []),
    "stopped": (1, {3: "nan", 4: "nan"}, ["train.skip_budget=1"]),
    "apart": (1, {3: "nan", 9: "nan"}, ["train.skip_budget=1"]),
    "clean": (1, {}, ["--detect-anomaly"]),
    "forward": (1, {3: "forward"}, ["--detect-anomaly"]),
    "backward": (1, {3: "backward"}, ["--detect-anomaly"]),
    "good_data": (2, {}, ["parallel.data=2", *SAME]),
    "again_data": (2, {}, ["parallel.data=2", *SAME]),
    "bad_data": (2, BAD, ["parallel.data=2", "zero.stage=3"]),
    "bad_pipeline": (2, BAD, ["parallel.pipeline=2", "data.workers=1"]),
    "carried": (2, {5: "state"}, ["parallel.data=2", *CARRY]),
    "stopped_data": (2, {3: "nan"}, ["parallel.data=2", "train.skip_budget=0"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    runs.prepare(folder, train={"steps": STEPS}, evaluation={"every": None})
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """name -> each rank's (exit code, stderr)."""
    found = {}
    for processes in (1, 2):
        chosen = {name: case[1:] for name, case in CASES.items() if case[0] == processes}
        found |= bad_runs.train_badly(folder, processes, chosen)
    return found


def records(folder, name):
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def skipped(folder, name):
    return [json.loads(line) for line in (folder / "runs" / name / "skipped_steps.jsonl").read_text().splitlines()]


def log(folder, name):
    return (folder / "runs" / name / "logs" / "train.log").read_text()


def checkpoint(folder, name, step=STEPS):
    """Every tensor of a checkpoint, by file and name."""
    path = folder / "runs" / name / "checkpoints" / f"step_{step:08d}"
    return {(file.name, key): value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}


def test_skipped_steps_are_marked_and_the_run_goes_on(folder, results):
    for name in ("bad", "bad_data", "bad_pipeline"):
        assert {code for code, _ in results[name]} == {0}, results[name]
        found = records(folder, name)
        assert [record["step"] for record in found] == list(range(1, STEPS + 1))
        assert [record["step"] for record in found if record.get("skipped_step")] == [5, 7]
        assert found[-1]["loss"] < found[0]["loss"]
        # The learning rate goes by the step's number.
        assert [record["lr"] for record in found] == [record["lr"] for record in records(folder, "good")]
    assert not (folder / "runs" / "good" / "skipped_steps.jsonl").exists()


def test_a_skipped_step_names_the_parameter_and_the_rank(folder, results):
    places = {"bad": "rank 0 (data 0, stage 0, tensor 0)", "bad_data": "rank 1 (data 1, stage 0, tensor 0)",
              "bad_pipeline": "rank 1 (data 0, stage 1, tensor 0)"}  # fmt: skip
    for name, place in places.items():
        for record in skipped(folder, name):
            assert record["not_finite"] == [{"rank": place, "parameters": 1, "first": [PARAMETER]}]
            assert record["ranks_not_finite"] == 1 and record["grad_norm"] in ("NaN", "Infinity")
        assert "step 5 skipped: loss 2." in log(folder, name) and f"first in {place}: {PARAMETER}" in log(folder, name)


def test_a_skipped_step_names_the_samples_of_its_batch(folder, results, monkeypatch):
    """Against order.py, sample by sample, and keys as WebDataset finds them."""
    import webdataset

    monkeypatch.chdir(folder)
    data = DataConfig(**runs.RECIPE["data"])
    order = Order(tuple(expand_shards(data.train, "data.train")), 2, 0, data.shuffle_buffer)
    lanes = [Lane(order, lane, Cursor(), lambda name, _: Shard.open(name, cache_of(data))) for lane in range(2)]
    keys = {
        name: [sample["__key__"] for sample in webdataset.WebDataset(name, shardshuffle=False)] for name in order.shards
    }
    mixture, expected = Mixture((1.0,), 0), {}
    for step in range(1, STEPS + 1):
        expected[step] = []
        for number in range((step - 1) * 16, step * 16):
            _, place = mixture.locate(number)
            shard, i = lanes[place % 2].find(place // 2)
            expected[step].append(f"{shard.name}:{keys[shard.name][i]}")
    for name in ("bad", "bad_data", "bad_pipeline"):
        assert {record["step"]: record["samples"] for record in skipped(folder, name)} == {
            step: expected[step] for step in (5, 7)
        }
        assert len(set(expected[5])) == 16


def test_the_count_and_the_file_survive_a_resume(folder, results):
    before = folder / "runs" / "bad"
    broken = shutil.copytree(before, folder / "again" / "bad")
    shutil.rmtree(broken / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(broken / "checkpoints" / "step_00000010")
    again = ["run.root=again", "--resume"]
    found = bad_runs.train_badly(folder, 1, {"bad": (BAD, again)})
    assert {code for code, _ in found["bad"]} == {0}, found
    assert (broken / "skipped_steps.jsonl").read_text() == (before / "skipped_steps.jsonl").read_text()
    state = read_manifest(broken / "checkpoints" / f"step_{STEPS:08d}")["state"]
    assert state["skipped_steps"] == [5, 7]
    assert [r["loss"] for r in read_metrics(broken / "metrics.jsonl")] == [r["loss"] for r in records(folder, "bad")]


def test_more_than_the_budget_stops_the_run_with_one_line(folder, results):
    for name in ("stopped", "apart", "stopped_data"):
        for rank, (code, said) in enumerate(results[name]):
            assert code == 2
            (line,) = [line for line in said.splitlines() if line.startswith("powernap: error: ")]
            assert "train.skip_budget" in line and PARAMETER in line and f"runs/{name}/skipped_steps.jsonl" in line, (
                rank
            )
            assert "Traceback" not in said
    (_, stopped), (_, apart) = results["stopped"][0], results["apart"][0]
    assert "in 2 steps, 3-4 " in stopped and "optimizer.lr" in stopped
    assert "in 2 steps, 3, 9 " in apart and "samples" in apart
    assert records(folder, "stopped")[-1]["step"] == 4


def test_a_spike_is_logged_with_the_parameters_that_grew(folder, results):
    for name in ("bad", "bad_data", "bad_pipeline"):
        (line,) = [line for line in log(folder, name).splitlines() if "times the median" in line]
        assert "step 13: gradient norm" in line and "of the last 10 steps" in line
        first = line.split("grown most: ")[1].split(",")[0]
        assert first.startswith(PARAMETER), line
    assert "times the median" not in log(folder, "good")


def test_anomaly_detection_leaves_a_clean_run_as_it_is(folder, results):
    assert results["clean"][0][0] == 0
    good = [record["loss"] for record in records(folder, "good")]
    assert [record["loss"] for record in records(folder, "clean")] == pytest.approx(good, rel=1e-5)


def test_anomaly_detection_names_the_module(folder, results):
    expected = {
        "forward": ("forward of window 0 pass 1, micro-batch 0: decoder.layers.1.self_attention.in_proj: output not finite, "
                    "input finite, its weight not finite"),
        "backward": ("backward of window 1 pass 1, micro-batch 0: decoder.layers.1.self_attention.out_proj: gradient of its "
                     "output not finite"),
    }  # fmt: skip
    for name, words in expected.items():
        ((code, said),) = results[name]
        lines = [line for line in said.splitlines() if line.startswith("powernap: error: ")]
        assert code == 2 and len(lines) == 1, said
        assert f"rank 0 (data 0, stage 0, tensor 0): step 3, {words}" in lines[0]


def test_anomaly_detection_in_a_pipeline_names_module_and_stage(folder):
    """Processes of their own, of which the first to fail takes the other down; weights that are finite but far too large."""
    arguments = ["run.name=too_fast", "parallel.pipeline=2", "optimizer.lr=1e30", "optimizer.warmup_steps=0"]
    result = runs.warm_powernap("train", "tiny.yaml", *arguments, "--detect-anomaly", cwd=folder)
    lines = [line for line in result.stderr.splitlines() if line.startswith("powernap: error: ")]
    assert result.returncode == 2, result.stderr
    # It may have passed the first stage; the last one's normalisation has no chance.
    assert re.match(
        r"powernap: error: rank \d \(data 0, stage \d, tensor 0\): step 2, (for|back)ward of window", lines[0]
    )
    assert re.search(r"micro-batch \d: decoder\.\w+.*not finite", lines[0]) and "Traceback" not in result.stderr


def test_two_deterministic_runs_agree_to_the_bit(folder, results):
    timing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    for one, other in (("good", "again"), ("good_data", "again_data")):
        a, b = (
            [{k: v for k, v in r.items() if k not in timing} for r in records(folder, name)] for name in (one, other)
        )
        assert a == b and len(a) == STEPS
        found = checkpoint(folder, one)
        same = checkpoint(folder, other)
        assert len(found) > 30 and found.keys() == same.keys()
        assert all(torch.equal(value, same[key]) for key, value in found.items())
    # What could differ: two processes add in another order than one.
    norms = [[r["grad_norm"] for r in records(folder, name)] for name in ("good", "good_data")]
    assert norms[0] != norms[1]


def test_deterministic_asks_torch_and_leaves_what_the_environment_says():
    without = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    with mock.patch.dict(os.environ, {**without, "NCCL_ALGO": "Tree"}, clear=True):
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Tree"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_lane_whose_fast_weights_broke_begins_anew_in_a_run(folder, results):
    assert {code for code, _ in results["carried"]} == {0}, results["carried"]
    (record,) = skipped(folder, "carried")
    assert record["step"] == 5 and record["lanes_begun_anew"] == [1]
    assert "the fast weights of lanes 1 begin anew" in log(folder, "carried")
    assert sum("skipped_step" in record for record in records(folder, "carried")) == 1  # or step 6 would be NaN too


def test_only_lanes_that_are_broken_begin_anew(topology):
    layer_states = (torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4))
    layer_states[1][1, 0, 2, 3] = float("inf")
    left, lanes = reset_nonfinite_lanes(layer_states, topology)
    assert lanes == [1]
    for state in left:
        assert state[1].eq(0).all() and state[[0, 2]].eq(1).all()
    assert reset_nonfinite_lanes(None, topology) == (None, [])


def test_a_lane_that_broke_on_another_stage_begins_anew_here_too(topology, monkeypatch):
    """Ranks of two stages with two data ranks: this one's states are finite, as are those of the other data rank."""
    found = [(0, []), (1, []), (0, [2]), (1, [0])]
    monkeypatch.setattr(type(topology), "all_gather_object", lambda self, value: [value, *found[1:]])
    layer_states = (torch.ones(3, 2, 4, 4),)
    (state,), lanes = reset_nonfinite_lanes(layer_states, replace(topology, dp_size=2))
    assert lanes == [1, 4]
    assert state[2].eq(0).all() and state[:2].eq(1).all()
