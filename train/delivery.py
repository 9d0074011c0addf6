"""From a run's spool to MLflow: every record, in order, once the server answers; into one MLflow run whatever happens."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from powernap.model.errors import PowernapError
from powernap.train.run_folder import RUN_ID_FILE
from powernap.train.secrets import mask_secrets
from powernap.train.spool import SPOOL, Line, Position, Spool, delivery_lock

logger = logging.getLogger(__name__)

KEY_TAG = "powernap_key"  # of the MLflow run: our own name for it, known before the server has given it an id
THREAD_NAME = "mlflow-tracking"
VALUES_PER_REQUEST = 1000  # MLflow's limit
SYNC_ATTEMPTS = 2

# What a server answers when a record can never be stored. Everything else may pass.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}
# What MLflow's client calls a server that is away, slow or in trouble.
TROUBLE = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "ABORTED"}

# Only where the user has not decided otherwise. MLflow's own 7 retries x 120 s would hold up the end of a run for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the spool is what is tried again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no INFO line for every database migration
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training job should call nobody but its tracking server
    "GIT_PYTHON_REFRESH": "quiet",  # GitPython warns where there is no git, as in a container
}


class DeliveryError(PowernapError):
    """Why records still wait, in one line."""


class Delivery:
    """Takes the spool of the run in `folder` to MLFLOW_TRACKING_URI, or to the database beside the run.

    Only the holder of the run's delivery lock may call `deliver`. A request whose answer was lost is sent again, which
    leaves no trace: MLflow keeps one of several equal metrics (same name, step, timestamp and value), and creating a run
    is preceded by looking for one with this run's key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._spool = Spool(self._folder)
        self._position = Position(self._folder)
        self._client: Any = None
        self._run_id: str | None = None  # checked since the last failure
        self._told_refusal = False

    def waiting(self) -> int:
        """How many records MLflow does not have yet; any process and thread may ask."""
        position = Position(self._folder)
        return sum(1 for _ in self._spool.read(position.delivered)) + len(position.aside)

    def deliver(self, again: bool = False, progress: Callable[[int], None] = lambda records: None) -> None:
        """Deliver all records that wait; those that were set aside only with `again`.

        progress: called with the number of records of each request.

        Raises:
            Exception: MLflow's and its libraries', when the server is away. Records delivered before stay delivered.
        """
        try:
            if self._run_id is None:
                self._position = Position(self._folder)  # another process may have delivered meanwhile
                self._run_id = self._open_run()
            for lines in _batches(self._spool.read(self._position.delivered)):
                refused = self._deliver(lines)
                self._position.set(lines[-1].end, sorted({*self._position.aside, *refused}))
                progress(len(lines) - len(refused))
            for start in self._position.aside if again else []:
                line = next(self._spool.read(start))
                line.record["running"] = False  # long ago
                if not self._deliver([line]):
                    self._position.set(self._position.delivered, [at for at in self._position.aside if at != start])
                    progress(1)
        except Exception:
            self._run_id = None
            raise

    def _deliver(self, lines: list[Line]) -> set[int]:
        """One request's worth; returns the starts of the lines that MLflow refuses."""
        start, _, record = lines[0]
        match record["type"]:
            case "metrics":
                return self._log(
                    "metrics", [(line.start, metric) for line in lines for metric in _metrics(line.record)]
                )
            case "start":
                return self._log_start(start, record)
            case "artifact":
                return self._log_artifact(start, record)
            case "status":
                self._remove_doubles()
                self._client.set_terminated(self._run_id, record["status"], record["time"])
                return set()
        self._tell_refusal(f"a record of the unknown type {record['type']}")
        return {start}

    def _log(self, kind: str, entries: list[tuple[int, Any]]) -> set[int]:
        """Log metrics, params or tags, each with the start of its line. If one of them is refused, the others are kept."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, **{kind: [entry for _, entry in entries]})
        except MlflowException as error:
            if error.error_code not in REFUSALS or not self._is_active():
                raise
            if len(entries) == 1:
                self._tell_refusal(one_line(error))
                return {entries[0][0]}
            half = len(entries) // 2
            return self._log(kind, entries[:half]) | self._log(kind, entries[half:])
        return set()

    def _log_start(self, start: int, record: dict[str, Any]) -> set[int]:
        """A process begins to track: its parameters. MLflow's never change: what differs becomes a tag."""
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
            steps = dict.fromkeys([*steps, str(record["resume_step"])])  # once, if this record comes twice
            tags.append((start, RunTag("resumed_at_steps", ", ".join(steps))))
        if changes:
            tags.append((start, RunTag("parameters_changed", shorten("; ".join(changes)))))
        return self._log("params", new) | self._log("tags", tags)

    def _log_artifact(self, start: int, record: dict[str, Any]) -> set[int]:
        """Set aside for any reason but a server that is away: the store of artifacts may be another machine's."""
        from mlflow.exceptions import MlflowException

        path = os.path.normpath(self._folder / record["path"])
        try:
            self._client.log_artifact(self._run_id, path, record["folder"])
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code in TROUBLE or not self._is_active():
                raise
            self._tell_refusal(f"{record['path']}: {one_line(error)}")
            return {start}
        return set()

    def _open_run(self) -> str:
        """Find this run's MLflow run or create it; returns its id."""
        from mlflow import MlflowClient

        begin = self._spool.begin()
        if begin is None:
            raise DeliveryError(f"{self._spool.path} does not say which run it belongs to")
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store_uri(self._folder.parent))
        id_file = self._folder / RUN_ID_FILE
        run_id = self._known_run(id_file.read_text().strip()) if id_file.exists() else None
        if run_id:
            return run_id
        if id_file.exists():
            logger.warning("MLflow does not know the run in %s: tracking goes on in a new one", id_file)
        experiment = self._experiment_id(begin["experiment"])
        # The answer to an earlier attempt may have been lost.
        run_id = next(iter(self._runs_with_key(experiment, begin["key"])), None)
        if run_id is None:
            run = self._client.create_run(
                experiment, start_time=begin["time"], run_name=begin["name"], tags={KEY_TAG: begin["key"]}
            )
            run_id = run.info.run_id
        self._position.set(0, [])  # whatever another server, or one that has lost its runs, was given
        new_file = id_file.with_name(id_file.name + ".tmp")
        with suppress(OSError):  # it is found again by its key
            new_file.write_text(run_id + "\n")
            os.replace(new_file, id_file)
        return run_id

    def _known_run(self, run_id: str) -> str | None:
        """`run_id`, or None if the server knows no such run or has deleted it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id if run.info.lifecycle_stage == "active" else None

    def _is_active(self) -> bool:
        return self._known_run(self._run_id) is not None

    def _runs_with_key(self, experiment: str, key: str) -> list[str]:
        """Ids of this run's MLflow runs, the same one always first."""
        return sorted(run.info.run_id for run in self._client.search_runs([experiment], f"tags.{KEY_TAG} = '{key}'"))

    def _remove_doubles(self) -> None:
        """Delete runs that a frozen server made of requests which had been given up and sent again: they are empty."""
        run = self._client.get_run(self._run_id)
        if key := run.data.tags.get(KEY_TAG):
            for other in self._runs_with_key(run.info.experiment_id, key):
                if other != self._run_id and not self._client.get_run(other).data.metrics:
                    self._client.delete_run(other)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        # A server knows by itself where its artifacts go.
        ours = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = (self._folder.parent / "mlartifacts").as_uri() if ours else None
        try:
            return self._client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:  # another run was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(name).experiment_id

    def _tell_refusal(self, reason: str) -> None:
        if not self._told_refusal:
            self._told_refusal = True
            logger.warning("MLflow does not take a record, which is set aside: %s", reason)


