"""`powernap submit` from the command line to the scheduler: check everything, write down what will run, submit it once."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from powernap.launch.jobs.backends import Backend
from powernap.launch.jobs.cluster import Profile, find_cluster
from powernap.launch.jobs.description import JobDescription, JobError, UnknownOutcomeError
from powernap.launch.jobs.job import Job, JobFolder, Record, newest_record, next_attempt, sweep_file
from powernap.launch.jobs.secret_values import refuse_secrets
from powernap.launch.jobs.status import Status
from powernap.launch.jobs.sweep import expand
from powernap.launch.jobs.units import parse_size
from powernap.model.section import Section
from powernap.parallel.planning.plan import in_bytes, plan
from powernap.train.config import Recipe
from powernap.train.data.check import check_data, predicting_windows
from powernap.train.recipe_file import check, load_recipe, parse_overrides
from powernap.train.run.folder import RunFolder
from powernap.train.run.lock import ProcessLock
from powernap.train.run.provenance import code_changes, commit


class _Jobs(Section):
    job: JobDescription


@dataclass(frozen=True)
class Submission:
    """What one call of `powernap submit` asks for: a run, or the runs of a sweep.

    Attributes:
        folder: of the run or of the sweep.
        jobs, wanted: all, and those that have not ended well before.
    """

    folder: Path
    jobs: list[Job]
    wanted: list[Job]
    cluster: Profile
    backend: Backend

    @property
    def is_sweep(self) -> bool:
        return len(self.jobs) > 1

    def rendered(self) -> Iterator[tuple[list[Job], dict[str, str]]]:
        """Jobs that are submitted as one, and the files that say how."""
        for group in [self.wanted] if self.backend.arrays else [[job] for job in self.wanted]:
            yield group, self.backend.render(group)

    def folder_of(self, group: list[Job]) -> JobFolder:
        """Where the files of a group are kept: an array's in the folder of its sweep."""
        if len(group) == 1:
            return group[0].folder
        return JobFolder(self.folder / "jobs" / str(next_attempt(self.folder)))


def prepare(recipe: str, overrides: list[str], on: str, resume: bool = False) -> Submission:
    """Check all that can be checked without the scheduler.

    Args:
        recipe, overrides: as for `powernap train`; values separated by commas make a sweep; `job.*` describe the job.
        on: the cluster's name or file.
        resume: go on with a run that was started without `powernap submit`.

    Raises:
        ValueError: JobError, RecipeError or DataError, one line each.
    """
    cluster = find_cluster(on)
    ours = [text for text in overrides if text.startswith("job.")]
    description = check(_Jobs, parse_overrides(ours, into={"job": cluster.job.model_dump(exclude_unset=True)})).job
    combinations = expand([text for text in overrides if not text.startswith("job.")])
    base = load_recipe(recipe, combinations[0][1], cluster.files).run
    jobs = [
        _job(load_recipe(recipe, [*chosen, f"run.name={base.name}{suffix}"], cluster.files), description, cluster)
        for suffix, chosen in combinations
    ]
    is_sweep = len(jobs) > 1
    if len({job.name for job in jobs}) < len(jobs):
        raise JobError(f"two runs of the sweep {base.name} would have one name: give every value once")
    folder = Path(base.root) / base.name
    if is_sweep and (newest_record(folder) or RunFolder(folder).config.is_file()):
        raise JobError(f"{folder} is a run: choose another run.name for the sweep")
    if not is_sweep and sweep_file(folder).is_file():
        raise JobError(f"{folder} is a sweep: choose another run.name")
    backend = cluster.backend()
    backend.check(jobs)
    for job in jobs:
        _check_layout(job)
        if cluster.files != "elsewhere":
            check_data(job.recipe)
    wanted = [job for job in jobs if _may_start(job, resume)]
    if not wanted:
        who = f"all {len(jobs)} runs of the sweep {base.name} have" if is_sweep else f"{base.name} has"
        raise JobError(f"{who} ended well: powernap status {base.name}; or choose another run.name")
    return Submission(folder, jobs, wanted, cluster, backend)


