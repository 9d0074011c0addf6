"""MLflow: runs to browse and compare in a web page. A convenience: the record of a run is its metrics.jsonl.

Without MLFLOW_TRACKING_URI, MLflow keeps its data beside the runs: `mlflow.db` (SQLite) and `mlartifacts/` in the folder
that holds the run folders. `ui_command` shows them.
"""

import contextlib
import json
import logging
import numbers
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from powernap.train.run_folder import flatten

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"  # in the run folder: a resumed run goes on in the same MLflow run
QUEUE_SIZE = 10_000  # records that wait for MLflow; further ones are dropped (and counted)
FLUSH_SECONDS = 2.0  # between deliveries, so that MLflow's work stays a small share of the process
RETRY_SECONDS = 30.0  # between attempts to reach a server that did not answer
THREAD_NAME = "mlflow-tracking"

# Only where the user has not decided otherwise. MLflow's own 7 retries x 120 s would hold up the end of a run for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # no INFO line for every database migration
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training job should call nobody but its tracking server
    "GIT_PYTHON_REFRESH": "quiet",  # GitPython warns where there is no git, as in a container
}


class _Metrics(NamedTuple):
    step: int
    timestamp: int  # milliseconds since 1970
    values: dict[str, float]


class _Artifact(NamedTuple):
    path: Path
    folder: str | None


class NullTracker:
    """A Tracker that tracks nothing, for all ranks but 0."""

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def close(self, status: Status = "FINISHED", timeout: float = 30.0) -> int:
        return 0


