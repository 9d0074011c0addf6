"""Deliver a run's spool to MLflow: every record, in order, once the server answers; always into the same MLflow run."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from powernap.model.errors import PowernapError
from powernap.train.run.folder import RUN_ID_FILE
from powernap.train.run.secrets import mask_secrets
from powernap.train.tracking.about import EXPERIMENT_KIND, NOTE
from powernap.train.tracking.database import identity, prepare_database, sqlite_file
from powernap.train.tracking.spool import SPOOL, Line, Position, Spool, delivery_lock

logger = logging.getLogger(__name__)

# Tag of the MLflow run: our own id for it, known before the server assigns one. MLflow's pages hide tags of this prefix.
KEY_TAG = "mlflow.powernap_key"
OLD_KEY_TAG = "powernap_key"  # of runs that an older version began
# What the run that stands for a sweep has of its parts.
SHARED_IN_SWEEP = {
    *("mlflow.user", "mlflow.source.type", "mlflow.source.name", "mlflow.source.git.commit"),
    *("command", "host", "uncommitted_changes"),
}
SWEEP_METRICS = ("accuracy", "held_out_loss", "loss")
SWEEP_TABLE = f"| run | status | {' | '.join(SWEEP_METRICS)} |"
THREAD_NAME = "mlflow-tracking"
VALUES_PER_REQUEST = 1000  # MLflow's limit
SYNC_ATTEMPTS = 2  # without a record delivered, each with the long timeout

# Error codes for a record that can never be stored. All others may be temporary.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}
# Error codes of MLflow's client for a server that is down, slow or in trouble.
TROUBLE = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "ABORTED"}
# SQLite's messages for a damaged database, which MLflow reports as a bad request.
DAMAGE = "database disk image is malformed", "file is not a database"

# Defaults that the user can override. MLflow's own 7 retries x 120 s would hold up the end of a run for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we retry from the spool
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no INFO line for every database migration
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training job should call nobody but its tracking server
    "GIT_PYTHON_REFRESH": "quiet",  # GitPython warns if git is missing, as in a container
}
SYNC_TIMEOUT = 120  # seconds: `powernap sync` can afford to wait for a slow server


class DeliveryError(PowernapError):
    """Why records still wait, in one line."""


class Synced(NamedTuple):
    """The result of `sync_run`.

    Attributes:
        delivered: how many records.
        refused: why MLflow will never accept some others, a reason each.
        unknown: if nothing waits, why we do not know whether MLflow has this run; None: it has it.
    """

    delivered: int
    refused: list[str]
    unknown: str | None


class Delivery:
    """Delivers the spool of the run in `folder` to MLFLOW_TRACKING_URI, or to the database beside the run.

    Only the holder of the run's delivery lock may call `deliver`. A request whose answer was lost is sent again. This
    is idempotent: MLflow keeps one of several equal metrics (same name, step, timestamp and value), and before a run is
    created, one with this run's key is looked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._spool = Spool(self._folder)
        self._position = Position(self._folder)
        self._client: Any = None
        self._run_id: str | None = None  # checked since the last failure
        self._database: tuple[Path, tuple[int, int] | None] | None = None  # without a server: its file and identity
        self._damaged = False  # whether the database may be
        self._reported_refusal = False

    def waiting(self) -> int:
        """How many records MLflow does not have yet and may still accept; any process or thread may call this."""
        position = Position(self._folder)
        return sum(1 for _ in self._spool.read(position.delivered)) + len(position.aside)

    def aside(self) -> list[str]:
        """Why records that failed before still wait, a reason each."""
        return list(Position(self._folder).aside.values())

    def refused(self) -> list[str]:
        """Why MLflow will never accept some records, a reason each."""
        return list(Position(self._folder).refused.values())

    def deliver(self, again: bool = False, progress: Callable[[int], None] = lambda records: None) -> None:
        """Deliver all records that wait; those that were set aside only with `again`.

        progress: called with the number of records of each request.

        Raises:
            DeliveryError, DatabaseError: if the user has to act first.
            Exception: MLflow's and its libraries', if the server is down. Records delivered before stay delivered.
        """
        if self._database and identity(self._database[0]) != self._database[1]:
            self._run_id = None  # the file was set aside or removed: nobody would see what is written to it now
        try:
            if self._run_id is None:
                self._position = Position(self._folder)  # another process may have delivered meanwhile
                self._run_id = self._open_run()
            self._deliver_all(again, progress)
        except Exception as error:
            lost = self._run_id is not None and self._is_lost(error)
            self._run_id = None
            self._damaged = any(word in str(error) for word in DAMAGE)
            if not lost:
                raise
        else:
            return
        self.deliver(again, progress)

    def reset_if_lost(self) -> None:
        """Have all records wait again if MLflow does not know this run, such as after its database was set aside.

        A run that was deleted in MLflow is left alone.
        """
        self._connect()
        if not self._id_file.exists() or self._known_run(self._id_file.read_text().strip()) is None:
            self._position.reset()

    def _deliver_all(self, again: bool, progress: Callable[[int], None]) -> None:
        position = self._position
        for lines in _batches(self._spool.read(position.delivered)):
            self._deliver(lines)
            position.delivered = lines[-1].end
            position.save()
            progress(sum(line.start not in position.aside | position.refused for line in lines))
        for start, reason in list(position.aside.items()) if again else []:
            if line := next(self._spool.read(start), None):
                line.record["running"] = False  # an old record must not change the run's status
                del position.aside[start]
                try:
                    self._deliver([line])
                except Exception:
                    position.aside[start] = reason
                    raise
                position.save()
                progress(start not in position.aside | position.refused)

    def _deliver(self, lines: list[Line]) -> None:
        """Deliver the lines of one request; records that MLflow does not accept are noted in the position."""
        start, _, record = lines[0]
        match record["type"]:
            case "metrics":
                self._log("metrics", [(line.start, metric) for line in lines for metric in _metrics(line.record)])
            case "start":
                self._log_start(start, record)
            case "artifact":
                self._log_artifact(start, record)
            case "description":
                if self._client.get_run(self._run_id).data.tags.get(NOTE) == record["before"]:
                    self._client.set_tag(self._run_id, NOTE, shorten(record["text"]))
            case "status":
                self._remove_doubles()
                self._client.set_terminated(self._run_id, record["status"], record["time"])
                self._update_sweep(record["time"])
            case other:
                self._set_aside(start, f"its type, {other}, is a newer Powernap's")

    def _log(self, kind: str, entries: list[tuple[int, Any]]) -> None:
        """Log metrics, params or tags, each with the start of its line. If one of them is refused, the others are kept."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, **{kind: [entry for _, entry in entries]})
        except MlflowException as error:
            if error.error_code not in REFUSALS or any(word in str(error) for word in DAMAGE) or not self._is_active():
                raise
            if len(entries) == 1:
                self._position.refused[entries[0][0]] = one_line(error)
                self._report_refusal(f"MLflow refuses a record: {one_line(error)}")
                return
            half = len(entries) // 2
            self._log(kind, entries[:half])
            self._log(kind, entries[half:])

    def _log_start(self, start: int, record: dict[str, Any]) -> None:
        """A process starts tracking: log its parameters. MLflow's are immutable, so changes become a tag."""
        from mlflow.entities import Param, RunTag

        if record["running"]:
            self._client.update_run(self._run_id, status="RUNNING")
        run = self._client.get_run(self._run_id)
        known, parameters = run.data.params, record["parameters"]
        new = [(start, Param(key, value)) for key, value in parameters.items() if key not in known]
        changes = [
            f"{key}: {known[key]} -> {value}"
            for key, value in parameters.items()
            if key in known and known[key] != value
        ]
        tags = []
        if record["resume_step"] is not None:
            steps = [step for step in run.data.tags.get("resumed_at_steps", "").split(", ") if step]
            once = dict.fromkeys([*steps, str(record["resume_step"])])  # this record may be delivered twice
            tags.append((start, RunTag("resumed_at_steps", ", ".join(once))))
        if changes:
            tags.append((start, RunTag("parameters_changed", shorten("; ".join(changes)))))
        about = dict(record.get("tags", {}))
        if sweep := about.get("sweep"):
            about["mlflow.parentRunId"] = self._sweep_run(run.info.experiment_id, sweep, about)
            self._log_datasets(about["mlflow.parentRunId"], record)
        tags += [(start, RunTag(name, shorten(value))) for name, value in about.items()]
        self._log("params", new)
        self._log("tags", tags)
        self._log_datasets(self._run_id, record)

    def _log_datasets(self, run_id: str | None, record: dict[str, Any]) -> None:
        if datasets := record.get("datasets"):
            self._client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])

    def _log_artifact(self, start: int, record: dict[str, Any]) -> None:
        """Log an artifact; set it aside on any failure but the server's: the store may be on another machine."""
        from mlflow.exceptions import MlflowException

        path = os.path.normpath(self._folder / record["path"])
        try:
            self._client.log_artifact(self._run_id, path, record["folder"])
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code in TROUBLE or not self._is_active():
                raise
            self._set_aside(start, f"{record['path']}: {one_line(error)}")

    def _set_aside(self, start: int, reason: str) -> None:
        self._position.aside[start] = reason
        self._report_refusal(f"MLflow does not take a record, which is set aside: {reason}")

    def _connect(self) -> None:
        """Create a client; first create or repair the database beside the run."""
        from mlflow import MlflowClient

        named = os.environ.get("MLFLOW_TRACKING_URI")
        uri = tracking_uri(self._folder)
        self._database = None
        if path := sqlite_file(uri):
            prepare_database(path, ours=not named, thorough=self._damaged)
            self._damaged = False
            self._database = path, identity(path)
        self._client = MlflowClient(uri)

    def _open_run(self) -> str:
        """Find this run's MLflow run or create it; returns its id."""
        begin = self._spool.begin()
        if begin is None:
            raise DeliveryError(f"{self._spool.path} does not say which run it belongs to")
        self._connect()
        known = None
        if self._id_file.exists():
            known_id = self._id_file.read_text().strip()
            known = self._known_run(known_id)
            if known and known.info.lifecycle_stage == "active":
                return known_id
        experiment = self._experiment_id(self._spool.experiment())
        if self._id_file.exists():
            logger.warning(
                "MLflow %s the run in %s: tracking continues in a new one",
                "has deleted" if known else "does not know",
                self._id_file,
            )
        # The answer to an earlier attempt may have been lost.
        run_id = next(iter(self._runs_with_key(experiment, begin["key"])), None)
        if run_id is None:
            run = self._client.create_run(
                experiment, start_time=begin["time"], run_name=begin["name"], tags={KEY_TAG: begin["key"]}
            )
            run_id = run.info.run_id
        self._position.reset()  # even if another server, or one that has lost its runs, got these records
        new_file = self._id_file.with_name(self._id_file.name + ".tmp")
        with suppress(OSError):  # the run can be found again by its key
            new_file.write_text(run_id + "\n")
            os.replace(new_file, self._id_file)
        return run_id

    @property
    def _id_file(self) -> Path:
        return self._folder / RUN_ID_FILE

    def _known_run(self, run_id: str) -> Any:
        """MLflow's run, which may be deleted; None if the server knows no such run."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _is_active(self) -> bool:
        assert self._run_id is not None
        run = self._known_run(self._run_id)
        return run is not None and run.info.lifecycle_stage == "active"

    def _is_lost(self, error: Exception) -> bool:
        """Whether `error` came because the run was deleted meanwhile."""
        from mlflow.exceptions import MlflowException

        with suppress(Exception):  # unknown: the next attempt will show
            answered = isinstance(error, MlflowException) and error.error_code in {*REFUSALS, "RESOURCE_DOES_NOT_EXIST"}
            return answered and not self._is_active()
        return False

    def _runs_with_key(self, experiment: str, key: str) -> list[str]:
        """Ids of the MLflow runs with our key, the oldest first."""
        found = [
            run
            for tag in (KEY_TAG, OLD_KEY_TAG)
            for run in self._client.search_runs([experiment], f"tags.`{tag}` = '{key}'")
        ]
        return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

    def _remove_doubles(self) -> None:
        """Delete the empty runs that a frozen server created from requests that had timed out and were sent again."""
        run = self._client.get_run(self._run_id)
        if key := run.data.tags.get(KEY_TAG) or run.data.tags.get(OLD_KEY_TAG):
            for other in self._runs_with_key(run.info.experiment_id, key):
                if other != self._run_id and not self._client.get_run(other).data.metrics:
                    self._client.delete_run(other)

    def _sweep_run(self, experiment: str, name: str, about: dict[str, str]) -> str:
        """The run that stands for a sweep, under which MLflow's pages fold those of its parts. Any of them may create it.

        about: tags of the part, of which the sweep gets those that all parts share.
        """
        key = hashlib.sha256(os.fsencode(self._folder.parent / name)).hexdigest()
        if not self._runs_with_key(experiment, key):
            note = f"The sweep {name}: its runs are below this one, and compared by their check boxes and Compare."
            shared = {tag: shorten(value) for tag, value in about.items() if tag in SHARED_IN_SWEEP}
            created = self._client.create_run(experiment, run_name=name, tags={KEY_TAG: key, NOTE: note} | shared)
            self._client.set_terminated(created.info.run_id)
            if self._runs_with_key(experiment, key)[0] != created.info.run_id:  # another part was as quick
                self._client.delete_run(created.info.run_id)
        return self._runs_with_key(experiment, key)[0]

    def _update_sweep(self, time: int) -> None:
        """If this run, which has ended, is part of a sweep: its results are in the sweep's table, and the sweep ends with it."""
        run = self._client.get_run(self._run_id)
        parent = run.data.tags.get("mlflow.parentRunId")
        if "sweep" not in run.data.tags or not parent:
            return
        parts = self._client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
        sweep = self._known_run(parent)
        if sweep is None or sweep.info.lifecycle_stage != "active":  # deleted meanwhile
            return
        note = sweep.data.tags.get(NOTE, "")
        self._client.set_tag(
            parent, NOTE, shorten(f"{note.partition(SWEEP_TABLE)[0].rstrip()}\n\n{_sweep_table(parts)}")
        )
        self._client.set_terminated(parent, "FINISHED", time)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            uri = mask_secrets(self._client.tracking_uri)
            raise DeliveryError(
                f"the experiment '{name}' was deleted in MLflow: restore it (MLFLOW_TRACKING_URI='{uri}' "
                f"mlflow experiments restore -x {experiment.experiment_id}), or choose another run.experiment"
            )
        if experiment is not None:
            return experiment.experiment_id
        # A server knows where its artifacts go; without one MLflow would use the current folder.
        artifacts = (self._database[0].parent / "mlartifacts").as_uri() if self._database else None
        try:
            return self._client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_KIND)
        except MlflowException as error:  # another run created it first
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(name).experiment_id

    def _report_refusal(self, reason: str) -> None:
        if not self._reported_refusal:
            self._reported_refusal = True
            logger.warning("%s", reason)


