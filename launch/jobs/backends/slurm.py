"""Jobs on SLURM: sbatch, scontrol, scancel, and a batch script that starts the ranks with srun and requeues itself."""

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powernap.launch.jobs.backends.log_file import read_log
from powernap.launch.jobs.backends.slurm_causes import refusal, why_never
from powernap.launch.jobs.backends.slurm_commands import call, checked_call, jobs_of, last_error
from powernap.launch.jobs.backends.slurm_json import JobLine
from powernap.launch.jobs.cluster import SlurmCluster
from powernap.launch.jobs.description import JobError, Mount, UnknownOutcomeError, parse_mount
from powernap.launch.jobs.job import Job, JobFolder, JobRecord, read_json
from powernap.launch.jobs.secret_values import check_sources
from powernap.launch.jobs.status import OVER, State, Status
from powernap.launch.jobs.units import format_duration
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.exit_codes import FATAL
from powernap.train.paths import expand

SCRIPT = "job.sbatch"
ARRAY = "array.json"  # in an array element's folder: the array's submission_id, the element's index
EARLY = 60  # seconds that SLURM may send a warning too early
STATES: dict[str, State] = {
    "RUNNING": "running",
    "SIGNALING": "running",
    "STOPPED": "running",
    "COMPLETING": "stopping",
    "STAGE_OUT": "stopping",
    "COMPLETED": "succeeded",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    **dict.fromkeys(
        ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE"), "failed"
    ),
}  # all others are pending: PENDING, CONFIGURING, REQUEUED, REQUEUE_HOLD, SPECIAL_EXIT, SUSPENDED, ...