class Tracker(NullTracker):
    """One run's line to MLflow. Rank 0 only.

    run_folder: `runs/NAME`; NAME becomes the run's name, and its config.yaml an artifact. experiment: MLflow's name for a
    group of runs. config: the resolved recipe, tracked as parameters with dotted keys. resume_step: the step a resumed
    run goes on from.

    No method raises, and none waits for MLflow except `close`: a daemon thread does the work, every error there becomes
    one warning for the whole run. Records wait in a bounded queue until MLflow can be reached for the first time; a record
    that fails later is dropped. A resumed run goes on in its MLflow run, where steps that are done again appear twice:
    MLflow cannot delete metrics.
    """

    def __init__(
        self, run_folder: Path, experiment: str, config: Mapping[str, Any], resume_step: int | None = None
    ) -> None:
        self._run_folder = Path(os.path.abspath(run_folder))  # MLflow must find artifacts from any working folder
        self._experiment = experiment
        self._parameters = {key: _as_text(value) for key, value in flatten(config).items()}
        self._resume_step = resume_step
        self._start = _milliseconds()

        self._queue: queue.Queue[_Metrics | _Artifact] = queue.Queue(QUEUE_SIZE)
        self._given = 2  # records: the run's parameters and its final status; every call below adds one
        self._delivered = 0  # counted by the thread only
        self._status: Status | None = None
        self._closing = threading.Event()
        self._warned = False
        self.log_artifact(self._run_folder / "config.yaml")

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # urllib3 warns at every retry; this thread's failures get one warning, below.
        logging.getLogger("urllib3.connectionpool").addFilter(_not_from_this_thread)
        # Imported here (1-3 s, once) and not in the thread: data workers forked in the middle of an import can deadlock.
        with contextlib.suppress(Exception):  # the thread meets the same error and reports it
            import mlflow.tracking  # noqa: F401
        # DeepSpeed may have imported MLflow before the environment above was set.
        logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Track the numbers among `metrics`, such as a record of metrics.jsonl, at `step`."""
        values = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and name != "step"
        }
        self._put(_Metrics(step, _milliseconds(), values))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Track a file, in `folder` among the run's artifacts. It must stay in place until the run is closed."""
        self._put(_Artifact(Path(os.path.abspath(path)), folder))

    def close(self, status: Status = "FINISHED", timeout: float = 30.0) -> int:
        """Deliver what is left, waiting at most `timeout` seconds; returns how many records MLflow did not get."""
        if self._status is None:
            self._status = status
            self._closing.set()
        self._thread.join(timeout)
        missing = self._given - self._delivered
        if missing:
            logger.warning(
                "MLflow did not get %d of %d records of this run; metrics.jsonl has every step", missing, self._given
            )
        return missing

    def _put(self, record: _Metrics | _Artifact) -> None:
        self._given += 1
        with contextlib.suppress(queue.Full):  # never delivered, and so reported by close()
            self._queue.put_nowait(record)

    # Everything below runs in the thread.

    def _work(self) -> None:
        run_id = None
        while True:
            closing = self._closing.is_set()  # read first: what was queued before close() is still delivered
            if run_id is None:
                run_id = self._attempt(self._open_run)
                if run_id is not None:
                    self._attempt(self._log_parameters, run_id, records=1)
            if run_id is not None:
                self._deliver_queued(run_id)
            if closing:
                break
            self._closing.wait(RETRY_SECONDS if run_id is None else FLUSH_SECONDS)
        if run_id is not None:
            self._attempt(self._client.set_terminated, run_id, self._status, records=1)

    def _deliver_queued(self, run_id: str) -> None:
        records = []
        with contextlib.suppress(queue.Empty):
            while True:
                records.append(self._queue.get_nowait())
        metrics = [record for record in records if isinstance(record, _Metrics)]
        if metrics:
            self._attempt(self._log_metrics, run_id, metrics, records=len(metrics))
        for record in records:
            if isinstance(record, _Artifact):
                self._attempt(self._client.log_artifact, run_id, str(record.path), record.folder, records=1)

    def _attempt(self, call: Any, *arguments: Any, records: int = 0) -> Any:
        """Returns what `call` returns, or None if it failed: the one place where tracking fails."""
        try:
            result = call(*arguments)
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("tracking to MLflow failed, training goes on: %s", _one_line(error))
            return None
        self._delivered += records
        return result

    def _open_run(self) -> str:
        """Find this run's MLflow run or create it; returns its id."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        uri = os.environ.get("MLFLOW_TRACKING_URI") or _store_uri(self._run_folder.parent)
        self._client = MlflowClient(uri)
        id_file = self._run_folder / RUN_ID_FILE
        run = None
        if id_file.exists():
            try:
                run = self._client.get_run(id_file.read_text().strip())
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            if run is None or run.info.lifecycle_stage == "deleted":
                logger.warning("MLflow does not know the run in %s: tracking goes on in a new one", id_file)
                run = None
        if run is None:
            name = self._run_folder.name
            run = self._client.create_run(self._experiment_id(), start_time=self._start, run_name=name)
            new_file = id_file.with_name(id_file.name + ".tmp")
            new_file.write_text(run.info.run_id + "\n")
            os.replace(new_file, id_file)
        self._client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return experiment.experiment_id
        # A server knows by itself where its artifacts go.
        ours = not os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = (self._run_folder.parent / "mlartifacts").as_uri() if ours else None
        try:
            return self._client.create_experiment(self._experiment, artifact_location=artifacts)
        except MlflowException as error:  # another run was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._client.get_experiment_by_name(self._experiment).experiment_id

    def _log_parameters(self, run_id: str) -> None:
        """Log the parameters that MLflow does not have yet; it raises if one changes, so a change becomes a tag."""
        from mlflow.entities import Param, RunTag

        run = self._client.get_run(run_id)
        known = run.data.params
        new = [Param(key, value) for key, value in self._parameters.items() if key not in known]
        changes = [
            f"{key}: {known[key]} -> {value}"
            for key, value in self._parameters.items()
            if key in known and known[key] != value
        ]
        tags = []
        if self._resume_step is not None:
            steps = [*filter(None, [run.data.tags.get("resumed_at_steps")]), str(self._resume_step)]
            tags.append(RunTag("resumed_at_steps", ", ".join(steps)))
        if changes:
            tags.append(RunTag("parameters_changed", _shorten("; ".join(changes))))
        self._client.log_batch(run_id, params=new, tags=tags)

    def _log_metrics(self, run_id: str, records: list[_Metrics]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(  # which splits what is too long for one request
            run_id,
            [
                Metric(name, value, record.timestamp, record.step)
                for record in records
                for name, value in record.values.items()
            ],
        )


def ui_command(root: Path, port: int = 5000) -> list[str]:
    """The command that serves the MLflow data in `root` (the folder of all runs) on http://127.0.0.1:PORT."""
    root = Path(os.path.abspath(root))
    return [
        # MLflow would also start a runner of background jobs (six processes), which trained models have no use for.
        *("env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"),
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", _store_uri(root)),
        *("--artifacts-destination", (root / "mlartifacts").as_uri()),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1"),  # the default of 4 takes four times the memory
    ]


def _store_uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _not_from_this_thread(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD_NAME


def _as_text(value: Any) -> str:
    """As an override on the command line would say it: null, true, [1, 2]."""
    return _shorten(value if isinstance(value, str) else json.dumps(value, default=str))


def _shorten(text: str, limit: int = 6000) -> str:
    """`limit`: MLflow's for parameters, in characters (tags may have 8000)."""
    mark = " ... [cut]"
    return text if len(text) <= limit else text[: limit - len(mark)] + mark


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"//[^/@\s]+@", "//***@", text)  # a tracking URI may hold a password
    return text if len(text) <= 300 else text[:297] + "..."