def sync_run(folder: Path, progress: bool = False, ask: bool = True, attempts: int = SYNC_ATTEMPTS) -> Synced:
    """Deliver the waiting records of the run in `folder`, as long as the server accepts any.

    progress: show a bar. ask: if nothing waits, ask MLflow whether it knows the run; one that it does not know is
    delivered again. attempts: without any progress, before giving up.

    Raises:
        DeliveryError: if records are left, or another process delivers them.
    """
    lock = delivery_lock(folder)
    if not lock.acquire():
        raise DeliveryError(f"{folder}: in use, such as still training: the process that uses it delivers its records")
    try:
        delivery = Delivery(folder)
        unknown = None
        if ask and not delivery.waiting():
            try:
                delivery.reset_if_lost()
            except Exception as error:
                unknown = one_line(error)
        with tqdm(total=delivery.waiting(), unit="record", desc=folder.name, disable=not progress) as bar:
            delivered, reason = _deliver_with_patience(delivery, attempts, bar) if bar.total else (0, None)
        if waiting := delivery.waiting():
            reason = reason or next(iter(delivery.aside()), "they came meanwhile")
            raise DeliveryError(f"{folder}: {waiting} records still wait for MLflow: {reason}")
        return Synced(delivered, delivery.refused(), unknown)
    finally:
        lock.release()