class Slurm:
    arrays = True

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def check(self, jobs: list[Job]) -> None:
        sizes = sorted({(job.description.nodes, job.description.processes_per_node) for job in jobs})
        if len(sizes) > 1:
            text = " and ".join(f"{nodes} x {each}" for nodes, each in sizes)
            raise JobError(
                f"the runs of the sweep need {text} nodes x processes, but an array has one size: submit each alone"
            )
        job = jobs[0]  # the jobs of a sweep share what is checked below
        description, profile = job.description, self._cluster
        image, seconds = description.image, description.time_seconds
        if image and profile.container == "none":
            raise JobError(f"job.image={image}: the profile has container=none; write pyxis or apptainer there")
        if description.mounts and not image:
            raise JobError("job.mounts without job.image: there is no container to mount them in; leave them out")
        if seconds is not None and seconds < _warning(job) + EARLY // 2:
            raise JobError(
                f"job.time={description.time} is too short for job.grace={description.grace} and a minute of SLURM's "
                f"delay: write {format_duration(_warning(job) + EARLY)} or more"
            )
        forbidden = r"[\\\n,:]" if image else r"[\\\n]"
        if re.search(forbidden, str(job.submit_dir)):
            raise JobError(f"{job.submit_dir!s:.100}: jobs cannot run in a folder with such a character in its path")
        if image:
            mounts = _mounts(job)
            for folder in [one.submit_dir / folder for one in jobs for folder in one.written]:
                if not _is_mounted(folder, mounts):
                    raise JobError(f"{folder} is not in the container: write job.mounts=[{folder.parent}:...]")
        check_sources(description.secrets, profile.secrets)

    def render(self, jobs: list[Job]) -> dict[str, str]:
        import jinja2  # late: only this command needs it

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("powernap.launch.jobs.backends", "."),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"quote": shlex.quote, "join_quoted": shlex.join}
        job = jobs[0]
        description, files = job.description, self._cluster.secrets
        text = environment.get_template("job.sbatch.j2").render(
            options=self._options(jobs),
            submit_dir=str(job.submit_dir),
            jobs=[{"folder": str(one.submit_dir / one.folder.path), "command": one.command()} for one in jobs],
            grace=description.grace_seconds,
            setup=self._cluster.setup,
            port=self._cluster.network.port,
            environment=_environment(job),
            secret_files={name: expand(files[name]) for name in description.secrets if name in files},
            container=self._cluster.container if description.image else "none",
            names=_names_inside(job),
            srun=self._srun(job),
            in_container=self._in_container(job),
            fatal=FATAL,
            preempted=exit_codes.PREEMPTED,
            retries=description.retries,
        )
        return {SCRIPT: text}

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        # Paths are given here, not in the script, where they would need SLURM's own quoting. In --output, % begins a variable.
        submit_dir, log = jobs[0].submit_dir, "log-%a.txt" if len(jobs) > 1 else "log.txt"
        output = str(submit_dir / folder).replace("%", "%%") + f"/{log}"
        return ["sbatch", "--parsable", f"--chdir={submit_dir}", f"--output={output}", str(folder / SCRIPT)]

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        if len(jobs) > 1:
            for index, job in enumerate(jobs):
                element = {"submission_id": jobs[0].submission_id, "index": index}
                (job.folder.path / ARRAY).write_text(json.dumps(element) + "\n")
                job.folder.log.symlink_to(os.path.relpath(folder / f"log-{index}.txt", job.folder.path))
        secrets = {name: os.environ[name] for name in jobs[0].description.secrets if name not in self._cluster.secrets}
        try:
            done = call(*self.command(jobs, folder), more=secrets)
        except UnknownOutcomeError as error:
            try:
                self._withdraw(jobs[0])
            except JobError:
                raise error from None
            raise JobError(str(error)) from None
        if done.returncode:
            raise JobError(refusal(done, jobs, self._cluster))
        id = done.stdout.strip().partition(";")[0]
        if cause := why_never(id, jobs[0], self._cluster):
            call("scancel", id)
            raise JobError(f"SLURM would never start this job: {cause}")
        return [f"{id}_{index}" for index in range(len(jobs))] if len(jobs) > 1 else [id]

    def find(self, record: JobRecord) -> str | None:
        folder = record.folder
        if state := read_json(folder.state):
            return state["id"]
        element = read_json(folder.path / ARRAY)
        id = self._queued(element["submission_id"] if element else record.submission_id)
        return f"{id}_{element['index']}" if id and element else id

    def status(self, record: JobRecord) -> Status:
        folder, id = record.folder, record.known_id
        state = read_json(folder.state) or {}
        line = self._scontrol(record)
        if line is None and state.get("state") not in OVER:
            line = self._sacct(id)
        if line is None:
            if state.get("state") in OVER:
                return _status_of_script(state)
            if folder.cancelled.exists():
                return Status("cancelled", restarts=state.get("restarts", 0))
            return Status("lost", f"SLURM no longer knows job {id}", state.get("restarts", 0))
        return _status(line, state, folder)

    def wait_for_change(self, record: JobRecord, seconds: float) -> None:
        time.sleep(seconds)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        return read_log(record.folder.log, follow, lambda: self.status(record).is_over)

    def cancel(self, record: JobRecord) -> None:
        """Running ranks get job.grace to save, then the script ends them. Nothing requeues the job afterwards."""
        folder, id = record.folder, record.known_id
        folder.cancelled.touch()
        line = self._scontrol(record)
        if line is None or STATES.get(line.state) in OVER:
            return
        call("scontrol", "update", f"JobId={id}", "Requeue=0")  # fails for a job that is ending, which is not requeued
        if line.state == "RUNNING":
            done = call("scancel", "--batch", "--signal=USR1", id)
        else:
            done = call("scancel", id)
        if done.returncode and (still := self._scontrol(record)) and STATES.get(still.state) not in OVER:
            raise JobError(f"job {id}: scancel: {last_error(done)}")

    def _options(self, jobs: list[Job]) -> list[str]:
        """Options of sbatch."""
        job, profile = jobs[0], self._cluster
        description = job.description
        options = {
            "job-name": os.path.commonprefix([job.name for job in jobs]).rstrip("-._") or job.name,
            "comment": f"powernap:{job.submission_id}",
            "array": f"0-{len(jobs) - 1}" if len(jobs) > 1 else None,
            "nodes": description.nodes,
            "ntasks-per-node": description.processes_per_node,
            "cpus-per-task": description.cpus_per_process,
            "mem": f"{-(-description.memory_bytes // 2**20)}M" if description.memory_bytes else None,
            "time": format_duration(description.time_seconds) if description.time_seconds is not None else None,
            "signal": f"USR1@{_warning(job)}",  # to all ranks, not to this script
            "gpus-per-node": self._gpus(job),
            **{name: getattr(profile, name) for name in ("partition", "account", "qos", "reservation", "constraint")},
        }
        flags = ["--requeue", "--open-mode=append"] + ["--exclusive"] * profile.exclusive
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [*map(_directive, given), *flags, *profile.directives]

    def _gpus(self, job: Job) -> str | None:
        """The value of --gpus-per-node. Each rank sees all of its node's GPUs and picks one by its local rank."""
        if job.description.device != "gpu":
            return None
        count = str(job.description.processes_per_node)
        return f"{self._cluster.gpu_type}:{count}" if self._cluster.gpu_type else count

    def _srun(self, job: Job) -> list[str]:
        """Options of srun: ranks in the order of the nodes, the first on the node of MASTER_ADDR."""
        description = job.description
        options = {
            "nodes": description.nodes,
            "ntasks": job.nodes * job.processes_per_node,
            "ntasks-per-node": description.processes_per_node,
            "cpus-per-task": description.cpus_per_process,  # not inherited from sbatch since 22.05
            "distribution": "block",
            "kill-on-bad-exit": 1,
            "wait": 0,  # rank 0 may have more to do at the end
            "mpi": "none",
            "export": "ALL",
            "chdir": job.submit_dir,
        }
        if description.image and self._cluster.container == "pyxis":
            options |= {
                "container-image": description.image,
                "container-mounts": ",".join(map(_mount_option, _mounts(job))),
                "container-workdir": job.submit_dir,
                "container-env": ",".join(_names_inside(job)),
            }
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    def _in_container(self, job: Job) -> list[str]:
        if not job.description.image or self._cluster.container != "apptainer":
            return []
        mounts = [part for mount in _mounts(job) for part in ("--bind", _mount_option(mount))]
        gpus = ["--nv"] if job.description.device == "gpu" else []
        return ["apptainer", "exec", *gpus, *mounts, "--pwd", str(job.submit_dir), job.description.image]

    def _withdraw(self, job: Job) -> None:
        if id := self._queued(job.submission_id):
            call("scancel", id)

    def _queued(self, submission_id: str) -> str | None:
        """The id of a job, or of a whole array, by its submission_id; None if SLURM does not know it."""
        done = checked_call("squeue", "--json")
        for line in jobs_of(done.stdout):
            if line.comment == f"powernap:{submission_id}":
                return line.id.partition("_")[0]
        return None

    def _scontrol(self, record: JobRecord) -> JobLine | None:
        """The job by SLURM's controller; None once it has forgotten it, minutes after its end."""
        done = call("scontrol", "show", "job", "-o", record.known_id)
        if done.returncode:
            if "Invalid job id" in done.stderr:
                return None
            raise JobError(f"SLURM does not answer: {last_error(done)}")
        element = read_json(record.folder.path / ARRAY)
        submission_id = element["submission_id"] if element else record.submission_id
        line = done.stdout.splitlines()[0]
        if f"Comment=powernap:{submission_id} " not in line + " ":
            return None  # another job: a controller that lost its state reuses ids
        return _parse_line(record.known_id, line)

    def _sacct(self, id: str) -> JobLine | None:
        """The job by SLURM's accounting, if enabled."""
        if self._cluster.accounting is False or not shutil.which("sacct"):
            return None
        done = call("sacct", "--json", f"--jobs={id}")
        if done.returncode or not done.stdout.strip():
            if self._cluster.accounting:
                raise JobError(f"sacct does not answer, but the profile has accounting=true: {last_error(done)}")
            return None
        lines = [line for line in jobs_of(done.stdout) if line.id == id]
        return lines[-1] if lines else None


