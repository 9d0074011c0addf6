"""A job as Kubernetes objects: JobSet (or Kubeflow Trainer's TrainJob and TrainingRuntime), and a ConfigMap with a run's recipe.

One pod per node, each with torchrun's variables; the first pod is the rendezvous. Plain values; no server is contacted.
JobSet's fields: jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2; Trainer's: trainer.kubeflow.org/v1alpha1.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from powernap.launch.jobs.cluster import KubernetesCluster
from powernap.launch.jobs.description import JobError, parse_mount
from powernap.launch.jobs.job import BuildJob, Job, TrainingJob
from powernap.launch.jobs.units import parse_duration, parse_size
from powernap.parallel.liveness import exit_codes
from powernap.train.config import Recipe
from powernap.train.paths import is_expanded
from powernap.train.run.provenance import SUBMITTED_AS

SUBMISSION_LABEL = (
    "powernap.io/token"  # "token" is its old name: jobs and pods of earlier versions are found by it, too
)
CONTAINER = "node"  # name of the container and of the replicated job: Trainer requires the same for both
RECIPE = "/etc/powernap/recipe.yaml"
PORT = 29500  # torchrun's
LONGEST = 63  # characters of a DNS label
LARGEST = 2**20  # bytes of a ConfigMap's data, and two thirds of etcd's limit for an object
SETTLE = 60  # seconds on top of job.grace, for ranks to agree on a step and for processes to end
HOME = "/tmp"  # noqa: S108  in the pod's own volume: the image may be read-only
JOBSET = {"group": "jobset.x-k8s.io", "version": "v1alpha2", "plural": "jobsets"}
TRAINJOB = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
RUNTIME = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainingruntimes"}


def object_name(job: Job) -> str:
    """The DNS name of this submission, a prefix of its pods' names: mine-1 for the first submission of the run `mine`.

    Where characters had to be replaced, part of a hash keeps the names of runs distinct.
    """
    room = LONGEST - len(f"-{CONTAINER}-0-{job.nodes - 1}-abcde") - len(f"-{job.attempt}")
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if name != job.name or not name[:1].isalpha() or len(name) > room:
        mark = hashlib.sha256(job.name.encode()).hexdigest()[:6]
        name = f"r-{name}"[: room - 7].rstrip("-") + f"-{mark}"
    return f"{name}-{job.attempt}"


def objects(job: Job) -> list[dict[str, Any]]:
    """The objects to create, the job first: it owns the others, which are deleted with it."""
    name, labels, cluster = object_name(job), _labels(job), _profile(job)
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels}
    queued = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"recipe.yaml": job.recipe_text}}
    configs = [config] if job.recipe_text is not None else []
    # Kueue starts them itself.
    suspended = {"suspend": True} if cluster.queue else {}
    job_metadata = {**metadata, "labels": labels | queued}
    if cluster.exclusive_topology:
        job_metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": cluster.exclusive_topology}
    if cluster.form == "jobset":
        spec = {**suspended, "ttlSecondsAfterFinished": parse_duration(cluster.ttl), **_jobset(job, name)}
        return [{"apiVersion": _version(JOBSET), "kind": "JobSet", "metadata": job_metadata, "spec": spec}, *configs]
    template = {"spec": _jobset(job, name)}
    if annotations := job_metadata.pop("annotations", None):
        template["metadata"] = {"annotations": annotations}
    nodes = job.description.nodes
    return [
        {
            "apiVersion": _version(TRAINJOB),
            "kind": "TrainJob",
            "metadata": job_metadata,
            "spec": {
                **suspended,
                "runtimeRef": {"apiGroup": TRAINJOB["group"], "kind": "TrainingRuntime", "name": name},
                "trainer": {"numNodes": nodes},
            },
        },
        {
            "apiVersion": _version(RUNTIME),
            "kind": "TrainingRuntime",
            "metadata": metadata,
            # Without `torch` Trainer sets no variables in pods: they are ours, as in a JobSet.
            "spec": {"mlPolicy": {"numNodes": nodes}, "template": template},
        },
        *configs,
    ]


def _profile(job: Job) -> KubernetesCluster:
    assert isinstance(job.cluster, KubernetesCluster)
    return job.cluster


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "powernap", SUBMISSION_LABEL: job.submission_id}


def _version(kind: dict[str, str]) -> str:
    return f"{kind['group']}/{kind['version']}"


def _jobset(job: Job, name: str) -> dict[str, Any]:
    """A JobSet's spec: all pods start together, and restart together when one fails.

    The Job fails with its first pod (backoffLimit 0). Its reason is PodFailurePolicy after a disruption, or after a run that
    was asked to stop and saved, and DeadlineExceeded after job.time. Those restarts are not counted, all others are.
    """
    nodes, is_jobset = job.description.nodes, _profile(job).form == "jobset"
    uncounted = {
        "name": "uncounted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    saved = {"containerName": CONTAINER, "operator": "In", "values": [exit_codes.PREEMPTED]}
    limit = {"activeDeadlineSeconds": job.description.time_seconds} if job.description.time else {}
    pods = {
        **limit,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": saved},
            ]
        },
        "template": {
            "metadata": {"labels": _labels(job)},
            "spec": _pod(job, name),
        },
    }
    template: dict[str, Any] = {"spec": pods}
    if is_jobset:
        pods |= {"parallelism": nodes, "completions": nodes}
    else:  # Trainer sets them
        template["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    return {
        # Pods must be resolvable before they are ready: ranks meet by DNS name.
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {
            "maxRestarts": job.description.retries,
            "restartStrategy": "BlockingRecreate",
            "rules": [uncounted],
        },
        "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": template}],
    }


def _pod(job: Job, name: str) -> dict[str, Any]:
    cluster = _profile(job)
    optional = {
        "serviceAccountName": cluster.service_account,
        "priorityClassName": cluster.priority_class,
        "imagePullSecrets": [{"name": secret} for secret in cluster.image_pull_secrets],
        "nodeSelector": cluster.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations],
        "hostNetwork": cluster.host_network,
        "dnsPolicy": "ClusterFirstWithHostNet" if cluster.host_network else None,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": cluster.spread_by,
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {SUBMISSION_LABEL: job.submission_id}},
            }
        ]
        if cluster.spread_by
        else None,
    }
    volumes: dict[str, dict[str, Any]] = {
        "storage": {"persistentVolumeClaim": {"claimName": cluster.storage.claim}},
        **({"recipe": {"configMap": {"name": name}}} if job.recipe_text is not None else {}),
        "shm": {"emptyDir": {"medium": "Memory", "sizeLimit": _quantity(cluster.shared_memory)}},
        "tmp": {"emptyDir": {}},
    }
    paths = {"storage": cluster.storage.path, "recipe": RECIPE.rpartition("/")[0], "shm": "/dev/shm", "tmp": "/tmp"}  # noqa: S108
    mounts: list[dict[str, Any]] = [{"name": key, "mountPath": paths[key]} for key in volumes]
    for number, mount in enumerate(map(parse_mount, job.description.mounts)):
        volumes[f"mount-{number}"] = {"hostPath": {"path": mount.source}}
        mounts.append({"name": f"mount-{number}", "mountPath": mount.target, "readOnly": mount.read_only})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.description.grace_seconds + SETTLE,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **{key: value for key, value in optional.items() if value},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.user,
            "runAsGroup": cluster.user,
            "fsGroup": cluster.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, name, mounts)],
        "volumes": [{"name": key, **volume} for key, volume in volumes.items()],
    }


def _container(job: Job, name: str, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    cluster = _profile(job)
    description = job.description
    port = cluster.network.port or PORT
    values = {
        "PET_NNODES": str(description.nodes),
        "PET_MASTER_ADDR": f"{name}-{CONTAINER}-0-0.{name}",
        "PET_MASTER_PORT": str(port),
        "HOME": HOME,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(description.cpus_per_process or 1),
        **job.environment,
    }
    if SUBMITTED_AS in values:
        values[SUBMITTED_AS] = values[SUBMITTED_AS].replace("$(", "$$(")  # else Kubernetes takes it for a variable
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    references = {
        secret: {"name": cluster.secrets[secret].secret, "key": cluster.secrets[secret].key}
        for secret in description.secrets
    }
    resources: dict[str, Any] = dict(cluster.device_resources)
    if description.device == "gpu":
        resources[cluster.gpu_resource] = job.processes_per_node
    if description.cpus_per_process:
        resources["cpu"] = str(description.cpus_per_process * job.processes_per_node)
    if description.memory:
        resources["memory"] = _quantity(description.memory)
    # RDMA pins the memory that it registers.
    capabilities = {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if cluster.device_resources else {})
    return {
        "name": CONTAINER,
        "image": description.image,
        # Overrides the image's entry point: powernap handles signals itself.
        "command": job.command(RECIPE),
        "workingDir": cluster.storage.path,
        "env": [
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}},
            *({"name": key, "value": value} for key, value in values.items()),
            *({"name": key, "valueFrom": {"secretKeyRef": reference}} for key, reference in references.items()),
        ],
        "ports": [{"name": "master", "containerPort": port}],
        "resources": {"limits": resources, "requests": resources} if resources else {},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": cluster.read_only_root,
            "capabilities": capabilities,
        },
        "volumeMounts": mounts,
    }


def _quantity(size: str) -> str:
    """64GiB -> Kubernetes' 65536Mi."""
    return f"{-(-parse_size(size) // 2**20)}Mi"


