"""Jobs on this machine: the words of every cluster, with real processes."""

import json
import re
import shlex
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers import runs
from tests.helpers.runs import wait_for

STEPS = 12
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    runs.prepare(folder, train={"steps": STEPS}, checkpoint={"every": 1})
    return folder


@contextmanager
def submitted(folder: Path, name: str, *overrides: str, submit=runs.powernap):
    """A job, ended with all its processes whatever happens. By runs.warm_powernap its ranks have their libraries."""
    done = submit("submit", "tiny.yaml", "--on", "local", f"run.name={name}", *overrides, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)
    assert job["run"] == name
    supervisor = psutil.Process(int(job["id"]))
    try:
        yield supervisor
    finally:
        for process in [*supervisor.children(recursive=True), supervisor] if supervisor.is_running() else []:
            process.kill()


def status(folder: Path, name: str) -> dict:
    (row,) = json.loads(runs.powernap("status", name, "--json", cwd=folder).stdout)
    return row


def steps(folder: Path, name: str) -> list[dict]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_killed_rank_costs_a_retry_and_the_losses_are_those_of_an_unbroken_run(folder):
    options = ["parallel.data=2", "train.steps=30"]  # warm ranks would end 12 before they are killed
    with submitted(folder, "broken", *options, submit=runs.warm_powernap):
        wait_for(lambda: len(steps(folder, "broken")) > 2)
        runs.rank_of("runs/broken/", 1).kill()
        assert runs.powernap("wait", "broken", "--timeout", "2m", cwd=folder).returncode == 0
    row = status(folder, "broken")
    assert (row["state"], row["restarts"], row["step"]) == ("succeeded", 1, 30)
    assert "was ended by SIGKILL" in runs.powernap("logs", "broken", cwd=folder).stdout
    plain = runs.warm_powernap("train", "tiny.yaml", "run.name=plain", *options, cwd=folder)
    assert plain.returncode == 0
    losses = {record["step"]: record["loss"] for record in steps(folder, "broken")}
    assert losses == {record["step"]: record["loss"] for record in steps(folder, "plain")}


def test_cancel_saves_leaves_no_process_and_the_same_submit_goes_on(folder):
    with submitted(folder, "stopped", "parallel.data=2", "train.steps=100000") as supervisor:
        follower = subprocess.Popen(
            [*runs.COMMAND, "logs", "-f", "stopped"],
            cwd=folder, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: len(steps(folder, "stopped")) > 2)
        again = runs.powernap("submit", "tiny.yaml", "--on", "local", "run.name=stopped", cwd=folder)
        runs.assert_one_line(again, "stopped is running as job", "powernap cancel stopped")
        family = supervisor.children(recursive=True)
        assert runs.powernap("cancel", "stopped", cwd=folder).returncode == 0
        assert runs.powernap("wait", "stopped", "--timeout", "1m", cwd=folder).returncode == 3
        assert not any(process.is_running() for process in family)
        assert "continue with --resume" in follower.communicate(timeout=10)[0]
    assert status(folder, "stopped")["exit_code"] == 75
    reached = len(steps(folder, "stopped"))
    with submitted(folder, "stopped", "parallel.data=2", "train.steps=100000", submit=runs.warm_powernap):
        wait_for(lambda: len(steps(folder, "stopped")) > reached)
        assert status(folder, "stopped")["attempt"] == 2
        assert [r["step"] for r in steps(folder, "stopped")][: reached + 1] == list(range(1, reached + 2))


@pytest.mark.parametrize(("exits", "restarts", "reason"), [(1, 2, "after 3 failed starts"), (2, 0, "would not help")])
def test_what_fails_for_good_is_not_tried_for_ever(folder, exits, restarts, reason):
    environment = folder / f"ends-with-{exits}"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/powernap").write_text(f"#!/bin/sh\nexit {exits}\n")
    (environment / "bin/powernap").chmod(0o755)
    name = f"fatal{exits}"
    with submitted(folder, name, "job.retries=2", f"job.environment={environment}"):
        assert runs.powernap("wait", name, "--timeout", "1m", cwd=folder).returncode == 1
    row = status(folder, name)
    assert (row["state"], row["exit_code"], row["restarts"]) == ("failed", exits, restarts) and reason in row["reason"]


