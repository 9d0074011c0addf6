"""`powernap submit`, from the command line to the scheduler: check everything, write the jobs' folders, submit."""

import json
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from powernap.launch.jobs.backends import Backend
from powernap.launch.jobs.cluster import Profile, find_cluster
from powernap.launch.jobs.description import JobDescription, JobError, UnknownOutcomeError
from powernap.launch.jobs.job import (
    BuildJob,
    Job,
    JobFolder,
    JobRecord,
    TrainingJob,
    newest_record,
    next_attempt,
    records_in,
    sweep_file,
)
from powernap.launch.jobs.secret_values import refuse_secrets, refuse_secrets_in_words
from powernap.launch.jobs.status import Status
from powernap.launch.jobs.sweep import expand
from powernap.launch.jobs.units import parse_size
from powernap.model.section import Section
from powernap.parallel.planning.plan import in_bytes, plan_run
from powernap.train.config import Recipe
from powernap.train.data.build import check_build
from powernap.train.data.check import check_data, predicting_windows
from powernap.train.data.sample_sources import Source
from powernap.train.outputs import check_folder
from powernap.train.recipe_file import check, load_recipe, parse_overrides
from powernap.train.run.folder import RunFolder
from powernap.train.run.lock import ProcessLock
from powernap.train.run.provenance import code_changes, commit
from powernap.train.run.secrets import as_typed

AnyJob = TypeVar("AnyJob", bound=Job)
OF_RANKS = (
    "nodes",
    "processes_per_node",
    "device",
)  # what a profile says of runs: a part of a build is one process on CPUs


class _Jobs(Section):
    job: JobDescription


@dataclass(frozen=True)
class Submission:
    """One call of `powernap submit`: a run, the runs of a sweep, or the parts of a build.

    Attributes:
        folder: of the run or of the sweep.
        jobs: of all runs.
        jobs_to_start: without those of runs that have succeeded before, and of parts of which nothing is missing.
    """

    folder: Path
    jobs: list[Job]
    jobs_to_start: list[Job]
    cluster: Profile
    backend: Backend

    @property
    def is_sweep(self) -> bool:
        return len(self.jobs) > 1

    def rendered(self) -> Iterator[tuple[list[Job], dict[str, str]]]:
        """Each group of jobs that is submitted as one, with its files."""
        groups = [self.jobs_to_start] if self.backend.arrays else [[job] for job in self.jobs_to_start]
        for group in groups:
            yield group, self.backend.render(group)

    def folder_of(self, group: list[Job]) -> JobFolder:
        """The folder for a group's files: that of its job, or one in the sweep's folder for an array."""
        if len(group) == 1:
            return group[0].folder
        return JobFolder(self.folder / "jobs" / str(next_attempt(self.folder)))


def prepare_submission(
    recipe: str, overrides: list[str], on: str, resume: bool = False, typed: list[str] | None = None
) -> Submission:
    """Check everything that can be checked without submitting.

    Args:
        recipe, overrides: as for `powernap train`; values separated by commas make a sweep; `job.*` describe the job.
        on: the cluster's name or file.
        resume: continue a run that was started without `powernap submit`.
        typed: the words of the command, to be kept with the jobs.

    Raises:
        PowernapError: JobError, RecipeError or DataError, one line each.
    """
    cluster = find_cluster(on)
    description = _description(cluster, [override for override in overrides if override.startswith("job.")])
    combinations = expand([override for override in overrides if not override.startswith("job.")])
    base = load_recipe(recipe, combinations[0][1], cluster.files).run
    is_sweep = len(combinations) > 1
    sweep = [f"run.sweep={base.name}"] if is_sweep else []
    jobs = [
        _job(
            load_recipe(recipe, [*chosen, f"run.name={base.name}{suffix}", *sweep], cluster.files),
            description,
            cluster,
            typed or [],
        )
        for suffix, chosen in combinations
    ]
    if len({job.name for job in jobs}) < len(jobs):
        raise JobError(f"two runs of the sweep {base.name} would have the same name: give every value once")
    folder = Path(base.root) / base.name
    if is_sweep and (newest_record(folder) or RunFolder(folder).config.is_file()):
        raise JobError(f"{folder} is a run: choose another run.name for the sweep")
    if not is_sweep and sweep_file(folder).is_file():
        raise JobError(f"{folder} is a sweep: choose another run.name")
    backend = cluster.backend()
    backend.check([*jobs])
    for job in jobs:
        check_folder(job.run_folder, f"run.root={job.recipe.run.root}:")
        _check_layout(job)
        if cluster.files != "elsewhere":
            check_data(job.recipe)
    jobs_to_start = [job for job in jobs if _may_start(job, resume)]
    if not jobs_to_start:
        subject = f"all {len(jobs)} runs of the sweep {base.name} have" if is_sweep else f"{base.name} has"
        raise JobError(f"{subject} succeeded already: powernap status {base.name}; or choose another run.name")
    return Submission(folder, [*jobs], [*jobs_to_start], cluster, backend)


