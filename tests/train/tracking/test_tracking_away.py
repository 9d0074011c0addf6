"""A real MLflow server that is frozen, killed and started again while runs go on, and nothing of them is missing."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request

import pytest

from powernap.launch import cli
from powernap.train.report.compare import compare
from powernap.train.tracking.metrics import read_metrics
from powernap.train.tracking.tracker import Tracker, ui_command
from tests.helpers import runs

pytestmark = pytest.mark.faults

STEPS = 300  # of some 15 ms


class Server:
    """`mlflow server` on loopback, with its data in `folder`."""

    def __init__(self, folder):
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self):
        with open(self._folder / "server.log", "a") as log:
            command = ui_command(self._folder, self._port)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, 60)

    def arrivals(self, run):
        """The steps of a run's loss in the order in which they came."""
        query = "select step from metrics where run_uuid = ? and key = 'loss' order by rowid"
        with contextlib.closing(sqlite3.connect(self._folder / "mlflow.db")) as database:
            return [step for (step,) in database.execute(query, [run.info.run_id])]

    def signal(self, number):
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def _answers(self):
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.signal(signal.SIGKILL)


@pytest.fixture
def client(server, monkeypatch):
    """What the server knows; and this process tracks there."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    return MlflowClient(server.uri)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def the_run(client, experiment):
    """The only run of an experiment."""
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def steps_of(client, run, name="loss"):
    """(step, value) in the order of their time."""
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_a_frozen_server_holds_up_nobody_who_logs(server, client, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    server.signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out|timeout"):  # the control: who asks the server waits
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        client.get_experiment_by_name("frozen")
    assert time.monotonic() - start > 0.9

    tracker = Tracker(tmp_path, "frozen", {})
    waits, work = [], time.thread_time()
    for step in range(1, 1501):
        start = time.monotonic()
        tracker.log_metrics(step, {"loss": 1 / step})
        waits.append(time.monotonic() - start)
        time.sleep(0.001)
    assert (time.thread_time() - work) / len(waits) < 1e-3
    assert sum(waits) / len(waits) < 5e-3 and max(waits) < 0.5  # with what else this machine does
    server.signal(signal.SIGCONT)
    assert tracker.close() == 0 or cli.main(["sync", str(tmp_path)]) == 0
    assert steps_of(client, the_run(client, "frozen")) == [(step, 1 / step) for step in range(1, 1501)]
    assert server.arrivals(the_run(client, "frozen")) == list(range(1, 1501))


class Training:
    """`powernap train tiny.yaml` in a process of its own."""

    def __init__(self, folder, *arguments, uri):
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
        command = [sys.executable, "-m", "powernap.launch.cli", "train", "tiny.yaml", *arguments]
        self._metrics = folder / "runs" / "away" / "metrics.jsonl"
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)

    def reach(self, step):
        """Wait until `step` is done; the run must still go on then."""
        wait_for(lambda: self.step() >= step or self.process.poll() is not None)
        assert self.process.poll() is None

    def step(self):
        return len(self._metrics.read_bytes().splitlines()) if self._metrics.exists() else 0

    def end(self):
        """(exit code, stderr)"""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.mark.wide  # test_tracker.py has each of its parts
def test_a_run_whose_server_comes_and_goes_is_complete_and_the_same(server, client, tmp_path, monkeypatch, capfd):
    """Frozen when it starts, killed in the middle, away when it is stopped, back when it is resumed."""
    sections = {
        "run": {"experiment": "away"},
        "train": {"steps": STEPS, "global_batch_size": 4, "log_every": 1},
        "checkpoint": {"every": 80},
        "evaluation": {"samples": 16},
    }
    runs.prepare(tmp_path, **sections)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "away"

    server.signal(signal.SIGSTOP)
    training = Training(tmp_path, "run.name=away", uri=server.uri)
    wait_for(lambda: "tracking to MLflow failed" in read(run / "logs" / "train.log"))
    training.reach(20)
    server.signal(signal.SIGCONT)
    wait_for(lambda: (run / "mlflow_run_id").exists())
    run_id = (run / "mlflow_run_id").read_text().strip()
    assert training.process.poll() is None
    assert cli.main(["sync", "away"]) == 1
    assert "still training" in capfd.readouterr().err
    server.signal(signal.SIGKILL)
    training.reach(training.step() + 20)
    training.process.send_signal(signal.SIGINT)
    code, errors = training.end()
    assert code == 130 and "records of this run wait for MLflow: `powernap sync runs/away` delivers them" in errors

    # Another run never sees the server.
    (tmp_path / "runs" / "offline").mkdir()
    (tmp_path / "runs" / "offline" / "config.yaml").write_text("")
    offline = Tracker(tmp_path / "runs" / "offline", "offline", {"a": 1})
    offline.log_metrics(1, {"loss": 0.5})
    assert offline.close("FAILED", timeout=5) == 4
    assert cli.main(["sync"]) == 1
    out, errors = capfd.readouterr()
    assert errors.count("powernap: error: ") == 2 and errors.count("still wait for MLflow: ") == 2 and not out

    server.start()
    assert cli.main(["sync"]) == 0
    out, _ = capfd.readouterr()
    assert "runs/offline: 4 records delivered" in out and "runs/away: " in out
    found = the_run(client, "offline")
    assert found.info.status == "FAILED" and found.data.params == {"a": "1"} and steps_of(client, found) == [(1, 0.5)]
    found = the_run(client, "away")
    assert found.info.run_id == run_id and found.info.status == "KILLED"
    stopped = [(record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]
    assert steps_of(client, found) == stopped
    assert server.arrivals(found) == [step for step, _ in stopped]
    assert cli.main(["sync", "away"]) == 0 and "nothing waits" in capfd.readouterr().out

    both = {"away": ["--resume"], "undisturbed": ["run.experiment=undisturbed"]}
    _, undisturbed = runs.train_in_turn(tmp_path, 1, both, MLFLOW_TRACKING_URI=server.uri).values()
    found = the_run(client, "away")
    assert found.info.run_id == run_id and found.info.status == "FINISHED"
    first = int(found.data.tags["resumed_at_steps"]) + 1
    again = [(record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]
    # Steps done again are there twice.
    assert steps_of(client, found) == stopped + again[first - 1 :]
    report, equal = compare(undisturbed, run)
    assert equal, report


def read(path):
    return path.read_text() if path.exists() else ""
