"""Jobs on this machine: a supervisor starts the run and restarts it as a scheduler would."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from powernap.launch.jobs.backends.log_file import read_log
from powernap.launch.jobs.backends.supervisor import is_supervised
from powernap.launch.jobs.cluster import LocalCluster
from powernap.launch.jobs.description import JobError
from powernap.launch.jobs.job import Job, JobRecord, read_json
from powernap.launch.jobs.secret_values import check_sources
from powernap.launch.jobs.status import OVER, Status
from powernap.train.yaml_core import dump

STARTS_WITHIN = 20.0  # seconds for a supervisor to write its first state


class Local:
    arrays = False

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def check(self, jobs: list[Job]) -> None:
        for job in jobs:
            description = job.description
            if description.nodes != 1:
                raise JobError(
                    f"job.nodes={description.nodes} on this machine: write job.nodes=1, or submit to a cluster"
                )
            for field in ("image", "mounts"):
                if getattr(description, field):
                    raise JobError(f"job.{field} on this machine: jobs here run without a container; leave it out")
            if description.time:
                raise JobError(
                    f"job.time={description.time} on this machine: jobs here have no time limit; leave it out"
                )
            check_sources(description.secrets, self._cluster.secrets)

    def render(self, jobs: list[Job]) -> dict[str, str]:
        (job,) = jobs
        plan = {
            "submission_id": job.submission_id,
            "command": job.command(),
            "env": job.environment,
            "secrets": {name: self._cluster.secrets.get(name) for name in job.description.secrets},
            "retries": job.description.retries,
            "grace_seconds": job.description.grace_seconds,
        }
        return {"local.yaml": dump(plan)}

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        return [sys.executable, "-m", "powernap.launch.jobs.backends.supervisor", str(folder)]

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                self.command(jobs, folder),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + STARTS_WITHIN
        while not (state := read_json(jobs[0].folder.state)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if not state:
            process.kill()
            last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise JobError(f"the job's supervisor did not start: {''.join(last) or 'it printed nothing'}")
        return [str(process.pid)]

    def find(self, record: JobRecord) -> str | None:
        state = read_json(record.folder.state)
        return str(state["pid"]) if state and state["submission_id"] == record.submission_id else None

    def status(self, record: JobRecord) -> Status:
        folder = record.folder.path
        state = read_json(record.folder.state)
        if state is None:
            return Status("lost", "its supervisor has left no state")
        if state["state"] not in OVER and not is_supervised(folder):
            state = read_json(record.folder.state) or state  # it may have ended in between
            if state["state"] not in OVER:
                return Status("lost", "its supervisor is gone, perhaps after a reboot", state["restarts"])
        return Status(state["state"], state["reason"], state["restarts"], state["exit_code"], "this machine")

    def wait_for_change(self, record: JobRecord, seconds: float) -> None:
        time.sleep(seconds)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        return read_log(record.folder.log, follow, lambda: self.status(record).is_over)

    def cancel(self, record: JobRecord) -> None:
        folder = record.folder
        folder.cancelled.touch()
        state = read_json(folder.state)
        with suppress(psutil.NoSuchProcess):
            # The pid may have been reused: the lock shows whether the supervisor is alive.

            if state and is_supervised(folder.path):
                psutil.Process(state["pid"]).terminate()