def prepare_build(
    words: list[str],
    folder: Path,
    source: Source,
    parts: int,
    overrides: list[str],
    on: str,
    typed: list[str] | None = None,
) -> Submission:
    """`prepare_submission` for `powernap data build` with these words, in parts.

    Args:
        folder, source: what they say.
        overrides: `job.*`.

    Raises:
        PowernapError: JobError or DataError, one line each.
    """
    cluster = find_cluster(on)
    description = _description(cluster, overrides, without=OF_RANKS).resolved(1, "a part of a build")
    refuse_secrets_in_words(words)
    name = f"build-{folder.name}"
    together = Path(BuildJob.root) / name
    if records_in(together) and sweep_file(together).is_file() == (parts == 1):
        before, write = ("one part", "1") if parts > 1 else ("several parts", "2 or more")
        raise JobError(f"{together} was submitted as {before}: write --parts {write}, or remove that folder")
    for record in records_in(together):  # of other numbers of parts, too: two parts must not write the same shard
        _, status = status_of(record)
        if not status.is_over:
            raise JobError(f"{record.run} is {status.state}: wait for it, or powernap cancel {name}")
    jobs = [
        _numbered(
            BuildJob(
                build=name,
                output=folder,
                words=tuple(words),
                part=(number, parts),
                **_common(description, cluster, typed or []),
            )
        )
        for number in range(1, parts + 1)
    ]
    backend = cluster.backend()
    backend.check([*jobs])
    check_folder(together, "")
    if cluster.files == "elsewhere":
        return Submission(together, [*jobs], [*jobs], cluster, backend)
    done = check_build(source, folder)
    if parts > len(done):
        raise JobError(f"--parts {parts}: {len(done)} shards are to build: write --parts {len(done)} or less")
    unfinished = [job for job in jobs if not all(done[job.part[0] - 1 :: parts])]
    return Submission(together, [*jobs], [*(unfinished or jobs[:1])], cluster, backend)  # any part writes the manifest


def submit_all(submission: Submission) -> list[JobRecord]:
    """Write every job's folder, submit, record the ids.

    Raises:
        JobError: if the scheduler rejects a job; then none stays submitted, and the folders made here are removed.
    """
    with _locked(submission.jobs_to_start):
        _check_still_next(submission.jobs_to_start)
        with _undone_on_error(submission) as submitted:
            _write_folders(submission)
            for group, files in submission.rendered():
                folder = submission.folder_of(group)
                _write_files(folder, files)
                for job in group:
                    job.record(None).save()
                ids = submission.backend.submit(group, files, folder.path)
                records = [job.record(id) for job, id in zip(group, ids, strict=True)]
                submitted += records  # before they are saved, which may fail
                for record in records:
                    record.save()
    return submitted


@contextmanager
def _undone_on_error(submission: Submission) -> Iterator[list[JobRecord]]:
    """On an error, cancel the jobs in the list and remove all folders; but keep them while a job may be submitted."""
    submitted: list[JobRecord] = []
    try:
        yield submitted
    except UnknownOutcomeError as error:
        raise JobError(f"{error}; whether it was submitted: powernap status {submission.folder.name}") from None
    except (JobError, OSError):
        for record in submitted:
            submission.backend.cancel(record)
        for job in submission.jobs_to_start:
            _remove(job.folder)
        if submission.is_sweep:
            _remove_sweep(submission)
        raise


def status_of(record: JobRecord) -> tuple[JobRecord, Status]:
    """A submitted job's status, and its record: with the id, if `powernap submit` was interrupted before saving it."""
    backend = record.profile.backend()
    if record.id is None:
        id = backend.find(record)
        if id is None:
            return record, Status("lost", "submitting it was interrupted")
        record = record.model_copy(update={"id": id})
        record.save()
    return record, backend.status(record)


def _description(cluster: Profile, overrides: list[str], without: Collection[str] = ()) -> JobDescription:
    """The profile's fields, but those in `without`, and those on the command line."""
    defaults = {"job": cluster.job.model_dump(exclude_unset=True, exclude={*without})}
    return check(_Jobs, parse_overrides(overrides, into=defaults)).job


