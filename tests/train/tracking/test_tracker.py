import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest

from powernap.launch import cli
from powernap.train.recipe_file import flatten
from powernap.train.tracking.about import About
from powernap.train.tracking.delivery import KEY_TAG, OLD_KEY_TAG, Delivery, sync_run
from powernap.train.tracking.tracker import Tracker
from powernap.train.tracking.trackers import Trackers
from tests.helpers import runs

CONFIG = {"run": {"name": "demo"}, "sleep": {"passes": [1, 4], "loop_range": None}, "train": {"steps": 100}}


@pytest.fixture
def run_folder(tmp_path, monkeypatch, whole_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "all runs" / "demo"  # a space, as paths may have
    folder.mkdir(parents=True)
    shutil.copy(whole_database, folder.parent)
    (folder / "config.yaml").write_text("train:\n  steps: 100\n")
    (folder / "origin.json").write_text("{}")
    return folder


def open_client(run_folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{run_folder.parent / 'mlflow.db'}")


def test_a_run_arrives_and_a_resumed_one_goes_on_in_it(run_folder, monkeypatch):
    long = "x" * 7000
    tracker = Tracker(run_folder, "sleep", CONFIG | {"long": long})
    for step in (1, 2, 3):
        tracker.log_metrics(step, {"step": step, "loss": 0.1 * step, "note": "no number"})
    (run_folder / "plot.png").write_bytes(b"a picture")
    tracker.log_artifact(run_folder / "plot.png", folder="plots")
    assert tracker.close("KILLED") == 0

    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    client = open_client(run_folder)
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.run_name == "demo"
    assert client.get_experiment(run.info.experiment_id).name == "sleep"
    assert run.data.params["train.steps"] == "100"
    assert run.data.params["sleep.passes"] == "[1, 4]"
    assert run.data.params["sleep.loop_range"] == "null"
    assert run.data.params["long"].endswith("x ... [cut]")
    assert set(run.data.metrics) == {"loss"}
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 0.1), (2, 0.2), (3, 0.1 * 3)]
    artifacts = run_folder.parent / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "config.yaml").read_text() == "train:\n  steps: 100\n"
    assert (artifacts / "origin.json").read_text() == "{}"
    assert (artifacts / "plots" / "plot.png").read_bytes() == b"a picture"

    monkeypatch.chdir(run_folder.parent)  # a relative folder names the same store
    longer = CONFIG | {"long": long, "train": {"steps": 200}, "new": 1}
    tracker = Tracker(run_folder.relative_to(run_folder.parent), "sleep", longer, resume_step=3)
    tracker.log_metrics(4, {"loss": 0.5})
    assert tracker.close() == 0
    run = client.get_run(run_id)
    assert (run_folder / "mlflow_run_id").read_text().strip() == run_id
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "100"  # MLflow's parameters never change
    assert run.data.tags["parameters_changed"] == "train.steps: 100 -> 200"
    assert run.data.params["new"] == "1"
    assert run.data.tags["resumed_at_steps"] == "3"
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4]


def test_a_description_is_replaced_at_the_end_unless_somebody_has_written_another(run_folder):
    started = About({"mlflow.note.content": "what it is"}, [])
    for written, expected in ((None, "what it is, and its result"), ("mine", "mine")):
        tracker = Tracker(run_folder, "sleep", CONFIG, about=started)
        runs.wait_for(lambda tracker=tracker: not tracker._delivery.waiting())
        run_id = (run_folder / "mlflow_run_id").read_text().strip()
        if written:
            open_client(run_folder).set_tag(run_id, "mlflow.note.content", written)
        tracker.describe("what it is, and its result")
        assert tracker.close() == 0
        assert open_client(run_folder).get_run(run_id).data.tags["mlflow.note.content"] == expected


def test_a_run_that_an_older_version_began_is_found_by_its_key(run_folder):
    assert Tracker(run_folder, "sleep", CONFIG).close() == 0
    client, run_id = open_client(run_folder), (run_folder / "mlflow_run_id").read_text().strip()
    client.set_tag(run_id, OLD_KEY_TAG, client.get_run(run_id).data.tags[KEY_TAG])
    client.delete_tag(run_id, KEY_TAG)
    (run_folder / "mlflow_run_id").unlink()
    assert Tracker(run_folder, "sleep", CONFIG, resume_step=1).close() == 0
    assert (run_folder / "mlflow_run_id").read_text().strip() == run_id


