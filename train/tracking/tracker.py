"""MLflow: browse and compare runs in a web page. A convenience: a run's own record is its metrics.jsonl.

Without MLFLOW_TRACKING_URI, MLflow keeps its data beside the runs: `mlflow.db` (SQLite) and `mlartifacts/` in the folder
that holds the run folders. `ui_command` shows them.
"""

import json
import logging
import numbers
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from powernap.model.errors import PowernapError
from powernap.parallel import loopback
from powernap.train.recipe_file import flatten
from powernap.train.run.secrets import mask_values
from powernap.train.tracking.about import NOTE, About
from powernap.train.tracking.charts import chart_name
from powernap.train.tracking.delivery import THREAD_NAME, Delivery, one_line, prepare_mlflow, shorten, store_uri
from powernap.train.tracking.metrics import to_json
from powernap.train.tracking.spool import Spool, delivery_lock

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

RECORDS = ("config.yaml", "origin.json", "history.jsonl")  # of a run's folder, where they are artifacts
FLUSH_SECONDS = 2.0  # between deliveries, so that MLflow takes a small share of the process's time
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")  # MLflow's rule; patterns of optimizer.groups are part of such a key
# The first and the longest delay before a retry, when a server did not answer; each delay is twice the last.
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.5, 60.0


class Tracker:
    """One run's connection to MLflow. Rank 0 only.

    run_folder: `runs/NAME`; NAME becomes the run's name; RECORDS are artifacts. experiment: MLflow's name for a group of
    runs. config: the resolved recipe, tracked as parameters with dotted keys, without its secrets. resume_step: the step
    that a run resumes after. running: whether the run is training now; its evaluation does not change its status. about: tags and
    data sets; with them the machine's load is tracked, too.

    No method raises, and none waits for MLflow except `close`: records are written to the run's spool, from which a daemon
    thread delivers them in order. Failures are retried; records left at the end wait for `powernap sync` or the next
    start. While another process delivers this run's spool, records are left to it. A resumed run continues in its
    MLflow run, where repeated steps appear twice: MLflow cannot delete metrics.
    """

    def __init__(
        self,
        run_folder: Path,
        experiment: str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        running: bool = True,
        about: About | None = None,
    ) -> None:
        self._given_folder = run_folder
        self._folder = Path(os.path.abspath(run_folder))
        self._reported_write_error = False
        self._reported: set[str] = set()  # failures
        self._failure: str | None = None  # why records wait now
        self._spool = Spool(self._folder)
        self._delivery = Delivery(self._folder)
        self._lock = delivery_lock(self._folder)
        self._closing = threading.Event()
        self._description = about.tags.get(NOTE) if about else None
        earlier = self._spool.begin()
        self._put(
            type="start",
            key=earlier["key"] if earlier else uuid.uuid4().hex,
            name=self._folder.name,
            experiment=experiment,
            parameters={
                NOT_IN_NAMES.sub("_", key): _as_text(value) for key, value in flatten(mask_values(config)).items()
            },
            resume_step=resume_step,
            running=running,
            **(about._asdict() if about else {}),
        )
        for name in RECORDS:
            if (self._folder / name).is_file():
                self.log_artifact(self._folder / name)
        # Import here, not in the thread: data workers forked in the middle of an import can deadlock.
        prepare_mlflow()
        self._monitors = _monitors() if about else []
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Track the numbers in `metrics`, such as a record of metrics.jsonl, at `step`, named as charts.py says."""
        values = {
            chart_name(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and name != "step"
        }
        self._put(type="metrics", step=step, values=to_json(values | self._system()))

    def _system(self) -> dict[str, float]:
        """This machine's load, under the names of MLflow's page of system metrics."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        return found

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Track a file, in `folder` among the run's artifacts. It must stay in place until it is delivered."""
        self._put(type="artifact", path=os.path.relpath(path, self._folder), folder=folder)

    def describe(self, text: str) -> None:
        """Replace the description of the start by `text`, unless somebody has written another one meanwhile."""
        self._put(type="description", text=text, before=self._description)

    def close(self, status: Status | None = "FINISHED", timeout: float = 30.0) -> int:
        """Deliver the rest, waiting at most `timeout` seconds; returns how many records MLflow does not have yet.

        status: how the run ended; None leaves it unchanged.
        """
        if not self._closing.is_set():
            if status:
                self._put(type="status", status=status)
            self._spool.close()
            self._closing.set()
        self._thread.join(timeout)
        waiting, refused = self._delivery.waiting(), self._delivery.refused()
        if refused:
            logger.warning("MLflow refused %d records of this run, which it will not get: %s", len(refused), refused[0])
        if waiting:
            aside = self._delivery.aside()
            why = self._failure or ("not done yet" if self._thread.is_alive() or not aside else aside[0])
            logger.warning(
                "%d records of this run wait for MLflow: `powernap sync %s` delivers them (%s)",
                waiting,
                shlex.quote(str(self._given_folder)),
                why,
            )
        return waiting

    def _put(self, **record: Any) -> None:
        try:
            self._spool.append({**record, "time": int(time.time() * 1000)})  # milliseconds since 1970
        except OSError as error:
            if not self._reported_write_error:
                self._reported_write_error = True
                logger.warning("%s: MLflow misses records: %s", self._spool.path, error.strerror)

    def _work(self) -> None:
        """The thread's loop."""
        pause = retry = FIRST_RETRY_SECONDS
        while True:
            closing = self._closing.is_set()  # read first: records written before close() are still delivered
            if not self._lock.acquire():
                self._failure = "another process delivers this run's records"
            elif self._deliver(closing):
                pause, retry = FLUSH_SECONDS, FIRST_RETRY_SECONDS
            else:
                pause, retry = retry, min(2 * retry, LAST_RETRY_SECONDS)
                closing = self._closing.is_set()  # once is enough: the end of a run must not wait for two timeouts
            if closing:
                break
            self._closing.wait(pause)
        self._lock.release()

    def _deliver(self, closing: bool) -> bool:
        """Whether MLflow answered. All failures of tracking are handled here."""
        try:
            self._delivery.deliver(again=closing)
        except Exception as error:
            self._failure = one_line(error)
            # A library's error may differ each time, so only the first is logged; ours give advice.
            if not self._reported or isinstance(error, PowernapError) and self._failure not in self._reported:
                logger.warning("tracking to MLflow failed, training continues and records wait: %s", self._failure)
            self._reported.add(self._failure)
            return False
        self._failure = None
        return True


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[Any] = [CPUMonitor()]
    with suppress(Exception):  # no GPU, or no pynvml
        monitors.append(GPUMonitor())
    return monitors


def ui_command(root: Path, port: int = 5000) -> list[str]:
    """The command that serves the MLflow data in `root` (the folder of all runs) on loopback: http://127.0.0.1:PORT."""
    root = Path(os.path.abspath(root))
    return [
        # MLflow would also start a background job runner (six processes), of no use here.
        *("env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"),
        "PYTHONWARNINGS=ignore:starlette.middleware.wsgi",  # MLflow's own business
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", store_uri(root), "--registry-store-uri", store_uri(root)),
        *("--uvicorn-opts", "--log-level warning --no-access-log"),
        *("--artifacts-destination", (root / "mlartifacts").as_uri()),
        *("--host", loopback.address(), "--port", str(port)),
        *("--workers", "1"),  # the default of 4 takes four times the memory
    ]


def _as_text(value: Any) -> str:
    """The value as in a command-line override: null, true, [1, 2]."""
    return shorten(value if isinstance(value, str) else json.dumps(value, default=str))