def sync_run(folder: Path, progress: bool = False) -> int:
    """Deliver what waits in the run's `folder`; returns how many records were delivered. progress: show a bar.

    Raises:
        DeliveryError: if records are left, or another process delivers them.
    """
    lock = delivery_lock(folder)
    if not lock.acquire():
        raise DeliveryError(f"{folder}: in use, such as still training: the process that uses it delivers its records")
    try:
        delivery = Delivery(folder)
        before = delivery.waiting()
        reason = "it does not take them"
        with tqdm(total=before, unit="record", desc=folder.name, disable=not progress) as bar:
            for attempt in range(SYNC_ATTEMPTS if before else 0):
                time.sleep(attempt)  # seconds
                try:
                    delivery.deliver(again=True, progress=bar.update)
                    break
                except Exception as error:
                    reason = one_line(error)
        if left := delivery.waiting():
            raise DeliveryError(f"{folder}: {left} records still wait for MLflow: {reason}")
        return before
    finally:
        lock.release()


def spooled_runs(root: Path) -> list[Path]:
    """The folders of all runs below `root` that have a spool."""
    return sorted(path.parent for path in root.rglob(SPOOL))


def prepare_mlflow() -> None:
    """Import MLflow (1-3 s, once), quiet and impatient."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # urllib3 warns at every retry; the thread's failures get one warning.
    logging.getLogger("urllib3.connectionpool").addFilter(_not_from_the_thread)
    with suppress(Exception):  # delivering meets the same error and reports it
        import mlflow.tracking  # noqa: F401
    # DeepSpeed may have imported MLflow before the environment above was set.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def store_uri(root: Path) -> str:
    """The database beside the runs in `root`."""
    return f"sqlite:///{root / 'mlflow.db'}"


def shorten(text: str, limit: int = 6000) -> str:
    """`limit`: MLflow's for parameters, in characters (tags may have 8000)."""
    mark = " ... [cut]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def one_line(error: Exception) -> str:
    """An error in at most 300 characters; its URL may hold a password."""
    text = mask_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    return text if len(text) <= 300 else text[:297] + "..."


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Metrics that follow each other together, as many as one request may hold; everything else alone."""
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


def _metrics(record: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, float(value), record["time"], record["step"]) for name, value in record["values"].items()]


def _not_from_the_thread(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD_NAME