@pytest.mark.wide  # MLflow's server starts in ten seconds
def test_the_pages_show_the_run_on_loopback_and_end_when_asked(run_folder, capfd):
    tracker = Tracker(run_folder, "sleep", CONFIG)
    tracker.log_metrics(1, {"loss": 0.25})
    assert tracker.close() == 0
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*runs.COMMAND, "ui", "--root", str(run_folder.parent), "--port", str(port)]
    with open(run_folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=run_folder)
    started = []
    try:
        run = json.loads(get(server, f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]
        assert run["data"]["metrics"][0]["value"] == 0.25
        config = get(server, f"http://127.0.0.1:{port}/get-artifact?path=config.yaml&run_uuid={run_id}")
        assert config == (run_folder / "config.yaml").read_bytes()
        said = (run_folder / "server.log").read_text()
        address, *others = said.splitlines()
        assert address == f"all runs: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
        assert all("[MLflow] Security middleware enabled" in line for line in others), said  # it stays to be seen
        assert cli.main(command[len(runs.COMMAND) :]) == 2
        assert f"--port {port}: " in (error := capfd.readouterr().err) and "choose another one" in error
        started = psutil.Process(server.pid).children(recursive=True)
        assert len(started) >= 2  # MLflow's command and its server
        server.terminate()
        assert server.wait(30) == 128 + signal.SIGTERM
        assert not [process for process in started if process.is_running()]
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
    finally:
        server.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


SERVE = """
import sys
from powernap.launch.commands import ui

ui.END_SECONDS = 0.5
sys.exit(ui._serve(sys.argv[1:]))
"""


def test_the_pages_end_on_a_sigterm_that_whoever_started_them_ignores(tmp_path):
    """As a scheduler's or a container's: only a terminal's signals are somebody's wish to ignore."""
    shell = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh"]
    command = [*shell, sys.executable, "-c", SERVE, "sh", "-c", "echo > started; sleep 100"]
    process = subprocess.Popen(command, cwd=tmp_path)
    wait_for((tmp_path / "started").exists)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_that_the_pages_started_outlives_them(tmp_path, sent):
    server = "trap '' INT TERM HUP; sleep 100 & echo $$ $! > started; wait"  # which listens to nobody
    command = [sys.executable, "-c", SERVE, "sh", "-c", server]
    process = subprocess.Popen(command, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "started").exists() and len((tmp_path / "started").read_text().split()) == 2)
    process.send_signal(sent)
    assert process.wait(20) == 128 + sent
    for number in (tmp_path / "started").read_text().split():
        assert not psutil.pid_exists(int(number)) or psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE


def test_pages_started_by_nohup_outlive_the_terminal_and_a_failure_is_passed_on(tmp_path):
    server = "echo > started; until [ -e go ]; do sleep 0.02; done; exit 3"
    command = ["nohup", sys.executable, "-c", SERVE, "sh", "-c", server]
    process = subprocess.Popen(command, cwd=tmp_path)
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert process.wait(20) == 3


