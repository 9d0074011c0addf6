"""Why SLURM rejects a job, or would never start it, and which field to change."""

import re
import subprocess

from powernap.launch.jobs.backends.slurm_commands import call, last_error, setting, without_prefix
from powernap.launch.jobs.cluster import SlurmCluster
from powernap.launch.jobs.job import Job
from powernap.launch.jobs.units import parse_duration

# Reasons of pending jobs that SLURM never starts.
NEVER = r"Partition(Node|Time)Limit|PartitionConfig|BadConstraints|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+"
# Rejections of jobs that ask for too much: then the partition's limits are worth a query.
TOO_MUCH = r"satisf|configuration|node count|processors|time limit|memory|violates"
POLICY = {
    "Cpu": "job.cpus_per_process",
    "Mem": "job.memory",
    "Node": "job.nodes",
    "Wall": "job.time",
    "GRES": "job.device",
}
REFUSED = {  # words of a rejection -> the profile's field
    "reservation": "reservation",
    "qos": "qos",
    "account": "account",
    "partition": "partition",
    "feature": "constraint",
    "generic resource": "gpu_type",
}


def refusal(done: subprocess.CompletedProcess, jobs: list[Job], cluster: SlurmCluster) -> str:
    """All errors of sbatch, and the field to change: the last line alone often omits which request was too large."""
    lines = [line for line in done.stderr.splitlines() if re.match(r"sbatch: (error|fatal): ", line)]
    errors = "; ".join(map(without_prefix, lines)) or last_error(done)
    if "array" in errors and (most := setting("MaxArraySize")):
        return (
            f"SLURM rejected the job: {errors}: the sweep has {len(jobs)} runs, an array on this cluster at most {most} "
            f"(MaxArraySize): leave values out, and submit them as another sweep"
        )
    if re.search(TOO_MUCH, errors, re.IGNORECASE) and (cause := _too_much(jobs[0], errors, cluster)):
        return f"SLURM rejected the job: {errors}: {cause}"
    for words, field in REFUSED.items():
        if words in errors.lower():
            value = getattr(cluster, field) or "null"
            return f"SLURM rejected the job: {errors}: see {field}={value} in the cluster's profile"
    return f"SLURM rejected the job: {errors}"


def why_never(id: str, job: Job, cluster: SlurmCluster) -> str | None:
    """Why SLURM, which has accepted the job, would never start it; None if it may."""
    reason = call("squeue", "--noheader", f"--jobs={id}", "--format=%r").stdout.split("\n")[0].strip()
    if not re.fullmatch(NEVER, reason):
        return None
    cause = _too_much(job, reason, cluster) or "see job.nodes, job.time, and the profile's partition"
    return f"{reason}: {cause}"


def _too_much(job: Job, error: str, cluster: SlurmCluster) -> str:
    """Each field that asks for more than the partition has, with the partition's limit; "" if none is known."""
    partitions = [match[1] for option in cluster.directives if (match := re.match(r"--partition=(.+)", option))]
    name = partitions[-1] if partitions else cluster.partition
    only = [f"--partition={name}"] if name else []
    done = call("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G", *only)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    rows = rows if name else [row for row in rows if row[0].endswith("*")]
    causes = []
    if rows:
        name = name or rows[0][0].rstrip("*")
        causes += _over_nodes(job, name, rows)
    if name:
        causes += _over_limits(job, name)
    if policy := re.search(r"(?:Assoc|QOS)(?:Max|Min)(Cpu|Mem|Node|Wall|GRES)\w*", error):
        causes.append(f"see {POLICY[policy[1]]}: {policy[0]} is a limit of your account or QOS: see sacctmgr")
    return "; ".join(causes)


def _over_nodes(job: Job, partition: str, rows: list[list[str]]) -> list[str]:
    """What exceeds the partition's nodes; rows: its kinds of node, as (partition, number, CPUs, MiB, generic resources)."""
    description, each = job.description, job.processes_per_node
    largest = f"the largest node of partition {partition} has"
    cpus, memory = (max(int(row[column].rstrip("+")) for row in rows) for column in (2, 3))
    gpus = max(sum(map(int, re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", row[4]))) for row in rows)
    nodes = sum(int(row[1]) for row in rows)
    causes = []
    if description.memory_bytes and -(-description.memory_bytes // 2**20) > memory:
        causes.append(f"job.memory={description.memory}: {largest} {memory} MiB")
    if (description.cpus_per_process or 1) * each > cpus:
        factor = f"job.cpus_per_process={description.cpus_per_process} x " if description.cpus_per_process else ""
        causes.append(f"{factor}job.processes_per_node={each}: {largest} {cpus} CPUs")
    if description.device == "gpu" and each > gpus:
        causes.append(f"job.processes_per_node={each} with a GPU each: {largest} {gpus}")
    if job.nodes > nodes:
        causes.append(f"job.nodes={job.nodes}: partition {partition} has {nodes}")
    return causes


def _over_limits(job: Job, partition: str) -> list[str]:
    """What exceeds the limits that the partition's administrator has set."""
    description, cpus = job.description, job.description.cpus_per_process
    properties = call("scontrol", "show", "partition", "-o", partition).stdout
    limits = dict(re.findall(r"(\w+)=(\S+)", properties))
    causes = []
    for key, field, value, size in (
        ("MaxNodes", "job.nodes", job.nodes, job.nodes),
        ("MaxCPUsPerNode", "job.cpus_per_process", cpus, (cpus or 1) * job.processes_per_node),
        ("MaxMemPerNode", "job.memory", description.memory, -(-(description.memory_bytes or 0) // 2**20)),
        ("MaxTime", "job.time", description.time, description.time_seconds or 0),
    ):
        limit = limits.get(key, "UNLIMITED")
        if limit != "UNLIMITED" and value and size > (parse_duration(limit) if key == "MaxTime" else int(limit)):
            causes.append(f"{field}={value}: partition {partition} has {key}={limit}")
    return causes