def check(jobs: list[Job]) -> None:
    """Raise JobError for mistakes that can be found without a server."""
    for job in jobs:
        description, cluster = job.description, _profile(job)
        if not description.image:
            raise JobError("job.image is missing: write the image that `make image` built and your nodes can pull")
        if description.environment:
            raise JobError(f"job.environment={description.environment}: pods use the image's environment; leave it out")
        if missing := [name for name in description.secrets if name not in cluster.secrets]:
            raise JobError(
                f"job.secrets={missing[0]}: add its Secret to the cluster's profile, such as secrets: "
                f"{{{missing[0]}: {{secret: NAME, key: KEY}}}}"
            )
        if reserved := [name for name in (*description.env, *description.secrets) if name.startswith("PET_")]:
            raise JobError(f"job.env.{reserved[0]}: names that begin with PET_ are reserved for torchrun")
        if job.run_folder.is_absolute() or ".." in job.run_folder.parts:
            raise JobError(f"run.root={job.root}: write a folder relative to the volume, such as runs")
        if isinstance(job, TrainingJob):
            _check_size(job)
        if isinstance(job, BuildJob):
            _check_output(job)


def _check_output(job: BuildJob) -> None:
    """Raise JobError unless all parts see the folder of shards, which outlives them."""
    if not all(is_expanded(word) for word in job.words if "=" not in word):
        raise JobError("--build: ~ and $NAME mean other folders here than in pods: write the path as the pods see it")
    storage = Path(_profile(job).storage.path)
    mounts = map(parse_mount, job.description.mounts)
    kept = [storage, *(Path(mount.target) for mount in mounts if not mount.read_only)]
    if ".." in job.output.parts or not any((storage / job.output).is_relative_to(folder) for folder in kept):
        raise JobError(f"--build: {job.output} is not on the volume: write a folder relative to {storage}, or below it")


def _check_size(job: TrainingJob) -> None:
    size = len(job.recipe_text.encode())
    if size > LARGEST:
        field, field_size = _largest_field(job.recipe)
        cure = (
            "a pattern, such as 'data/train-*.tar' or 'train-{0000..4095}.tar'" if field.startswith("data.") else "less"
        )
        raise JobError(
            f"the recipe takes {_mib(size)}, {field} alone {_mib(field_size)}: pods read it from a ConfigMap, which holds "
            f"{_mib(LARGEST)}: write {cure}"
        )
    size = sum(len(f"{name}{value}".encode()) for name, value in job.environment.items())
    if size > LARGEST:
        raise JobError(f"job.env and network.nccl take {_mib(size)}: Kubernetes accepts {_mib(LARGEST)}")


def _largest_field(recipe: Recipe) -> tuple[str, int]:
    """A field's name, and its size in bytes."""

    sizes = {
        f"{section}.{name}": len(str(value).encode())
        for section, fields in recipe.model_dump(mode="json").items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    }
    return max(sizes.items(), key=lambda item: item[1])


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
