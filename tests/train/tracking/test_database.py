"""MLflow's database beside the runs: made once by many processes, and what becomes of one that is broken."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from powernap.launch import cli
from powernap.train.tracking.delivery import store_uri, sync_run
from powernap.train.tracking.tracker import Tracker

# What some forked processes of one that has imported MLflow do in new folders; prints what became of them.
PROCESSES = """
import contextlib, json, os, signal, sqlite3, sys, time
from pathlib import Path

from powernap.train.tracking.delivery import prepare_mlflow, sync_run
from powernap.train.tracking.tracker import Tracker

prepare_mlflow()
import mlflow.store.tracking.sqlalchemy_store


def start(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    child = os.fork()
    if not child:
        tracker = Tracker(folder, "sleep", {"a": 1})
        tracker.log_metrics(1, {"loss": 0.5})
        os._exit(min(tracker.close(timeout=200), 99))
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tables(root):
    most = 0
    for path in root.glob("mlflow.db*"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as one:
            most = max(most, one.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0])
    return most


root = Path(sys.argv[1])
found = {"together": [end(child) for child in [start(root / "together" / name) for name in "abc"]]}
child = start(root / "killed" / "first")
while tables(root / "killed") < 15:
    time.sleep(0.002)
os.kill(child, signal.SIGKILL)
found["first"] = end(child)
found["left"] = (root / "killed" / "mlflow.db").exists()
found["second"] = end(start(root / "killed" / "second"))
sync_run(root / "killed" / "first")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(root)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.faults
def test_runs_that_start_at_once_share_one_new_database(processes):
    root, found = processes
    assert found["together"] == [0, 0, 0]  # records that wait
    assert losses(root / "together") == {"a": [(1, 0.5)], "b": [(1, 0.5)], "c": [(1, 0.5)]}


@pytest.mark.faults
def test_a_process_killed_while_it_makes_the_database_leaves_nothing_half_made(processes):
    root, found = processes
    assert found["first"] == -9 and not found["left"]
    assert found["second"] == 0
    assert losses(root / "killed") == {"first": [(1, 0.5)], "second": [(1, 0.5)]}
    assert not list((root / "killed").glob("mlflow.db.new*")) and not list((root / "killed").glob("*.broken*"))


def losses(root, experiment="sleep"):
    """The run's names with (step, loss) in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(store_uri(root))
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {
        run.info.run_name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
        for run in runs
    }


@pytest.fixture
def root(tmp_path, monkeypatch, whole_database):
    """A folder of runs. A database that is made there is a copy, which is faster."""
    from powernap.train.tracking import database

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(database, "_create", lambda path: shutil.copyfile(whole_database, path))
    monkeypatch.setattr(database, "STILL_SECONDS", 0.2)
    return tmp_path


def begin(root, name="one", experiment="sleep"):
    (root / name).mkdir(exist_ok=True)
    (root / name / "config.yaml").write_text("")
    return Tracker(root / name, experiment, {"a": 1})


def run(root, name="one", losses=(0.5,)):
    """A whole run; returns how many records wait."""
    tracker = begin(root, name)
    for step, loss in enumerate(losses, 1):
        tracker.log_metrics(step, {"loss": loss})
    return tracker.close()


def execute(path, *statements):
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def half_made(path):
    execute(path, "create table experiments (experiment_id integer)", "create table runs (run_uuid text)")


def half_migrated(path):
    revision = "create table alembic_version (version_num text)", "insert into alembic_version values ('451aebb31d03')"
    execute(path, *revision, "create table metrics (key text)", "create table latest_metrics (key text)")


def without_a_table(path):
    execute(path, "drop table params")


def without_a_revision(path):
    execute(path, "delete from alembic_version")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("spoil", "copied", "reason"),
    [
        (Path.touch, False, "it is empty"),
        (lambda path: path.write_bytes(b"no database" * 99), False, "file is not a database"),
        (half_made, False, "2 tables, no schema revision"),
        (half_migrated, False, "its upgrade fails"),
        (without_a_table, True, "table params is missing"),
        (without_a_revision, True, "no schema revision"),
        (cut, True, "malformed"),
    ],
)
def test_a_broken_database_is_set_aside_and_reported(root, whole_database, caplog, spoil, copied, reason):
    path = root / "mlflow.db"
    if copied:
        shutil.copyfile(whole_database, path)
    spoil(path)
    (root / "mlflow.db-journal").write_bytes(b"what SQLite had begun to write" * copied)
    before = path.read_bytes()
    assert run(root) == 0
    assert losses(root) == {"one": [(1, 0.5)]}
    (aside,) = [one for one in root.glob("mlflow.db.broken-*") if not one.name.endswith("-journal")]
    assert aside.read_bytes() == before
    assert not (root / "mlflow.db-journal").exists()
    (line,) = [line for line in caplog.messages if "set aside" in line]
    assert reason in line and aside.name in line and "`powernap sync`" in line


@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_sync_delivers_every_run_again_after_its_database_was_lost(root, capfd, caplog, spoil):
    assert run(root, "one", [0.5, 0.25]) == 0
    assert run(root, "two", [0.75]) == 0
    spoil(root / "mlflow.db")
    assert cli.main(["sync", str(root / "one"), str(root / "two")]) == 0
    assert losses(root) == {"one": [(1, 0.5), (2, 0.25)], "two": [(1, 0.75)]}
    out = capfd.readouterr().out
    assert f"{root / 'one'}: 5 records delivered" in out and f"{root / 'two'}: 4 records delivered" in out
    # Once; and what somebody deletes in the page stays deleted.
    from mlflow import MlflowClient

    MlflowClient(store_uri(root)).delete_run((root / "two" / "mlflow_run_id").read_text().strip())
    assert cli.main(["sync", str(root)]) == 0
    assert capfd.readouterr().out.count("nothing waits") == 2
    assert set(losses(root)) == {"one"}


def test_damage_that_only_writing_meets_is_no_refusal(root):
    path = root / "mlflow.db"
    assert run(root, "one") == 0
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute("select rootpage from sqlite_master where name = 'metrics'").fetchone()
        (size,) = database.execute("pragma page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    run(root, "two", [0.25])
    assert cli.main(["sync", str(root)]) == 0
    assert losses(root) == {"one": [(1, 0.5)], "two": [(1, 0.25)]}
    assert len(list(root.glob("mlflow.db.broken-*"))) == 1
    assert '"refused": {}' in read(root / "two" / "mlflow_spool.position")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: execute(path, "drop table metrics")])
def test_a_database_lost_under_a_run_costs_nothing(root, monkeypatch, capfd, spoil):
    monkeypatch.setattr("powernap.train.tracking.tracker.FLUSH_SECONDS", 0.05)
    tracker = begin(root)
    tracker.log_metrics(1, {"loss": 0.5})
    wait_for_delivery(root / "one")
    spoil(root / "mlflow.db")
    tracker.log_metrics(2, {"loss": 0.25})
    wait_for_delivery(root / "one")
    assert tracker.close() == 0
    assert losses(root) == {"one": [(1, 0.5), (2, 0.25)]}
    assert "Traceback" not in capfd.readouterr().err


def wait_for_delivery(folder):
    deadline = time.monotonic() + 60
    size = (folder / "mlflow_spool.jsonl").stat().st_size
    while json.loads(read(folder / "mlflow_spool.position") or "{}").get("delivered", 0) < size:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read(path):
    return path.read_text() if path.exists() else ""


def test_an_older_mlflows_database_is_upgraded_and_a_newer_ones_is_left_alone(root, caplog):
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    path = root / "mlflow.db"
    assert run(root, "one") == 0
    command.downgrade(_get_alembic_config(store_uri(root)), "-2")
    (old,) = revision(path)
    with closing(sqlite3.connect(path)) as somebody:  # such as a server, which keeps the file open
        assert run(root, "two", [0.25]) == 0
        assert somebody.execute("select count(*) from runs").fetchone() == (2,)
    assert losses(root) == {"one": [(1, 0.5)], "two": [(1, 0.25)]}
    (kept,) = root.glob(f"mlflow.db.schema-{old}-*")
    assert revision(kept) == [old]
    assert kept.name in caplog.text

    execute(path, "update alembic_version set version_num = 'ffffffffffff'")
    before = path.read_bytes()
    assert run(root, "three") == 4
    assert f"{path} was written by a newer MLflow (schema ffffffffffff)" in caplog.messages[-1]
    assert path.read_bytes() == before and not list(root.glob("*.broken*"))


def revision(path):
    with closing(sqlite3.connect(path)) as database:
        return [name for (name,) in database.execute("select version_num from alembic_version")]


def test_a_database_that_the_user_names_is_not_renamed(root, monkeypatch, caplog):
    path = root / "mine.sqlite"
    path.write_bytes(b"no database" * 99)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    assert run(root) == 4
    assert f"{path} is no whole MLflow database (file is not a database): rename it" in caplog.messages[-1]
    path.unlink()
    assert sync_run(root / "one").delivered == 4
    assert sorted(one.name for one in root.iterdir() if one.is_file()) == ["mine.sqlite", "mine.sqlite.lock"]
    assert list((root / "mlartifacts").rglob("config.yaml"))  # beside it, from whatever folder this was called


def test_a_deleted_experiment_is_named_with_its_cure_and_delivered_to_after_it(root, caplog, capfd):
    from mlflow import MlflowClient

    tracker = begin(root)
    deadline = time.monotonic() + 60
    while not (root / "one" / "mlflow_run_id").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run_id = (root / "one" / "mlflow_run_id").read_text()
    client = MlflowClient(store_uri(root))
    experiment = client.get_experiment_by_name("sleep").experiment_id
    client.delete_experiment(experiment)
    tracker.log_metrics(1, {"loss": 0.5})
    assert tracker.close() > 0
    assert cli.main(["sync", str(root / "one")]) == 1
    for text in (caplog.messages[-1], capfd.readouterr().err):
        assert "the experiment 'sleep' was deleted in MLflow" in text and "another run.experiment" in text
        assert f"MLFLOW_TRACKING_URI='{store_uri(root)}' mlflow experiments restore -x {experiment}" in text
    assert "goes on in a new one" not in caplog.text
    # Either cure. First another experiment, as a resumed run would choose it.
    assert begin(root, "two", "sleep").close() > 0
    assert begin(root, "two", "other").close() == 0
    assert set(losses(root, "other")) == {"two"}
    client.restore_experiment(experiment)
    assert cli.main(["sync", str(root)]) == 0
    assert (root / "one" / "mlflow_run_id").read_text() == run_id
    assert losses(root) == {"one": [(1, 0.5)]}


def test_sync_gets_through_to_a_slow_server(root, monkeypatch, capsys):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    real, takes = MlflowClient.log_batch, [70]

    def slow(self, *arguments, **options):
        if takes[0] > float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]):
            raise MlflowException("API request failed with timeout exception: Read timed out.")
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    steps = [1 / step for step in range(1, 301)]
    assert run(root, "one", steps) > 300
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")  # what training had set: sync is another process
    takes[0] = 200
    assert cli.main(["sync", str(root / "one")]) == 1  # slower than it waits: nothing is lost
    assert "still wait for MLflow: MlflowException: API request failed with timeout" in capsys.readouterr().err
    takes[0] = 70
    assert cli.main(["sync", str(root / "one")]) == 0
    assert losses(root)["one"] == list(enumerate(steps, 1))