def _warning(job: Job) -> int:
    """Seconds from the warning to the time limit."""
    return job.description.grace_seconds + EARLY


def _directive(option: str) -> str:
    """An option for an #SBATCH line, which has its own quoting rules."""
    return re.sub(r"([^\w.\-:/=,%@+])", r"\\\1", option)


def _environment(job: Job) -> dict[str, str]:
    threads = job.description.cpus_per_process
    defaults = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    # The submitting interpreter also runs the job: it finds code that is not installed by the same PYTHONPATH.
    same_interpreter = not job.description.image and not job.description.environment
    if same_interpreter and os.environ.get("PYTHONPATH"):
        defaults["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return defaults | job.environment


def _names_inside(job: Job) -> list[str]:
    """Variables to pass into a container."""
    return ["MASTER_ADDR", "MASTER_PORT", "PYTHONUNBUFFERED", *_environment(job), *job.description.secrets]


def _mounts(job: Job) -> list[Mount]:
    """job.mounts, and the job's working directory."""
    mounts = [parse_mount(mount) for mount in job.description.mounts]
    if _is_mounted(job.submit_dir, mounts):
        return mounts
    return [Mount(str(job.submit_dir), str(job.submit_dir), False), *mounts]


def _is_mounted(path: Path, mounts: list[Mount]) -> bool:
    return any(path.is_relative_to(mount.target) for mount in mounts)


def _mount_option(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}" + ":ro" * mount.read_only


def _parse_line(id: str, line: str) -> JobLine:
    """A line of `scontrol show job -o`, whose values may contain spaces."""
    names = ("JobState", "Reason", "Restarts", "ExitCode", "NodeList")
    matches = {name: re.search(rf" {name}=(.*?)(?= [\w/:&]+=|$)", line) for name in names}
    value = {name: match[1] if match else "" for name, match in matches.items()}
    code, _, signal = value["ExitCode"].partition(":")
    state = value["JobState"].split()[0]  # also "CANCELLED by 1000"
    return JobLine(
        id=id,
        state=state,
        reason="" if value["Reason"] == "None" else value["Reason"],
        exit_code=(128 + int(signal) if int(signal) else int(code)) if STATES.get(state) in OVER else None,
        nodes="" if value["NodeList"] == "(null)" else value["NodeList"],
        comment="",
        restarts=int(value["Restarts"] or 0),
    )


def _status_of_script(state: dict[str, Any]) -> Status:
    return Status(state["state"], state["reason"], state["restarts"], state["exit_code"], state["nodes"])


def _status(line: JobLine, script: dict[str, Any], folder: JobFolder) -> Status:
    """
    Args:
        line: the job by SLURM.
        script: the state that the batch script wrote last.
    """
    state, reason = STATES.get(line.state, "pending"), line.reason
    if state in OVER and script.get("state") in OVER:
        return _status_of_script(script)  # its reason also counts the failures
    if state == "failed" and line.state != "FAILED":
        reason = line.state
    elif state == "pending" and line.state != "PENDING":
        reason = f"{line.state} {reason}".strip()
    if folder.cancelled.exists():
        state = "cancelled" if state == "failed" else "stopping" if state not in OVER else state
    restarts = script.get("restarts", 0) if line.restarts is None else line.restarts

    return Status(state, reason, restarts, line.exit_code, line.nodes)
