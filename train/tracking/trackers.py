"""The trackers of a run's metrics beside metrics.jsonl: MLflow, and those of other packages (powernap.trackers)."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from powernap.model.plugins import plugins
from powernap.train.config import Recipe
from powernap.train.run.secrets import mask_values
from powernap.train.tracking.about import about
from powernap.train.tracking.tracker import Status, Tracker

logger = logging.getLogger(__name__)


class OtherTracker(Protocol):
    """Returned by an entry point of `powernap.trackers`, called with (run_folder, experiment, config, resume_step).

    run_folder: its name is the run's. config: the resolved recipe as nested mappings, without secrets. resume_step: the last
    step of the run so far, None for a new run. On rank 0 only. An exception is reported once and does not end the run.
    """

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Track numbers by name, such as loss and accuracy/N4/depth_1; other values may be among them."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, below `folder` if given."""

    def close(self, status: Status | None = "FINISHED", timeout: float = 30.0) -> object:
        """The run has ended with `status`; None: it was only evaluated. `timeout`: seconds that this may take."""


class Trackers:
    """All trackers of a run as one. On ranks other than 0, with none, every method does nothing."""

    def __init__(self, trackers: Mapping[str, OtherTracker] | None = None) -> None:
        self._trackers = dict(trackers or {})
        self._failed: set[str] = set()

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, resume_step: int | None = None, running: bool = True) -> "Trackers":
        """Open the trackers in run.trackers.

        Args:
            running: whether the run is training now; its evaluation, or a resume with no step left, does not change what
                MLflow says of it.
        """
        config, opened = recipe.model_dump(mode="json"), cls()
        others = plugins("trackers") if set(recipe.run.trackers) - {"mlflow"} else {}
        for name in recipe.run.trackers:
            if name == "mlflow":
                more = about(recipe, folder) if running else None
                opened._trackers[name] = Tracker(folder, recipe.run.experiment, config, resume_step, running, more)
            else:
                arguments = (folder, recipe.run.experiment, mask_values(config), resume_step)
                opened._add(name, functools.partial(others[name], *arguments))
        return opened

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log_metrics(step, metrics))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._each(lambda tracker: tracker.log_artifact(path, folder))

    def describe(self, text: str) -> None:
        """Replace the description of the run in MLflow; other trackers have none."""
        for tracker in self._trackers.values():
            if isinstance(tracker, Tracker):
                tracker.describe(text)

    def close(self, status: Status | None = "FINISHED", timeout: float = 30.0) -> None:
        self._each(lambda tracker: tracker.close(status, timeout))

    def _add(self, name: str, make: Callable[[], OtherTracker]) -> None:
        try:
            self._trackers[name] = make()
        except Exception as error:  # another's code may raise anything
            self._report(name, error)

    def _each(self, call: Callable[[OtherTracker], object]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:  # another's code may raise anything
                self._report(name, error)

    def _report(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            logger.warning("tracker %s failed, the run continues: %s: %s", name, type(error).__name__, error)