def test_a_supervisor_that_is_gone_is_told(folder):
    with submitted(folder, "gone", "train.steps=100000") as supervisor:
        family = supervisor.children(recursive=True)
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait(10)
        row = status(folder, "gone")
        assert row["state"] == "lost" and "supervisor is gone" in row["reason"]
        assert not psutil.wait_procs(family, 30)[1]  # a run without its supervisor saves and ends


def test_a_launcher_that_was_killed_is_started_again_when_its_ranks_have_left(folder):
    """They still save, with the run's lock. A hang-up is nothing to a supervisor."""
    with submitted(folder, "relaunched", "parallel.data=2") as supervisor:
        wait_for(lambda: len(steps(folder, "relaunched")) > 2)
        supervisor.send_signal(signal.SIGHUP)
        supervisor.children()[0].kill()
        assert runs.powernap("wait", "relaunched", "--timeout", "4m", cwd=folder).returncode == 0
    row = status(folder, "relaunched")
    assert (row["state"], row["restarts"], row["step"]) == ("succeeded", 1, STEPS)


def tracked_runs(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("powernap").experiment_id])


def test_a_sweep_is_one_table_and_runs_in_turn(folder):
    sweep = ["submit", "tiny.yaml", "--on", "local", "run.name=sweep", "sleep.passes=1,2", "train.steps=2"]
    assert runs.warm_powernap(*sweep, cwd=folder).returncode == 0
    rows = json.loads(runs.powernap("status", "sweep", "--json", cwd=folder).stdout)
    assert sum(row["state"] == "running" for row in rows) <= 1
    assert runs.powernap("wait", "sweep", "--timeout", "3m", cwd=folder).returncode == 0
    table = runs.powernap("status", "sweep", cwd=folder).stdout
    names = {"sweep-passes1", "sweep-passes2"}
    assert names == {line.split()[0] for line in table.splitlines()[1:]} and table.count("succeeded") == 2
    assert max(map(len, table.splitlines())) <= 80
    tracked = tracked_runs(folder)
    parent = next(run for run in tracked if run.info.run_name == "sweep")
    below = {run.info.run_name for run in tracked if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert below == names and parent.info.status == "FINISHED" and not parent.data.metrics
    shared = {"command", "mlflow.user", "mlflow.source.name", "mlflow.source.git.commit"}
    assert all(parent.data.tags[tag] == tracked[0].data.tags[tag] for tag in shared)
    assert {i.dataset.name for i in parent.inputs.dataset_inputs} == {
        i.dataset.name for i in tracked[0].inputs.dataset_inputs
    }
    table = {
        line.split(" | ")[0].strip("| "): line for line in parent.data.tags["mlflow.note.content"].splitlines()[2:]
    }
    ended = {run.info.run_name: run for run in tracked}
    assert all(f"finished | {ended[name].data.metrics['accuracy']:.4g} |" in table[name] for name in names)
    assert parent.info.end_time == max(ended[name].info.end_time for name in names)
    for run in tracked:
        if run.info.run_name in names:
            record = json.loads((folder / "runs" / run.info.run_name / "jobs" / "1" / "record.json").read_text())
            assert run.data.tags["command"] == record["submitted_as"] == shlex.join(["powernap", *sweep])
            assert run.data.tags["mlflow.source.name"] == "powernap submit tiny.yaml"
            assert re.fullmatch(r"local job \d+", run.data.tags["job"]) and run.data.tags["mlflow.source.type"] == "JOB"
    runs.assert_one_line(runs.powernap(*sweep, cwd=folder), "all 2 runs of the sweep sweep have succeeded already")
    listed = {row["run"] for row in json.loads(runs.powernap("list", "--json", cwd=folder).stdout)}
    assert names <= listed
