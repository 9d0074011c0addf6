"""What trackers get of a step: sums that a resume goes on with, summaries, one accuracy for every N."""

import json

from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.run.provenance import LOCAL_JOB
from powernap.train.tracking.about import datasets, job_of_process, story
from powernap.train.tracking.charts import chart_name
from powernap.train.tracking.metrics import to_json
from powernap.train.tracking.tracked import Tracked


def records():
    base = {"loss": 1.0, "grad_norm": 1.0, "tokens": 10}
    yield {"step": 1, **base, "passes": 1}
    yield {"step": 2, **base, "passes": 1, "fast_weights/block_1/pass_1/norm": 2.0, "fast_weights/block_3/pass_1/norm": 5.0,
           "fast_weights/block_1/pass_1/alpha": 0.9, "fast_weights/block_3/pass_1/alpha": 0.4}  # fmt: skip
    yield {"step": 3, **base, "passes": 4, "accuracy/N4/depth_1": 1.0, "accuracy/N4/depth_2": 0.5, "accuracy/N1/depth_1": 0.0,
           "held_out_loss/N4": 0.25, "held_out_loss/N1": 0.75}  # fmt: skip


def tracked(tmp_path, resumed):
    recipe = load_recipe("demo", ["sleep.passes={0: 1, 2: [1, 4]}"])
    work = {"phases": [{"flops_per_step": {"1": 100}}, {"flops_per_step": {"1": 100, "4": 350}}]}
    (tmp_path / "work.json").write_text(json.dumps(work))
    return Tracked(recipe, RunFolder(tmp_path), resumed)


def test_sums_summaries_and_one_accuracy(tmp_path):
    log = tracked(tmp_path, resumed=False)
    found = []
    for record in records():
        log.add(record)
        found.append(log.of(record))
    assert [f["total_tokens"] for f in found] == [10, 20, 30]
    assert [f["total_flops"] for f in found] == [100, 200, 550]
    assert found[1]["fast_weights/norm_max"] == 5.0 and found[1]["fast_weights/alpha_min"] == 0.4
    assert not any("block_" in name for name in found[1])
    assert not {"tokens", "flops"} & set(found[0]) and [f["passes"] for f in found] == [1, 1, 4]  # only what changes
    assert found[2]["accuracy"] == 0.75 and found[2]["held_out_loss"] == 0.25
    assert "accuracy" not in found[0]


def test_one_n_is_a_parameter_and_no_curve(tmp_path):
    record = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "tokens": 10, "seconds": 0.5, "passes": 4}
    log = Tracked(load_recipe("demo", ["sleep.passes=4"]), RunFolder(tmp_path), resumed=False)
    log.add(record)
    found = log.of(record)
    assert "passes" not in found and found["seconds_per_step"] == 0.5 and "seconds" not in found


def test_loss_and_accuracy_are_among_the_first_charts():
    """MLflow sorts: names with a slash first, then the others."""
    names = [
        "accuracy/N1/depth_1", "accuracy/N2/web/depth_3", "held_out_loss/N2", "held_out_loss/N2/windows_16/window_0",
        "fast_weights/norm_max", "fast_weights/alpha_min", "gradient_noise/scale", "accuracy", "grad_norm", "grad_norm_max",
        "gradient_spikes", "held_out_loss", "loss", "lr", "peak_memory_bytes", "seconds_per_step", "skipped_steps",
        "tokens_per_second", "total_flops", "total_tokens",
    ]  # fmt: skip
    charts = sorted(
        map(chart_name, names), key=lambda name: (name.rpartition("/")[0] == "", name.rpartition("/")[0], name)
    )
    assert charts[:8] == [
        "accuracy", "grad_norm", "grad_norm_max", "gradient_noise_scale", "gradient_spikes", "held_out_loss", "loss", "lr",
    ]  # fmt: skip
    assert charts[8:10] == ["max_norm_of_fast_weights", "min_alpha_of_fast_weights"]
    assert charts[-4:] == [
        "with_N1_accuracy_depth_1", "with_N2_accuracy_web_depth_3", "with_N2_held_out_loss",
        "with_N2_held_out_loss_windows_16_window_0",
    ]  # fmt: skip
    assert chart_name("mine/norm") == "mine/norm" and chart_name("system/gpu") == "system/gpu"