def _job(recipe: Recipe, description: JobDescription, cluster: Profile, typed: list[str]) -> TrainingJob:
    refuse_secrets(recipe)
    description = description.resolved(recipe.parallel.world_size, recipe.parallel.grid)
    return _numbered(TrainingJob(recipe=recipe, **_common(description, cluster, typed)))


def _numbered(job: AnyJob) -> AnyJob:
    return replace(job, attempt=next_attempt(job.run_folder))


def _common(description: JobDescription, cluster: Profile, typed: list[str]) -> dict[str, Any]:
    """What jobs of every kind have."""
    return {
        "description": description,
        "cluster": cluster,
        "submission_id": secrets.token_hex(8),
        "attempt": 1,
        "submit_dir": Path.cwd(),
        "submitted_as": as_typed(typed) if typed else "",
    }


def _check_layout(job: TrainingJob) -> None:
    """Raise JobError if, by `powernap plan`, a rank does not fit a GPU of the cluster."""
    memory = job.cluster.device_memory
    if memory is None or job.description.device == "cpu":
        return
    layout = plan_run(job.recipe, predicting_windows, parse_size(memory))
    if not layout.fits:
        most = max(stage.memory.total for stage in layout.stages)
        raise JobError(
            f"{job.recipe.parallel.grid} needs {in_bytes(most)} of a GPU's {memory}: see powernap plan --suggest "
            f"--devices {job.recipe.parallel.world_size} --memory {memory}"
        )


def _may_start(job: TrainingJob, resume: bool) -> bool:
    """Whether to start this run, or to start it again; False if it has succeeded.

    Raises:
        PowernapError: if it is under way, or cannot be resumed with this recipe.
    """
    run = RunFolder(job.run_folder)
    record = newest_record(job.run_folder)
    if record is None:
        run.check_start(job.recipe, resume)
        return True
    record, status = status_of(record)
    if not status.is_over:
        raise JobError(
            f"{job.name} is {status.state} as job {record.id} on {record.profile.kind}: wait for it, "
            f"powernap cancel {job.name}, or choose another run.name"
        )
    if status.state == "succeeded":
        return False
    if run.config.is_file():
        run.check_start(job.recipe, resume=True)
    return True


@contextmanager
def _locked(jobs: list[Job]) -> Iterator[None]:
    """Keeps other processes from submitting these runs."""
    with ExitStack() as locks:
        for job in jobs:
            path = job.run_folder / "jobs" / "lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = ProcessLock(path)
            if not lock.acquire():
                raise JobError(f"{job.name} is being submitted by another process")
            locks.callback(lock.release)
        yield


def _check_still_next(jobs: list[Job]) -> None:
    """Raise JobError if another process has submitted a run since it was checked."""
    for job in jobs:
        if job.attempt != next_attempt(job.run_folder):
            raise JobError(f"{job.name} has just been submitted by another process: powernap status {job.name}")


def _write_folders(submission: Submission) -> None:
    code, changes = json.dumps(commit(), indent=2) + "\n", code_changes()
    for job in submission.jobs_to_start:
        folder = job.folder
        folder.path.mkdir(parents=True)
        if job.recipe_text is not None:
            folder.recipe.write_text(job.recipe_text)
        (folder.path / "code.json").write_text(code)
        if changes:
            (folder.path / "code.diff").write_bytes(changes)
    if submission.is_sweep:
        submission.folder.mkdir(parents=True, exist_ok=True)
        sweep_file(submission.folder).write_text(json.dumps([str(job.run_folder) for job in submission.jobs]) + "\n")


def _write_files(folder: JobFolder, files: dict[str, str]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder.path / name).write_text(text)


def _remove(folder: JobFolder) -> None:
    """Remove a job's folder, and its parents that are empty then."""
    shutil.rmtree(folder.path, ignore_errors=True)
    (folder.path.parent / "lock").unlink(missing_ok=True)
    with suppress(OSError):
        folder.path.parent.rmdir()
        folder.path.parent.parent.rmdir()


def _remove_sweep(submission: Submission) -> None:
    """Remove the sweep's own files, unless one of its runs was submitted before."""
    if any(newest_record(job.run_folder) for job in submission.jobs):
        return
    sweep_file(submission.folder).unlink(missing_ok=True)
    shutil.rmtree(submission.folder / "jobs", ignore_errors=True)
    with suppress(OSError):
        submission.folder.rmdir()