def _deliver_with_patience(delivery: Delivery, attempts: int, bar: tqdm) -> tuple[int, str | None]:
    """Returns the number of records delivered, and why the last attempt failed, if it did."""
    delivered = fruitless = 0

    def count(records: int) -> None:
        nonlocal delivered
        delivered += records
        bar.update(records)

    while True:
        before = delivered
        try:
            delivery.deliver(again=True, progress=count)
            return delivered, None
        except PowernapError as error:  # a retry does not help
            return delivered, one_line(error)
        except Exception as error:
            reason = one_line(error)
            fruitless = 0 if delivered > before else fruitless + 1
            if fruitless >= attempts:
                return delivered, reason
        bar.write(f"trying again: {reason}", file=sys.stderr)
        time.sleep(min(fruitless, 5))


def spooled_runs(root: Path) -> list[Path]:
    """The folders of all runs below `root` that have a spool."""
    return sorted(path.parent for path in root.rglob(SPOOL))


def prepare_mlflow(timeout: int | None = None) -> None:
    """Import MLflow (1-3 s, once), quiet and with short timeouts. timeout: seconds per request; None: ENVIRONMENT's."""
    if timeout:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # urllib3 warns at every retry; the thread's failures get one warning.
    logging.getLogger("urllib3.connectionpool").addFilter(_not_from_the_thread)
    # MLflow logs SQLite's errors with a traceback, and raises them, too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with suppress(Exception):  # the delivery meets the same error and reports it
        import mlflow.tracking  # noqa: F401
    # DeepSpeed may have imported MLflow before the environment above was set.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def store_uri(root: Path) -> str:
    """The database beside the runs in `root`."""
    return f"sqlite:///{root / 'mlflow.db'}"


