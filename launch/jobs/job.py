"""A job: one run as it is handed to a scheduler, and what its folder keeps of that.

runs/NAME/jobs/1/           the first submission; 2/ the one after it failed, and so on
    recipe.yaml             every field, as the ranks read it
    job.sbatch, jobset.yaml, ...    exactly what was submitted
    code.json, code.diff    the code's commit, and what had been changed since
    record.json             where it went and under which id
    log.txt                 what it printed, where its files are on a disk shared with the cluster
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from powernap.launch.jobs.cluster import Profile, parse_cluster
from powernap.launch.jobs.description import JobDescription, JobError
from powernap.model.section import Section
from powernap.train.config import Recipe
from powernap.train.recipe_file import RecipeError, check
from powernap.train.yaml_core import dump


@dataclass(frozen=True)
class JobFolder:
    """runs/NAME/jobs/K, or that of a sweep."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def state(self) -> Path:
        """What watches the job from beside it, the supervisor here, the batch script on SLURM, said last."""
        return self.path / "state.json"

    @property
    def cancelled(self) -> Path:
        """There once somebody asked to cancel: what starts a job again looks for it first."""
        return self.path / "cancelled"


@dataclass(frozen=True)
class Job:
    """One run for one cluster.

    Attributes:
        token: unlike that of any other submission; a scheduler that has it has this job.
        run_folder, work: the run's folder as seen from the folder `work`, in which `powernap submit` was called.
    """

    recipe: Recipe
    description: JobDescription  # with its nodes and processes
    cluster: Profile
    token: str
    attempt: int
    work: Path

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def run_folder(self) -> Path:
        return Path(self.recipe.run_folder)

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.run_folder / "jobs" / str(self.attempt))

    @property
    def recipe_text(self) -> str:
        """recipe.yaml: unlike a run's config.yaml with references to secrets, such as $TOKEN in a command."""
        return dump(self.recipe.model_dump(mode="json"))

    @property
    def nodes(self) -> int:
        assert self.description.nodes is not None
        return self.description.nodes

    @property
    def processes_per_node(self) -> int:
        assert self.description.processes_per_node is not None
        return self.description.processes_per_node

    def command(self, recipe: str | None = None) -> list[str]:
        """What every rank, or every node, runs. Starting it again goes on."""
        return [*self._powernap, "train", recipe or str(self.folder.recipe), "--auto-resume"]

    @property
    def _powernap(self) -> list[str]:
        if self.description.environment:
            return [f"{self.description.environment}/bin/powernap"]
        return ["powernap"] if self.description.image else [sys.executable, "-m", "powernap.launch.cli"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are no secrets."""
        return self.cluster.network.environment | self.description.env

    def record(self, id: str | None) -> "Record":
        return Record(
            run=self.name,
            run_folder=str(self.run_folder),
            work=str(self.work),
            cluster=self.cluster.model_dump(mode="json"),
            description=self.description.model_dump(mode="json"),
            token=self.token,
            attempt=self.attempt,
            id=id,
        )


class Record(Section):
    """record.json."""

    run: str
    run_folder: str
    work: str
    cluster: dict[str, Any]
    description: dict[str, Any]
    token: str
    attempt: int
    id: str | None = Field(description="what the scheduler calls it; null while it is being submitted")

    @property
    def profile(self) -> Profile:
        return parse_cluster(self.cluster)

    @property
    def job(self) -> JobDescription:
        return check(JobDescription, self.description)

    @property
    def known_id(self) -> str:
        """`id` of a job that has been submitted."""
        assert self.id is not None
        return self.id

    @property
    def own_folder(self) -> JobFolder:
        return JobFolder(Path(self.work) / self.run_folder / "jobs" / str(self.attempt))

    def save(self) -> None:
        path = self.own_folder.record
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.model_dump(), indent=2) + "\n")
        os.replace(part, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is not there, or is no JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def read_record(path: Path) -> Record:
    """Raises: JobError, if the file is damaged."""
    try:
        return check(Record, json.loads(path.read_text()))
    except (OSError, ValueError, RecipeError) as error:
        raise JobError(f"{path}: cannot be read ({error})") from None


def newest_record(run_folder: Path) -> Record | None:
    """The last submission of a run, or None; a sweep has none of its own."""
    path = JobFolder(run_folder / "jobs" / str(next_attempt(run_folder) - 1)).record
    return read_record(path) if path.is_file() else None


def next_attempt(run_folder: Path) -> int:
    """The number of the submission to come, from 1."""
    return 1 + max((int(path.name) for path in (run_folder / "jobs").glob("*/") if path.name.isdigit()), default=0)


def sweep_file(folder: Path) -> Path:
    """The run folders of a sweep, as a JSON list."""
    return folder / "sweep.json"
