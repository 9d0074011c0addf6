"""A run's folder: config.yaml, history.jsonl, metrics.jsonl, checkpoints/, logs/ and the results of evaluation."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powernap.model.config import with_sections
from powernap.model.segments import Probe
from powernap.parallel.checkpoint.manifest import CheckpointError
from powernap.parallel.planning.work import step_flops_by_passes
from powernap.train.config import Recipe
from powernap.train.data.manifest import read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.recipe_file import RecipeError, check, read_sections
from powernap.train.run.lock import RUN_LOCK, ProcessLock
from powernap.train.run.provenance import origin
from powernap.train.run.resume import ON_RESUME, Past
from powernap.train.run.secrets import mask_values
from powernap.train.yaml_core import dump

if TYPE_CHECKING:
    from powernap.parallel.checkpoint.reader import Checkpoint
    from powernap.parallel.topology import Topology

logger = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id"  # a resumed run continues in the same MLflow run


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe: every field, in order; secrets masked."""
    path.write_text(dump(mask_values(recipe.model_dump(mode="json"))))


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def skipped_steps(self) -> Path:
        return self.path / "skipped_steps.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def mlflow_run_id(self) -> str | None:
        """The run's id in MLflow, if it has one; also in checkpoints, which may be all that is left of a run."""
        path = self.path / RUN_ID_FILE
        return path.read_text().strip() if path.is_file() else None

    def restore_mlflow_run_id(self, run_id: str | None) -> None:
        if run_id and self.mlflow_run_id is None:
            (self.path / RUN_ID_FILE).write_text(run_id + "\n")

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def history(self) -> Path:
        """A line for each start: date, commit, the step it continues from, what has changed."""
        return self.path / "history.jsonl"

    @property
    def work(self) -> Path:
        """The work of a step, computed from the first batch: see work_of."""
        return self.path / "work.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @contextmanager
    def locked(self, topology: "Topology") -> Iterator[None]:
        """Inside, no other process trains this run; the main rank holds the lock, which ends with its process.

        Raises:
            RecipeError: on all ranks, if another process does, such as a job that was restarted too early.
        """
        lock = ProcessLock(self.path / RUN_LOCK)

        def acquire() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            if not lock.acquire():
                raise RecipeError(f"{self.path}: another process is training this run: wait for its end")

        topology.raise_together(acquire)
        try:
            yield
        finally:
            lock.release()

    def create(self, recipe: Recipe, started_from: Mapping[str, Any] | None = None) -> None:
        """Create the folders; write the resolved recipe and the run's provenance, with the source of its weights, if any."""
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, self.config)
        if not started_from and self.origin.is_file():  # on --resume
            started_from = json.loads(self.origin.read_text()).get("started_from")
        about = origin() | ({"started_from": started_from} if started_from else {})
        self.origin.write_text(json.dumps(about, indent=2) + "\n")

    def record(self, step: int, **about: Any) -> None:
        """Append a line to the history: the run starts, or continues after `step`."""
        code = origin()
        line = {"date": code["date"], "commit": code["commit"], "step": step, **about}
        with self.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_history(self) -> list[dict[str, Any]]:
        """Its lines; none of runs that began before there was one."""
        return [json.loads(line) for line in self.history.read_text().splitlines()] if self.history.is_file() else []

    def write_work(self, work: Mapping[str, Any]) -> None:
        """Raises OSError."""
        self.work.write_text(json.dumps(work, indent=2) + "\n")

    def recipe(self) -> Recipe:
        """The recipe this run was started with, without its secrets."""
        if not self.config.is_file():
            raise RecipeError(f"{self.path}: no run there (config.yaml is missing)")
        values = read_sections(self.config)
        if "model" in values:
            values["model"] = with_sections(values["model"])
        return check(Recipe, values)

    def newest_checkpoint(self) -> "Checkpoint":
        """The newest valid checkpoint, for reading.

        Raises:
            CheckpointError: if there is none.
        """
        from powernap.parallel.checkpoint.reader import Checkpoint  # late: it imports torch

        checkpoint, passed_over = Checkpoint.newest(self.checkpoints)
        for reason in passed_over:
            logger.warning("passed over a checkpoint: %s", reason)
        if checkpoint is None:
            why = (
                f"none is whole: {passed_over[0]}"
                if passed_over
                else "no checkpoint yet: train the run to its first one"
            )
            raise CheckpointError(f"{self.checkpoints}: {why}")
        return checkpoint

    def check_start(self, recipe: Recipe, resume: bool) -> None:
        """Raise RecipeError if a start would overwrite a run, or a resume would continue a different one."""
        exists = self.config.is_file()
        if not resume:
            if exists:
                raise RecipeError(f"{self.path} exists: continue with --resume, or choose another run.name")
            return
        if not exists:
            raise RecipeError(f"{self.path}: nothing to resume: start it without --resume")
        self.past().check(recipe, ON_RESUME)

    def past(self) -> Past:
        """This run up to its newest checkpoint."""
        return Past.of_run(self.path, self.recipe())


def work_of(recipe: Recipe, predicts: Sequence[Sequence[bool]], probes: Sequence[Probe]) -> dict[str, Any]:
    """What a report needs to know about the shards, which may have moved by then.

    Args:
        predicts: for each of the recipe's phases, for each window whether it has loss tokens.
        probes: those among the windows.

    Returns:
        "predicts", of the last phase; "probes"; "flops_per_step", for every N trained in it; "phases", each with the step "after"
        which it begins and "flops_per_step"; "task" and "fields", None if no manifest has them
    """
    phases = [
        {"after": start, "flops_per_step": step_flops_by_passes(phase, windows, probes)}
        for (start, phase), windows in zip(recipe.phases, predicts, strict=True)
    ]
    manifest = first_manifest(recipe) or {}
    return {
        "predicts": list(predicts[-1]),
        "probes": [list(probe) for probe in probes],
        "flops_per_step": phases[-1]["flops_per_step"],
        "phases": phases,
        "task": manifest.get("task"),
        "fields": mask_values(manifest.get("fields")),
    }


def flops_of_step(work: Mapping[str, Any], recipe: Recipe, record: Mapping[str, Any]) -> int | None:
    """Training FLOPs of the step of a record of metrics, on all ranks, by a run's `work_of`; None if that does not say."""
    passes = record.get("passes", max(recipe.sleep.pass_choices))
    phase = sum(start < record["step"] for start, _ in recipe.phases) - 1
    phases = work.get("phases", [])
    return phases[phase]["flops_per_step"].get(str(passes)) if phase < len(phases) else None


def first_manifest(recipe: Recipe) -> dict[str, Any] | None:
    """The manifest of the first dataset's shards, if they are local and it names the task."""
    try:
        first = local_path(expand_shards(next(iter(recipe.data.datasets.values()))[0])[0])
        manifest = read_manifest(first) if first else {}
    except DataError:
        return None
    return manifest if manifest.get("task") else None