def test_a_resumed_run_goes_on_with_its_sums(tmp_path):
    lines = [json.dumps({"lr": 0.1, "seconds": 1.0, **record}) for record in records()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    log, last = tracked(tmp_path, resumed=True), list(records())[2]
    log.add(last)
    assert (log.tokens, log.flops) == (30, 550)


def steps(norms):
    for step, norm in norms.items():
        flags = {"skipped_step": True} if norm == float("inf") else {"gradient_spike": True} if norm > 9 else {}
        yield {"step": step, "loss": 1.0, "grad_norm": norm, "tokens": 10, **flags}


def test_what_happened_between_two_points_is_seen_at_the_next(tmp_path):
    """The recipe logs every 50 steps: of a spike and a skipped step in between, the norms of these steps alone say nothing."""
    inf, recipe = float("inf"), load_recipe("demo", ["train.log_every=50"])
    (tmp_path / "metrics.jsonl").write_text("")
    log, found = Tracked(recipe, RunFolder(tmp_path), resumed=False), {}
    norms = {1: 0.5, **dict.fromkeys(range(2, 121), 1.0), 40: 21.0, 45: inf, 70: 3.0, 101: inf, 102: 11.0}
    for record in steps(dict(sorted(norms.items()))):
        log.add(record)
        if record["step"] == 1 or log.is_point(record):
            sent = log.of(record)
            found[record["step"]] = [
                sent[n] for n in ("grad_norm", "grad_norm_max", "skipped_steps", "gradient_spikes")
            ]
    assert found == {1: [0.5, 0.5, 0, 0], 50: [1.0, 21.0, 1, 1], 100: [1.0, 3.0, 1, 1]}
    # A resume after step 120, and a first step that is skipped: of the steps since the last point, not since the first.
    lines = [json.dumps(to_json(record)) for record in steps(dict(sorted(norms.items())))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    log, (record,) = Tracked(recipe, RunFolder(tmp_path), resumed=True), steps({121: inf})
    log.add(record)
    sent = log.of(record)
    assert (sent["grad_norm_max"], sent["skipped_steps"], sent["gradient_spikes"]) == (11.0, 3, 2)
    (record,) = steps({122: inf})
    log.add(record)
    assert log.of(record)["grad_norm_max"] == inf  # no other is there
    off = Tracked(load_recipe("demo", ["train.spike_factor=null"]), RunFolder(tmp_path), resumed=True).of(record)
    assert "gradient_spikes" not in off and off["skipped_steps"] == 2  # not watched is not none


def test_a_run_in_a_line_and_its_data(tmp_path):
    recipe = load_recipe("demo", ["data.train=nowhere.tar"])
    assert story(recipe).startswith(
        "110,824 parameters, pattern AG, windows of 18 tokens, N=4; 800 steps of 48 sequences of 71"
    )
    (found,) = [d for d in datasets(recipe) if d["context"] == "training"]
    assert found["digest"] == "unknown"  # nothing is there
    remote = load_recipe("demo", ["data.train=https://me:hunter2@host/a.tar"])
    assert "hunter2" not in str(datasets(remote)) and datasets(remote)[0]["digest"] == "unknown"


def test_a_job_is_named_by_its_scheduler(monkeypatch):
    for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", LOCAL_JOB):
        monkeypatch.delenv(name, raising=False)
    assert job_of_process() is None
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr("socket.gethostname", lambda: "mine-0-abcde")
    assert job_of_process() == "Kubernetes pod mine-0-abcde"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert job_of_process() == "SLURM job 4711"
    monkeypatch.setenv(LOCAL_JOB, "815")  # on a node that SLURM has given us
    assert job_of_process() == "local job 815"


def test_what_another_packages_mixer_watches_is_summarised_too(tmp_path):
    found = tracked(tmp_path, resumed=False).of(
        {"step": 1, "loss": 1.0, "grad_norm": 1.0, "fast_weights/block_1/pass_1/gamma": 3.0}
    )
    assert found["fast_weights/gamma_max"] == 3.0
