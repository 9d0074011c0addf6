"""The interface to a kind of cluster; a profile (launch/jobs/cluster.py) creates its backend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from powernap.launch.jobs.job import Job, JobRecord
from powernap.launch.jobs.status import Status


class Backend(Protocol):
    """A kind of cluster. Every method may raise JobError: the scheduler's complaint, in one line."""

    arrays: bool  # whether several jobs are submitted as one

    def check(self, jobs: list[Job]) -> None:
        """Raise for jobs that would be rejected or fail, before anything is written."""

    def render(self, jobs: list[Job]) -> dict[str, str]:
        """File name -> text, exactly as `submit` submits it; no side effects. Several jobs only with `arrays`."""

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        """The command that `submit` runs, for --dry-run; empty if it runs none."""

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        """Submit the files of `render`, which are in `folder`, all or nothing; return an id for each job."""

    def find(self, record: JobRecord) -> str | None:
        """The id of a job by its submission_id, if `submit` was interrupted before the id was saved."""

    def status(self, record: JobRecord) -> Status:
        """The status of a job with an id."""

    def wait_for_change(self, record: JobRecord, seconds: float) -> None:
        """Return after this time, or earlier if the cluster reports a change of the job."""

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        """The job's output in pieces; with `follow` until it is over, "" while there is nothing new."""

    def cancel(self, record: JobRecord) -> None:
        """End the job for good; if it runs, it saves first. Returns at once."""