def get(server, url):
    """The answer to GET, once the server is up."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_run_that_mlflow_does_not_know_gets_a_new_one(run_folder, caplog):
    (run_folder / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    assert Tracker(run_folder, "sleep", CONFIG, resume_step=7).close() == 0
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    assert open_client(run_folder).get_run(run_id).info.status == "FINISHED"
    assert run_id != "0123456789abcdef0123456789abcdef"
    assert "tracking continues in a new one" in caplog.text


def dead_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")


def silent_server(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))  # accepts connections, never answers
    monkeypatch.setattr(silent_server, "listener", listener, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize("server", [dead_server, silent_server])
def test_a_server_that_does_not_answer_neither_slows_nor_stops(run_folder, monkeypatch, caplog, server):
    server(monkeypatch)
    tracker = Tracker(run_folder, "sleep", CONFIG)
    slowest = 0.0
    for step in range(1, 201):
        start = time.perf_counter()
        tracker.log_metrics(step, {"loss": 1.0})
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.001)
    assert slowest < 0.01
    start = time.perf_counter()
    assert tracker.close(timeout=1.0) == 204  # the parameters, config.yaml, origin.json, 200 steps and the status
    assert time.perf_counter() - start < 1.5
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    failures = [line for line in warnings if "tracking to MLflow failed" in line]
    assert len(failures) == (1 if server is dead_server else 0)  # the silent one has not failed yet
    assert "204 records of this run wait for MLflow: `powernap sync " in warnings[-1]
    assert len(warnings) == len(failures) + 1  # nothing from the HTTP library
    assert "secret" not in caplog.text
    assert "\n" not in "".join(warnings)


def test_an_artifact_that_is_missing_costs_only_itself(run_folder, caplog):
    tracker = Tracker(run_folder, "sleep", CONFIG)
    tracker.log_artifact(run_folder / "late.png")
    tracker.log_metrics(1, {"loss": 0.5})
    assert tracker.close() == 1
    run = open_client(run_folder).get_run((run_folder / "mlflow_run_id").read_text().strip())
    assert run.data.metrics == {"loss": 0.5}
    assert "1 records of this run wait for MLflow" in caplog.messages[-1] and "late.png" in caplog.messages[-1]
    (run_folder / "late.png").write_bytes(b"a picture")
    assert sync_run(run_folder).delivered == 1  # what was set aside is tried again
    client = open_client(run_folder)
    assert "late.png" in [file.path for file in client.list_artifacts(run.info.run_id)]


def lose_an_answer(monkeypatch, method, number):
    """Call `number` of an MlflowClient's `method` is done, but its answer does not arrive; returns all calls."""
    from mlflow import MlflowClient

    real, calls = getattr(MlflowClient, method), []

    def call(*arguments, **options):
        calls.append(arguments)
        result = real(*arguments, **options)
        if len(calls) == number:
            raise ConnectionError("no answer")
        return result

    monkeypatch.setattr(MlflowClient, method, call)
    return calls


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("create_experiment", 1),
        ("create_run", 1),
        ("log_batch", 1),  # parameters
        ("log_batch", 2),  # tags
        ("log_batch", 3),  # metrics
        ("set_terminated", 1),
    ],
)
def test_what_is_sent_again_after_a_lost_answer_is_there_once(run_folder, monkeypatch, method, number):
    calls = lose_an_answer(monkeypatch, method, number)
    tracker = Tracker(run_folder, "sleep", CONFIG, resume_step=3)
    for step in range(1, 6):
        tracker.log_metrics(step, {"loss": 0.5, "nothing": float("nan"), "much": float("inf")})
    if tracker.close() > 0:
        sync_run(run_folder)
    if method.startswith("create"):
        assert len(calls) == 1  # it is looked for before another is made
    else:
        assert len(calls) > number
    client = open_client(run_folder)
    experiment = client.get_experiment_by_name("sleep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_folder / "mlflow_run_id").read_text().strip()
    assert run.info.status == "FINISHED" and run.data.tags["resumed_at_steps"] == "3"
    for name in ("loss", "nothing", "much"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3, 4, 5]


def test_a_run_created_twice_by_a_frozen_server_is_one_in_the_end(run_folder):
    from mlflow.entities import ViewType

    tracker = Tracker(run_folder, "sleep", CONFIG)
    tracker.log_metrics(1, {"loss": 0.5})
    assert tracker.close() == 0
    client = open_client(run_folder)
    run = client.get_run((run_folder / "mlflow_run_id").read_text().strip())
    # The server wakes up and does what was asked of it before.
    late = client.create_run(run.info.experiment_id, tags={KEY_TAG: run.data.tags[KEY_TAG]})
    other = client.create_run(run.info.experiment_id, tags={KEY_TAG: "another run's"})
    assert Tracker(run_folder, "sleep", CONFIG, resume_step=1).close() == 0
    active = {run.info.run_id for run in client.search_runs([run.info.experiment_id])}
    assert active == {run.info.run_id, other.info.run_id}
    deleted = client.search_runs([run.info.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert [run.info.run_id for run in deleted] == [late.info.run_id]


def test_a_refused_record_does_not_hold_up_the_others(run_folder, caplog, capfd):
    tracker = Tracker(run_folder, "sleep", CONFIG | {"odd#key": 1})
    for step in (1, 2, 3):
        tracker.log_metrics(step, {"loss": 0.5, "acc": 0.1} | ({"odd#name": 1.0} if step == 2 else {}))
    assert tracker.close() == 0
    assert "MLflow refused 1 records of this run" in caplog.messages[-1]  # step 2
    client = open_client(run_folder)
    run = client.get_run((run_folder / "mlflow_run_id").read_text().strip())
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "100"
    assert run.data.params["odd_key"] == "1"  # patterns of optimizer.groups are part of such keys
    for name in ("loss", "acc"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3]
    assert caplog.text.count("MLflow refuses a record") == 1 and "odd#" in caplog.text
    assert "wait for MLflow" not in caplog.text
    assert cli.main(["sync", str(run_folder)]) == 0
    out = capfd.readouterr().out
    assert "nothing waits; MLflow refused 1, which are not sent again: MlflowException: Invalid" in out


def test_a_line_cut_short_by_a_crash_costs_only_itself(run_folder):
    tracker = Tracker(run_folder, "sleep", CONFIG)
    tracker.log_metrics(1, {"loss": 0.5})
    assert tracker.close(status=None) == 0
    with (run_folder / "mlflow_spool.jsonl").open("a") as spool:
        spool.write('{"type": "metrics", "step": 2, "val')
    tracker = Tracker(run_folder, "sleep", CONFIG, resume_step=1)
    tracker.log_metrics(2, {"loss": 0.25})
    assert tracker.close() == 0
    client = open_client(run_folder)
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 0.5), (2, 0.25)]


def test_a_full_disk_is_one_warning(run_folder, monkeypatch, caplog):
    tracker = Tracker(run_folder, "sleep", CONFIG)
    real, room = os.write, [True, False, False, True]

    def write(file, line):
        if b'"metrics"' not in line or room.pop(0):
            return real(file, line)
        if len(room) == 2:  # a part of the line still fits
            return real(file, line[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("powernap.train.tracking.spool.os.write", write)
    for step in (1, 2, 3, 4):
        tracker.log_metrics(step, {"loss": 0.5})
    assert tracker.close() == 0
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    assert [m.step for m in open_client(run_folder).get_metric_history(run_id, "loss")] == [1, 4]
    assert caplog.text.count("No space left on device") == 1


def test_a_server_that_has_lost_the_run_gets_all_of_it_again(run_folder, caplog):
    tracker = Tracker(run_folder, "sleep", CONFIG)
    tracker.log_metrics(1, {"loss": 0.5})
    assert tracker.close("KILLED") == 0
    first = (run_folder / "mlflow_run_id").read_text().strip()
    open_client(run_folder).delete_run(first)
    tracker = Tracker(run_folder, "sleep", CONFIG, resume_step=1)
    tracker.log_metrics(2, {"loss": 0.25})
    assert tracker.close() == 0
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    assert run_id != first
    assert [m.step for m in open_client(run_folder).get_metric_history(run_id, "loss")] == [1, 2]


def test_an_evaluation_beside_the_trainer_leaves_delivery_and_status_to_it(run_folder, capfd):
    trainer = Tracker(run_folder, "sleep", CONFIG)
    wait_for(lambda: (run_folder / "mlflow_run_id").exists())
    evaluation = Tracker(run_folder, "sleep", CONFIG, running=False)
    evaluation.log_metrics(7, {"accuracy": 0.75})
    evaluation.close(status=None)
    assert cli.main(["sync", str(run_folder)]) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("powernap: error: ") and "still training" in error
    run_id = (run_folder / "mlflow_run_id").read_text().strip()
    assert open_client(run_folder).get_run(run_id).info.status == "RUNNING"
    assert trainer.close("KILLED") == 0
    run = open_client(run_folder).get_run(run_id)
    assert run.info.status == "KILLED" and run.data.metrics["accuracy"] == 0.75
    evaluation = Tracker(run_folder, "sleep", CONFIG, running=False)
    evaluation.log_metrics(7, {"accuracy": 0.5})
    assert evaluation.close(status=None) == 0
    run = open_client(run_folder).get_run(run_id)
    assert run.info.status == "KILLED" and run.data.metrics["accuracy"] == 0.5


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_other_ranks_track_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = threading.active_count()
    tracker = Trackers()
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.close("FAILED")
    assert not list(tmp_path.iterdir()) and not threading.active_count() > before


def test_flatten_gives_dotted_keys():
    flat = flatten(CONFIG | {"empty": {}})
    assert flat == {
        "run.name": "demo", "sleep.passes": [1, 4], "sleep.loop_range": None, "train.steps": 100, "empty": {},
    }  # fmt: skip


def test_parts_of_a_sweep_that_start_at_once_have_one_run_above_them(run_folder, monkeypatch):
    """The second creates its own before it sees the first's: as two nodes do."""
    calls, find = [], Delivery._runs_with_key

    def late(delivery, experiment, key):
        """Of its calls for b the first is for b's own run, the second for that of the sweep."""
        calls.append(key)
        return [] if len(calls) == 2 else find(delivery, experiment, key)

    for name in ("a", "b"):
        folder = run_folder.parent / name
        folder.mkdir()
        assert Tracker(folder, "sleep", CONFIG, about=About({"sweep": "it's all"}, [])).close() == 0
        monkeypatch.setattr(Delivery, "_runs_with_key", late)
    client = open_client(run_folder)
    tracked = client.search_runs([client.get_experiment_by_name("sleep").experiment_id])
    by_name = {run.info.run_name: run for run in tracked}
    assert sorted(run.info.run_name for run in tracked) == ["a", "b", "it's all"] and calls[1] == calls[2]
    parents = {by_name[name].data.tags["mlflow.parentRunId"] for name in ("a", "b")}
    assert parents == {by_name["it's all"].info.run_id}
