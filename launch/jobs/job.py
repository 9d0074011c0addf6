"""A job: one run, or a part of a build, as submitted to a scheduler, and the folder that records its submission.

runs/NAME/jobs/1/           the first submission; 2/ the next one, after that failed, and so on
    recipe.yaml             of a run: every field, as the ranks read it
    job.sbatch, jobset.yaml, ...    exactly what was submitted
    code.json, code.diff    the code's commit, and the uncommitted changes
    record.json             cluster, job id, the command as typed
    log.txt                 the job's output, if the cluster's disks are mounted here
"""

import json
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from powernap.launch.jobs.cluster import Profile, parse_cluster
from powernap.launch.jobs.description import JobDescription, JobError
from powernap.model.section import Section
from powernap.train.config import Recipe
from powernap.train.recipe_file import RecipeError, check
from powernap.train.run.provenance import SUBMITTED_AS
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
        """Last state written by the supervisor (this machine) or the batch script (SLURM)."""
        return self.path / "state.json"

    @property
    def cancelled(self) -> Path:
        """Exists once the job was cancelled: checked before every restart."""
        return self.path / "cancelled"


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One run, or one part of a build, for one cluster.

    Attributes:
        submission_id: random and unique; the scheduler keeps it with the job, so that the job can be found by it.
        attempt: number of the submission of this run, from 1.
        submit_dir: the working directory of `powernap submit`; `run_folder` is relative to it.
        submitted_as: the command as typed, secrets masked.
    """

    description: JobDescription  # nodes and processes_per_node are set
    cluster: Profile
    submission_id: str
    attempt: int
    submit_dir: Path
    submitted_as: str = ""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def root(self) -> str:
        """The folder of run folders."""

    @abstractmethod
    def command(self, recipe: str | None = None) -> list[str]:
        """The command of every rank, or of every node. Running it again goes on from what is there.

        Args:
            recipe: of a run, where its recipe is there; None: in the job's folder.
        """

    @property
    def recipe_text(self) -> str | None:
        """recipe.yaml."""
        return None

    @property
    def written(self) -> list[Path]:
        """Folders that it writes, as it sees them."""
        return [self.run_folder]

    @property
    def run_folder(self) -> Path:
        return Path(self.root) / self.name

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.run_folder / "jobs" / str(self.attempt))

    @property
    def nodes(self) -> int:
        assert self.description.nodes is not None
        return self.description.nodes

    @property
    def processes_per_node(self) -> int:
        assert self.description.processes_per_node is not None
        return self.description.processes_per_node

    @property
    def _powernap(self) -> list[str]:
        if self.description.environment:
            return [f"{self.description.environment}/bin/powernap"]
        return ["powernap"] if self.description.image else [sys.executable, "-m", "powernap.launch.cli"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are not secret."""
        own = {SUBMITTED_AS: self.submitted_as} if self.submitted_as else {}
        return own | self.cluster.network.environment | self.description.env

    def record(self, id: str | None) -> "JobRecord":
        return JobRecord(
            run=self.name,
            run_folder=str(self.run_folder),
            submit_dir=str(self.submit_dir),
            cluster=self.cluster.model_dump(mode="json"),
            description=self.description.model_dump(mode="json"),
            submission_id=self.submission_id,
            attempt=self.attempt,
            submitted_as=self.submitted_as,
            id=id,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """One run."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def root(self) -> str:
        return self.recipe.run.root

    @property
    def recipe_text(self) -> str:
        """Unlike a run's config.yaml, it keeps references to secrets, such as $TOKEN in a command."""
        return dump(self.recipe.model_dump(mode="json"))

    def command(self, recipe: str | None = None) -> list[str]:
        return [*self._powernap, "train", recipe or str(self.folder.recipe), "--auto-resume"]


@dataclass(frozen=True, kw_only=True)
class BuildJob(Job):
    """One part of a build of shards.

    Attributes:
        build: its name.
        output: the folder of its shards, as the job sees it.
        words: of `powernap data build`.
        part: (i, n), from 1.
    """

    build: str
    output: Path
    words: tuple[str, ...]
    part: tuple[int, int]

    root = "runs"

    @property
    def name(self) -> str:
        number, parts = self.part
        return f"{self.build}-part-{number:0{len(str(parts))}}" if parts > 1 else self.build

    @property
    def written(self) -> list[Path]:
        return [self.run_folder, self.output]

    def command(self, recipe: str | None = None) -> list[str]:
        cores = self.description.cpus_per_process  # in a pod a process sees all of the node's
        workers = ["--workers", str(cores)] if cores and "--workers" not in self.words else []
        return [*self._powernap, "data", "build", *self.words, *workers, "--part", "/".join(map(str, self.part))]


class JobRecord(Section):
    """record.json."""

    run: str
    run_folder: str
    submit_dir: str
    cluster: dict[str, Any]
    description: dict[str, Any]
    submission_id: str
    attempt: int
    submitted_as: str = ""  # records of an older version lack it
    id: str | None = Field(description="the scheduler's id; null until the scheduler has accepted the job")

    @property
    def profile(self) -> Profile:
        return parse_cluster(self.cluster)

    @property
    def job(self) -> JobDescription:
        return check(JobDescription, self.description)

    @property
    def known_id(self) -> str:
        """The id of a job that the scheduler has accepted."""
        assert self.id is not None
        return self.id

    @property
    def folder(self) -> JobFolder:
        return JobFolder(Path(self.submit_dir) / self.run_folder / "jobs" / str(self.attempt))

    def save(self) -> None:
        path = self.folder.record
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.model_dump(), indent=2) + "\n")
        os.replace(part, path)


# Fields by the names that earlier versions gave them in the files of a job's folder.
RENAMED = {"token": "submission_id", "work": "submit_dir"}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object of a job's folder, or None if there is none."""
    try:
        return _load(path)
    except (FileNotFoundError, ValueError):
        return None


def read_record(path: Path) -> JobRecord:
    """Raises: JobError, if the file is damaged."""
    try:
        return check(JobRecord, _load(path))
    except (OSError, ValueError, RecipeError) as error:
        raise JobError(f"{path}: cannot be read ({error})") from None


def _load(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return {RENAMED.get(name, name): value for name, value in values.items()}


def newest_record(run_folder: Path) -> JobRecord | None:
    """The last submission of a run, or None. The folder of a sweep has no record, only those of its runs have."""
    path = JobFolder(run_folder / "jobs" / str(next_attempt(run_folder) - 1)).record
    return read_record(path) if path.is_file() else None


def records_in(folder: Path) -> list[JobRecord]:
    """The last submission of a run, or of each run of a sweep; empty: nothing was submitted."""
    if record := newest_record(folder):
        return [record]
    if not (path := sweep_file(folder)).is_file():
        return []
    return [record for run in json.loads(path.read_text()) if (record := newest_record(Path(run)))]


def next_attempt(run_folder: Path) -> int:
    """The number of the next submission, from 1."""
    return 1 + max((int(path.name) for path in (run_folder / "jobs").glob("*/") if path.name.isdigit()), default=0)


def sweep_file(folder: Path) -> Path:
    """The run folders of a sweep, as a JSON list."""
    return folder / "sweep.json"
