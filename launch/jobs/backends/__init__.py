"""What every kind of cluster can do; its profile (launch/jobs/cluster.py) says which backend does it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from powernap.launch.jobs.job import Job, Record
from powernap.launch.jobs.status import Status


class Backend(Protocol):
    """A kind of cluster. Every method may raise JobError: what the scheduler said, in one line."""

    arrays: bool  # whether several jobs are submitted as one

    def check(self, jobs: list[Job]) -> None:
        """Find what would be refused or fail, before anything is written."""

    def render(self, jobs: list[Job]) -> dict[str, str]:
        """File name -> text, exactly what `submit` submits; reads and writes nothing. Several jobs only with `arrays`."""

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        """What `submit` runs, for people to read; empty where the files say it all."""

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        """Submit what `render` said and `folder` holds, all or nothing; an id for each job."""

    def find(self, record: Record) -> str | None:
        """The id of a job by its token, where submitting was cut off before the id was written down."""

    def status(self, record: Record) -> Status:
        """How a job with an id stands."""

    def pause(self, record: Record, seconds: float) -> None:
        """Let at most so much time pass; less, where the cluster can tell that the job has changed."""

    def logs(self, record: Record, follow: bool) -> Iterator[str]:
        """What it printed, in pieces; with `follow` until it is over, "" while there is nothing new."""

    def cancel(self, record: Record) -> None:
        """End it, saved if it has started, and have nothing start it again. Returns at once."""
