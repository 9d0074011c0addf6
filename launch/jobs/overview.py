"""Submitted jobs by name, and their status."""

from pathlib import Path

from powernap.launch.jobs.description import JobError
from powernap.launch.jobs.job import JobRecord, newest_record, records_in
from powernap.launch.jobs.status import Row, read_progress
from powernap.launch.jobs.submission import status_of
from powernap.train.paths import expand
from powernap.train.recipe_file import RecipeError, read_sections
from powernap.train.yaml_core import settle


def find_jobs(name: str) -> list[JobRecord]:
    """The job of a run, or those of a sweep, by folder or by name below runs/.

    Raises:
        JobError: if nothing was submitted by that name.
    """
    for folder in (Path(expand(name)), Path("runs") / name):
        if records := records_in(folder):
            return records
    raise JobError(f"no job '{name}': powernap list shows those submitted from here")


def all_jobs(root: Path) -> list[JobRecord]:
    """The last submission of every run, oldest first."""

    records = [record for folder in root.glob("*/") if (record := newest_record(folder))]
    return sorted(records, key=lambda record: record.folder.record.stat().st_mtime)


def rows_of(records: list[JobRecord]) -> list[Row]:
    rows = []
    for record in records:
        record, status = status_of(record)
        rows.append(
            Row(
                run=record.run,
                cluster=record.cluster["kind"],
                id=record.id,
                attempt=record.attempt,
                status=status,
                progress=read_progress(Path(record.submit_dir) / record.run_folder),
                steps=_steps(record),
            )
        )
    return rows


def _steps(record: JobRecord) -> int | None:
    try:
        return settle(read_sections(record.folder.recipe))["train"]["steps"]
    except (RecipeError, KeyError):
        return None