def tracking_uri(run_folder: Path) -> str:
    """Where a run is tracked: the server that the environment names, or the database beside the run."""
    return os.environ.get("MLFLOW_TRACKING_URI") or store_uri(Path(os.path.abspath(run_folder)).parent)


def shorten(text: str, limit: int = 6000) -> str:
    """Cut a text. `limit`: MLflow's for parameters, in characters (tags may have 8000)."""
    mark = " ... [cut]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def one_line(error: Exception) -> str:
    """An error in at most 300 characters, with secrets masked. One of ours is not cut, and needs no name."""
    if isinstance(error, PowernapError):
        return mask_secrets(str(error))
    text = mask_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 300 else text[:297] + "..."


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Batch adjacent metrics, up to VALUES_PER_REQUEST values; every other line is a batch of its own."""
    batch: list[Line] = []
    values = 0
    for line in lines:
        size = len(line.record["values"]) if line.record["type"] == "metrics" else VALUES_PER_REQUEST
        if batch and values + size > VALUES_PER_REQUEST:
            yield batch
            batch, values = [], 0
        batch.append(line)
        values += size
    if batch:
        yield batch


def _dataset_input(dataset: dict[str, str]) -> Any:
    """As MLflow's pages show one: by name, digest and what it is for."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": dataset["source"]})
    entity = Dataset(dataset["name"], dataset["digest"], "webdataset", source)
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset["context"])])


def _sweep_table(parts: list[Any]) -> str:
    """In Markdown, a row for each run of a sweep."""
    rows = []
    for run in sorted(parts, key=lambda run: run.info.run_name):
        values = [run.data.metrics.get(name) for name in SWEEP_METRICS]
        cells = [
            run.info.run_name,
            run.info.status.lower(),
            *("" if value is None else f"{value:.4g}" for value in values),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([SWEEP_TABLE, "|---" * (2 + len(SWEEP_METRICS)) + "|", *rows])


def _metrics(record: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), record["time"], record["step"]) for name, value in record["values"].items()]


def _not_from_the_thread(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD_NAME
