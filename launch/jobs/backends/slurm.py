"""Jobs on SLURM: a batch script that starts the ranks with srun and has SLURM start it again; sbatch, scontrol, scancel."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powernap.launch.jobs.backends.log_file import read_log
from powernap.launch.jobs.backends.slurm_json import JobLine, parse_jobs
from powernap.launch.jobs.cluster import SlurmCluster
from powernap.launch.jobs.description import JobError, Mount, UnknownOutcomeError, parse_mount
from powernap.launch.jobs.job import Job, JobFolder, Record, read_json
from powernap.launch.jobs.secret_values import check_sources
from powernap.launch.jobs.status import OVER, State, Status
from powernap.launch.jobs.units import format_duration, parse_duration
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.exit_codes import HOPELESS
from powernap.train.paths import expand

SCRIPT = "job.sbatch"
ARRAY = "array.json"  # an element's place in its array
ANSWERS_WITHIN = 60.0  # seconds; a controller that is down takes sbatch 9 and scontrol 18 to notice
EARLY = 60  # seconds that SLURM may send a warning too early
# Of the submitting shell's environment a job gets these, and the secrets that the profile names no file for.
PASSED = r"HOME|USER|LOGNAME|PATH|LANG|LC_\w+|SLURM_CONF|MLFLOW_\w+"
# What SLURM accepts and never starts.
NEVER = r"Partition(Node|Time)Limit|PartitionConfig|BadConstraints|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+"
# Refusals that come of asking for too much; only then is it worth asking what there is.
TOO_MUCH = r"satisf|configuration|node count|processors|time limit|memory|violates"
POLICY = {
    "Cpu": "job.cpus_per_process",
    "Mem": "job.memory",
    "Node": "job.nodes",
    "Wall": "job.time",
    "GRES": "job.device",
}
REFUSED = {  # words of a refusal -> the profile's field
    "reservation": "reservation",
    "qos": "qos",
    "account": "account",
    "partition": "partition",
    "feature": "constraint",
    "generic resource": "gpu_type",
}
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
}  # others wait: PENDING, CONFIGURING, REQUEUED, REQUEUE_HOLD, SPECIAL_EXIT, SUSPENDED, ...


class Slurm:
    arrays = True

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster

    def check(self, jobs: list[Job]) -> None:
        sizes = sorted({(job.description.nodes, job.description.processes_per_node) for job in jobs})
        if len(sizes) > 1:
            found = " and ".join(f"{nodes} x {each}" for nodes, each in sizes)
            raise JobError(
                f"the runs of a sweep need {found} nodes x processes, an array has one size: submit each alone"
            )
        job = jobs[0]  # in what follows, the jobs of a sweep are alike
        wanted, profile = job.description, self._cluster
        if wanted.image and profile.container == "none":
            raise JobError(f"job.image={wanted.image}: the profile has container=none; write pyxis or apptainer there")
        if wanted.mounts and not wanted.image:
            raise JobError("job.mounts without job.image: there is no container to mount them in; leave them out")
        if wanted.time_seconds is not None and wanted.time_seconds < _warning(job) + EARLY // 2:
            raise JobError(
                f"job.time={wanted.time} is over before job.grace={wanted.grace} and a minute for SLURM's delay begin: "
                f"write {format_duration(_warning(job) + EARLY)} or more"
            )
        if re.search(r"[\\\n,:]" if wanted.image else r"[\\\n]", str(job.work)):
            raise JobError(f"the folder {job.work!s:.100}: jobs cannot run in one with such a letter in its name")
        if wanted.image:
            for one in jobs:
                folder = one.work / one.run_folder
                if not _is_mounted(folder, _mounts(one)):
                    raise JobError(f"{folder} is not in the container: write job.mounts=[{one.recipe.run.root}:...]")
        check_sources(wanted.secrets, profile.secrets)

    def render(self, jobs: list[Job]) -> dict[str, str]:
        import jinja2  # late: for this command alone

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
            work=str(job.work),
            jobs=[{"folder": str(one.work / one.folder.path), "command": one.command()} for one in jobs],
            grace=description.grace_seconds,
            setup=self._cluster.setup,
            port=self._cluster.network.port,
            environment=_environment(job),
            secret_files={name: expand(files[name]) for name in description.secrets if name in files},
            container=self._cluster.container if description.image else "none",
            names=_names_inside(job),
            srun=self._srun(job),
            in_container=self._in_container(job),
            hopeless=HOPELESS,
            preempted=exit_codes.PREEMPTED,
            retries=description.retries,
        )
        return {SCRIPT: text}

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        # Paths stand here and not in the script, where they would need SLURM's own quoting; in one of a file, % begins a variable.
        work, log = jobs[0].work, "log-%a.txt" if len(jobs) > 1 else "log.txt"
        output = str(work / folder).replace("%", "%%") + f"/{log}"
        return ["sbatch", "--parsable", f"--chdir={work}", f"--output={output}", str(folder / SCRIPT)]

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        if len(jobs) > 1:
            for index, job in enumerate(jobs):
                place = {"token": jobs[0].token, "index": index}
                (job.folder.path / ARRAY).write_text(json.dumps(place) + "\n")
                job.folder.log.symlink_to(os.path.relpath(folder / f"log-{index}.txt", job.folder.path))
        secrets = {name: os.environ[name] for name in jobs[0].description.secrets if name not in self._cluster.secrets}
        try:
            done = _call(*self.command(jobs, folder), more=secrets)
        except UnknownOutcomeError as error:
            try:
                self._withdraw(jobs[0])
            except JobError:
                raise error from None
            raise JobError(str(error)) from None
        if done.returncode:
            raise JobError(self._refusal(done, jobs))
        id = done.stdout.strip().partition(";")[0]
        self._refuse_what_never_starts(id, jobs[0])
        return [f"{id}_{index}" for index in range(len(jobs))] if len(jobs) > 1 else [id]

    def find(self, record: Record) -> str | None:
        folder = record.own_folder
        if state := read_json(folder.state):
            return state["id"]
        place = read_json(folder.path / ARRAY)
        id = self._queued(place["token"] if place else record.token)
        return f"{id}_{place['index']}" if id and place else id

    def status(self, record: Record) -> Status:
        folder, id = record.own_folder, record.known_id
        own = read_json(folder.state) or {}
        line = self._scontrol(record)
        if line is None and own.get("state") not in OVER:
            line = self._sacct(id)
        if line is None:
            if own.get("state") in OVER:
                return _as_it_said(own)
            if folder.cancelled.exists():
                return Status("cancelled", restarts=own.get("restarts", 0))
            return Status("lost", f"SLURM does not know job {id} any more", own.get("restarts", 0))
        return _status(line, own, folder)

    def pause(self, record: Record, seconds: float) -> None:
        time.sleep(seconds)

    def logs(self, record: Record, follow: bool) -> Iterator[str]:
        return read_log(record.own_folder.log, follow, lambda: self.status(record).is_over)

    def cancel(self, record: Record) -> None:
        """Ranks that run get job.grace to save; the script ends them then. No requeue can come after this."""
        folder, id = record.own_folder, record.known_id
        folder.cancelled.touch()
        line = self._scontrol(record)
        if line is None or STATES.get(line.state) in OVER:
            return
        _call("scontrol", "update", f"JobId={id}", "Requeue=0")  # refused while it ends: then it is not started again
        if line.state == "RUNNING":
            done = _call("scancel", "--batch", "--signal=USR1", id)
        else:
            done = _call("scancel", id)
        if done.returncode and (still := self._scontrol(record)) and STATES.get(still.state) not in OVER:
            raise JobError(f"job {id}: scancel: {_said(done)}")

    def _options(self, jobs: list[Job]) -> list[str]:
        """sbatch's."""
        job, profile = jobs[0], self._cluster
        wanted = job.description
        options = {
            "job-name": os.path.commonprefix([job.name for job in jobs]).rstrip("-._") or job.name,
            "comment": f"powernap:{job.token}",
            "array": f"0-{len(jobs) - 1}" if len(jobs) > 1 else None,
            "nodes": wanted.nodes,
            "ntasks-per-node": wanted.processes_per_node,
            "cpus-per-task": wanted.cpus_per_process,
            "mem": f"{-(-wanted.memory_bytes // 2**20)}M" if wanted.memory_bytes else None,
            "time": format_duration(wanted.time_seconds) if wanted.time_seconds is not None else None,
            "signal": f"USR1@{_warning(job)}",  # to all ranks, not to this script
            "gpus-per-node": self._gpus(job),
            **{name: getattr(profile, name) for name in ("partition", "account", "qos", "reservation", "constraint")},
        }
        flags = ["--requeue", "--open-mode=append"] + ["--exclusive"] * profile.exclusive
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [*map(_directive, given), *flags, *profile.directives]

    def _gpus(self, job: Job) -> str | None:
        """All GPUs of a node's ranks are visible to each: its local number chooses."""
        if job.description.device != "gpu":
            return None
        count = str(job.description.processes_per_node)
        return f"{self._cluster.gpu_type}:{count}" if self._cluster.gpu_type else count

    def _srun(self, job: Job) -> list[str]:
        """srun's options: ranks in the order of the nodes, the first on the node that MASTER_ADDR names."""
        wanted = job.description
        options = {
            "nodes": wanted.nodes,
            "ntasks": job.nodes * job.processes_per_node,
            "ntasks-per-node": wanted.processes_per_node,
            "cpus-per-task": wanted.cpus_per_process,  # not taken over from sbatch since 22.05
            "distribution": "block",
            "kill-on-bad-exit": 1,
            "wait": 0,  # rank 0 may have more to do at the end
            "mpi": "none",
            "export": "ALL",
            "chdir": job.work,
        }
        if wanted.image and self._cluster.container == "pyxis":
            options |= {
                "container-image": wanted.image,
                "container-mounts": ",".join(map(_mount_option, _mounts(job))),
                "container-workdir": job.work,
                "container-env": ",".join(_names_inside(job)),
            }
        return [f"--{name}={value}" for name, value in options.items() if value is not None]

    def _in_container(self, job: Job) -> list[str]:
        if not job.description.image or self._cluster.container != "apptainer":
            return []
        mounts = [part for mount in _mounts(job) for part in ("--bind", _mount_option(mount))]
        gpus = ["--nv"] if job.description.device == "gpu" else []
        return ["apptainer", "exec", *gpus, *mounts, "--pwd", str(job.work), job.description.image]

    def _refusal(self, done: subprocess.CompletedProcess, jobs: list[Job]) -> str:
        """What sbatch said, all of it: the last line alone often leaves out what was too much."""
        lines = [line for line in done.stderr.splitlines() if re.match(r"sbatch: (error|fatal): ", line)]
        said = "; ".join(map(_bare, lines)) or _said(done)
        if "array" in said and (most := _setting("MaxArraySize")):
            return (
                f"SLURM refuses: {said}: the sweep has {len(jobs)} runs, an array of this cluster at most {most} "
                f"(MaxArraySize): leave values out, and submit them as another sweep"
            )
        if re.search(TOO_MUCH, said, re.IGNORECASE) and (cause := self._too_much(jobs[0], said)):
            return f"SLURM refuses: {said}: {cause}"
        for words, field in REFUSED.items():
            if words in said.lower():
                return f"SLURM refuses: {said}: see {field}={getattr(self._cluster, field) or 'null'} in the cluster's profile"
        return f"SLURM refuses: {said}"

    def _refuse_what_never_starts(self, id: str, job: Job) -> None:
        done = _call("squeue", "--noheader", f"--jobs={id}", "--format=%r")
        reason = done.stdout.split("\n")[0].strip()
        if re.fullmatch(NEVER, reason):
            _call("scancel", id)
            cause = self._too_much(job, reason) or "see job.nodes, job.time, and the profile's partition"
            raise JobError(f"SLURM would never start this job: {reason}: {cause}")

    def _too_much(self, job: Job, said: str) -> str:
        """The fields that ask for more than the partition has, each with what it has; "" if none is known."""
        wanted, each = job.description, job.processes_per_node
        asked = [match[1] for option in self._cluster.directives if (match := re.match(r"--partition=(.+)", option))]
        name = asked[-1] if asked else self._cluster.partition
        among = [f"--partition={name}"] if name else []
        done = _call("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G", *among)
        rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
        rows = rows if name else [row for row in rows if row[0].endswith("*")]
        found = []
        if rows:
            name = name or rows[0][0].rstrip("*")
            where = f"of partition {name}"
            cpus, memory = (max(int(row[column].rstrip("+")) for row in rows) for column in (2, 3))
            gpus = max(sum(map(int, re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", row[4]))) for row in rows)
            nodes = sum(int(row[1]) for row in rows)
            if wanted.memory_bytes and -(-wanted.memory_bytes // 2**20) > memory:
                found.append(f"job.memory={wanted.memory}: the largest node {where} has {memory} MiB")
            if (wanted.cpus_per_process or 1) * each > cpus:
                more = f"job.cpus_per_process={wanted.cpus_per_process} x " if wanted.cpus_per_process else ""
                found.append(f"{more}job.processes_per_node={each}: the largest node {where} has {cpus} CPUs")
            if wanted.device == "gpu" and each > gpus:
                found.append(f"job.processes_per_node={each} with a GPU each: the largest node {where} has {gpus}")
            if job.nodes > nodes:
                found.append(f"job.nodes={job.nodes}: partition {name} has {nodes}")
        shown = _call("scontrol", "show", "partition", "-o", name).stdout if name else ""
        limit = dict(re.findall(r"(\w+)=(\S+)", shown))
        for key, field, value, size in (
            ("MaxNodes", "job.nodes", job.nodes, job.nodes),
            ("MaxCPUsPerNode", "job.cpus_per_process", wanted.cpus_per_process, (wanted.cpus_per_process or 1) * each),
            ("MaxMemPerNode", "job.memory", wanted.memory, -(-(wanted.memory_bytes or 0) // 2**20)),
            ("MaxTime", "job.time", wanted.time, wanted.time_seconds or 0),
        ):
            most = limit.get(key, "UNLIMITED")
            if most != "UNLIMITED" and value and size > (parse_duration(most) if key == "MaxTime" else int(most)):
                found.append(f"{field}={value}: partition {name} has {key}={most}")
        if policy := re.search(r"(?:Assoc|QOS)(?:Max|Min)(Cpu|Mem|Node|Wall|GRES)\w*", said):
            found.append(
                f"see {POLICY[policy[1]]}: {policy[0]} is a limit of your account or QOS, which sacctmgr shows"
            )
        return "; ".join(found)

    def _withdraw(self, job: Job) -> None:
        if id := self._queued(job.token):
            _call("scancel", id)

    def _queued(self, token: str) -> str | None:
        """The number of the job, or of the whole array, that was submitted with a token and that SLURM still knows."""
        done = _answered("squeue", "--json")
        for line in _jobs(done.stdout):
            if line.comment == f"powernap:{token}":
                return line.id.partition("_")[0]
        return None

    def _scontrol(self, record: Record) -> JobLine | None:
        """What SLURM's controller has of a job; None once it has forgotten it, minutes after its end."""
        done = _call("scontrol", "show", "job", "-o", record.known_id)
        if done.returncode:
            if "Invalid job id" in done.stderr:
                return None
            raise JobError(f"SLURM does not answer: {_said(done)}")
        place = read_json(record.own_folder.path / ARRAY)
        line = done.stdout.splitlines()[0]
        if f"Comment=powernap:{place['token'] if place else record.token} " not in line + " ":
            return None  # numbers begin anew where the controller has lost its state
        return _parse_line(record.known_id, line)

    def _sacct(self, id: str) -> JobLine | None:
        """The same from accounting, where it is on."""
        if self._cluster.accounting is False or not shutil.which("sacct"):
            return None
        done = _call("sacct", "--json", f"--jobs={id}")
        if done.returncode or not done.stdout.strip():
            if self._cluster.accounting:
                raise JobError(f"sacct does not answer, as the profile's accounting=true says: {_said(done)}")
            return None
        found = [line for line in _jobs(done.stdout) if line.id == id]
        return found[-1] if found else None


def _warning(job: Job) -> int:
    """Seconds from the warning to the time limit."""
    return job.description.grace_seconds + EARLY


def _directive(option: str) -> str:
    """An option for a line of #SBATCH, which has quoting of its own."""
    return re.sub(r"([^\w.\-:/=,%@+])", r"\\\1", option)


def _environment(job: Job) -> dict[str, str]:
    threads = job.description.cpus_per_process
    own = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    # Code that is not installed belongs to the interpreter that runs it.
    alone = not job.description.image and not job.description.environment
    if alone and os.environ.get("PYTHONPATH"):
        own["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return own | job.environment


def _names_inside(job: Job) -> list[str]:
    """Variables that a container must take over."""
    return ["MASTER_ADDR", "MASTER_PORT", "PYTHONUNBUFFERED", *_environment(job), *job.description.secrets]


def _mounts(job: Job) -> list[Mount]:
    """Those of the description, and the folder that the job runs in."""
    given = [parse_mount(text) for text in job.description.mounts]
    return given if _is_mounted(job.work, given) else [Mount(str(job.work), str(job.work), False), *given]


def _is_mounted(path: Path, mounts: list[Mount]) -> bool:
    return any(path.is_relative_to(mount.target) for mount in mounts)


def _mount_option(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}" + ":ro" * mount.read_only


def _call(*command: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run one of SLURM's commands. Its environment is the job's, and has none of the variables that are options to it."""
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).is_file():
        raise JobError(f"SLURM_CONF={configuration}: there is no such file")
    kept = {name: value for name, value in os.environ.items() if re.fullmatch(PASSED, name)}
    try:
        return subprocess.run(
            command,
            env=kept | (more or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWERS_WITHIN,
        )
    except FileNotFoundError:
        raise JobError(f"SLURM's {command[0]} is not here: use a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UnknownOutcomeError(
            f"SLURM does not answer: {command[0]} took more than {ANSWERS_WITHIN:.0f} s"
        ) from None


def _answered(*command: str) -> subprocess.CompletedProcess:
    done = _call(*command)
    if done.returncode:
        raise JobError(f"SLURM does not answer: {_said(done)}")
    return done


def _jobs(text: str) -> list[JobLine]:
    try:
        return parse_jobs(text)
    except ValueError as error:
        raise JobError(f"SLURM's answer cannot be read: {error}") from None


def _said(done: subprocess.CompletedProcess) -> str:
    """The last thing that a command complained about."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return _bare(lines[-1])


def _bare(line: str) -> str:
    """A complaint without who complains."""
    return re.sub(r"^(\w+: )?((error|fatal): )?(Batch job submission failed: )?", "", line).strip()


def _setting(name: str) -> str | None:
    """Of SLURM's configuration."""
    found = re.search(rf"^{name}\s*=\s*(\S+)", _call("scontrol", "show", "config").stdout, re.MULTILINE)
    return found[1] if found else None


def _parse_line(id: str, line: str) -> JobLine:
    """A line of `scontrol show job -o`, of which values may hold blanks."""
    names = ("JobState", "Reason", "Restarts", "ExitCode", "NodeList")
    found = {name: re.search(rf" {name}=(.*?)(?= [\w/:&]+=|$)", line) for name in names}
    value = {name: match[1] if match else "" for name, match in found.items()}
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


def _as_it_said(own: dict[str, Any]) -> Status:
    return Status(own["state"], own["reason"], own["restarts"], own["exit_code"], own["nodes"])


def _status(line: JobLine, own: dict[str, Any], folder: JobFolder) -> Status:
    """
    Args:
        line: what SLURM says.
        own: what the script said last.
    """
    state, reason = STATES.get(line.state, "pending"), line.reason
    if state in OVER and own.get("state") in OVER:
        return _as_it_said(own)  # knows how often it failed
    if state == "failed" and line.state != "FAILED":
        reason = line.state
    elif state == "pending" and line.state != "PENDING":
        reason = f"{line.state} {reason}".strip()
    if folder.cancelled.exists():
        state = "cancelled" if state == "failed" else "stopping" if state not in OVER else state
    restarts = own.get("restarts", 0) if line.restarts is None else line.restarts
    return Status(state, reason, restarts, line.exit_code, line.nodes)