def submit(submission: Submission) -> list[Record]:
    """Write every job's folder, submit, write down the ids.

    Raises:
        JobError: if the scheduler refuses; nothing is left submitted then, and the folders made here are gone.
    """
    jobs = submission.wanted
    with _only_one(jobs):
        for job in jobs:  # once more: another process may have been quicker
            if job.attempt != next_attempt(job.run_folder):
                raise JobError(f"{job.name}: submitted by somebody else this moment: powernap status {job.name}")
        records: list[Record] = []
        try:
            code, changes = commit(), code_changes()
            for job in jobs:
                _write_folder(job, code, changes)
            if submission.is_sweep:
                _write_sweep(submission)
            for group, files in submission.rendered():
                folder = submission.folder_of(group)
                _write_files(folder, files)
                for job in group:
                    job.record(None).save()
                ids = submission.backend.submit(group, files, folder.path)
                for job, id in zip(group, ids, strict=True):
                    records.append(job.record(id))
                    records[-1].save()
        except UnknownOutcomeError as error:
            raise JobError(f"{error}; whether it was submitted: powernap status {submission.folder.name}") from None
        except (JobError, OSError):
            for record in records:
                submission.backend.cancel(record)
            for job in jobs:
                _remove(job.folder)
            if submission.is_sweep:
                _remove_sweep(submission)
            raise
    return records


def status_of(record: Record) -> tuple[Record, Status]:
    """How a submitted job stands; the record with its id, if submitting was cut off before it was written down."""
    backend = record.profile.backend()
    if record.id is None:
        found = backend.find(record)
        if found is None:
            return record, Status("lost", "submitting it was interrupted")
        record = record.model_copy(update={"id": found})
        record.save()
    return record, backend.status(record)


def _job(recipe: Recipe, description: JobDescription, cluster: Profile) -> Job:
    refuse_secrets(recipe)
    return Job(
        recipe=recipe,
        description=description.resolved(recipe.parallel.world_size, recipe.parallel.grid),
        cluster=cluster,
        token=secrets.token_hex(8),
        attempt=next_attempt(recipe.run_folder),
        work=Path.cwd(),
    )


def _check_layout(job: Job) -> None:
    """Raise JobError if `powernap plan` says that a rank does not fit a GPU of the cluster."""
    memory = job.cluster.device_memory
    if memory is None or job.description.device == "cpu":
        return
    limit = parse_size(memory)
    found = plan(job.recipe, predicting_windows(job.recipe), limit)
    if not found.fits:
        most = max(stage.memory.total for stage in found.stages)
        raise JobError(
            f"{job.recipe.parallel.grid} needs {in_bytes(most)} of a GPU's {memory}: see powernap plan --suggest "
            f"--devices {job.recipe.parallel.world_size} --memory {memory}"
        )


def _may_start(job: Job, resume: bool) -> bool:
    """Whether this run is to be started, or started again; False if it has ended well.

    Raises:
        ValueError: if it is under way, or the run would not go on from where it is.
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
def _only_one(jobs: list[Job]) -> Iterator[None]:
    """Inside, nobody else submits these runs."""
    with ExitStack() as locks:
        for job in jobs:
            path = job.run_folder / "jobs" / "lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = ProcessLock(path)
            if not lock.acquire():
                raise JobError(f"{job.name} is being submitted by another process")
            locks.callback(lock.release)
        yield


def _write_folder(job: Job, code: dict, changes: bytes) -> None:
    folder = job.folder
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(job.recipe_text)
    (folder.path / "code.json").write_text(json.dumps(code, indent=2) + "\n")
    if changes:
        (folder.path / "code.diff").write_bytes(changes)


def _write_sweep(submission: Submission) -> None:
    submission.folder.mkdir(parents=True, exist_ok=True)
    sweep_file(submission.folder).write_text(json.dumps([str(job.run_folder) for job in submission.jobs]) + "\n")


def _remove_sweep(submission: Submission) -> None:
    """What a sweep that was refused has written; one that was submitted before stays."""
    if any(newest_record(job.run_folder) for job in submission.jobs):
        return
    sweep_file(submission.folder).unlink(missing_ok=True)
    shutil.rmtree(submission.folder / "jobs", ignore_errors=True)
    with suppress(OSError):
        submission.folder.rmdir()


def _write_files(folder: JobFolder, files: dict[str, str]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder.path / name).write_text(text)


def _remove(folder: JobFolder) -> None:
    """A folder of this submission, and those above that hold nothing else."""
    shutil.rmtree(folder.path, ignore_errors=True)
    (folder.path.parent / "lock").unlink(missing_ok=True)
    with suppress(OSError):
        folder.path.parent.rmdir()
        folder.path.parent.parent.rmdir()
