"""A job as Kubernetes objects: JobSet (or Kubeflow Trainer's TrainJob and TrainingRuntime), and a ConfigMap with the recipe.

One pod a node, each with torchrun's variables; the first pod is where ranks meet. Plain values, nothing is asked of a server.
JobSet's fields: jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2; Trainer's: trainer.kubeflow.org/v1alpha1.
"""

import hashlib
import re
from typing import Any

from powernap.launch.jobs.cluster import KubernetesCluster
from powernap.launch.jobs.description import JobError, parse_mount
from powernap.launch.jobs.job import Job
from powernap.launch.jobs.units import parse_duration, parse_size
from powernap.parallel.liveness import exit_codes
from powernap.train.config import Recipe

TOKEN = "powernap.io/token"  # a label: what find() looks for
CONTAINER = "node"  # of pods, and the replicated job: Trainer insists on the same name
RECIPE = "/etc/powernap/recipe.yaml"
PORT = 29500  # torchrun's
LONGEST = 63  # of a name in DNS
LARGEST = 2**20  # bytes of a ConfigMap's data, and two thirds of what etcd takes of any object
SETTLE = 60  # seconds beside job.grace, for ranks to agree on a step and for processes to end
HOME = "/tmp"  # noqa: S108  a folder of the pod's own: the image's may be read-only
JOBSET = {"group": "jobset.x-k8s.io", "version": "v1alpha2", "plural": "jobsets"}
TRAINJOB = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
RUNTIME = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainingruntimes"}


def object_name(job: Job) -> str:
    """A name in DNS for this submission, which pods' names begin with: mine-1 for the first of the run `mine`.

    Where letters had to go, a part of a hash keeps runs apart.
    """
    room = LONGEST - len(f"-{CONTAINER}-0-{job.nodes - 1}-abcde") - len(f"-{job.attempt}")
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    if name != job.name or not name[:1].isalpha() or len(name) > room:
        mark = hashlib.sha256(job.name.encode()).hexdigest()[:6]
        name = f"r-{name}"[: room - 7].rstrip("-") + f"-{mark}"
    return f"{name}-{job.attempt}"


def objects(job: Job) -> list[dict[str, Any]]:
    """What to create, the job itself first: the others belong to it, and are deleted with it."""
    name, labels = object_name(job), {"app.kubernetes.io/managed-by": "powernap", TOKEN: job.token}
    cluster = _profile(job)
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels}
    queued = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"recipe.yaml": job.recipe_text}}
    # Kueue wants to start them itself.
    suspended = {"suspend": True} if cluster.queue else {}
    own = {**metadata, "labels": labels | queued}
    if cluster.together:
        own["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": cluster.together}
    if cluster.form == "jobset":
        spec = {**suspended, "ttlSecondsAfterFinished": parse_duration(cluster.keep), **_jobset(job, name)}
        return [{"apiVersion": _version(JOBSET), "kind": "JobSet", "metadata": own, "spec": spec}, config]
    template = {"spec": _jobset(job, name)}
    if annotations := own.pop("annotations", None):
        template["metadata"] = {"annotations": annotations}
    nodes = job.description.nodes
    return [
        {
            "apiVersion": _version(TRAINJOB),
            "kind": "TrainJob",
            "metadata": own,
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
            # Without `torch` Trainer leaves the pods' variables to us, the same as in a JobSet.
            "spec": {"mlPolicy": {"numNodes": nodes}, "template": template},
        },
        config,
    ]


def _profile(job: Job) -> KubernetesCluster:
    assert isinstance(job.cluster, KubernetesCluster)
    return job.cluster


def _version(kind: dict[str, str]) -> str:
    return f"{kind['group']}/{kind['version']}"


def _jobset(job: Job, name: str) -> dict[str, Any]:
    """A JobSet's spec: all pods start together, and again together when one fails.

    Job gives up at the first pod that fails (backoffLimit 0), with the reason PodFailurePolicy where that was a disruption or
    a run that was asked to stop and saved, DeadlineExceeded after job.time. Those restarts are not counted, all others are.
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
            "metadata": {"labels": {"app.kubernetes.io/managed-by": "powernap", TOKEN: job.token}},
            "spec": _pod(job, name),
        },
    }
    template: dict[str, Any] = {"spec": pods}
    if is_jobset:
        pods |= {"parallelism": nodes, "completions": nodes}
    else:  # Trainer sets them
        template["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    return {
        # A pod's name must be known before it is ready: it is when all have met.
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
                "topologyKey": cluster.spread,
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {TOKEN: job.token}},
            }
        ]
        if cluster.spread
        else None,
    }
    volumes: dict[str, dict[str, Any]] = {
        "storage": {"persistentVolumeClaim": {"claimName": cluster.storage.claim}},
        "recipe": {"configMap": {"name": name}},
        "shm": {"emptyDir": {"medium": "Memory", "sizeLimit": _quantity(cluster.shared_memory)}},
        "tmp": {"emptyDir": {}},
    }
    places = {"storage": cluster.storage.path, "recipe": RECIPE.rpartition("/")[0], "shm": "/dev/shm", "tmp": "/tmp"}  # noqa: S108
    mounts: list[dict[str, Any]] = [{"name": key, "mountPath": place} for key, place in places.items()]
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
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    references = {
        secret: {"name": cluster.secrets[secret].secret, "key": cluster.secrets[secret].key}
        for secret in description.secrets
    }
    resources: dict[str, Any] = dict(cluster.fabric)
    if description.device == "gpu":
        resources[cluster.gpu_resource] = job.processes_per_node
    if description.cpus_per_process:
        resources["cpu"] = str(description.cpus_per_process * job.processes_per_node)
    if description.memory:
        resources["memory"] = _quantity(description.memory)
    # Fabrics register memory, which must not be swapped out.
    capabilities = {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if cluster.fabric else {})
    return {
        "name": CONTAINER,
        "image": description.image,
        # Its own words, whatever the image's entry point: powernap listens to signals itself.
        "command": job.command(RECIPE),
        "workingDir": cluster.storage.path,
        "env": [
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}},
            *({"name": key, "value": value} for key, value in values.items()),
            *({"name": key, "valueFrom": {"secretKeyRef": where}} for key, where in references.items()),
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
    """Raise JobError for what no server would be needed to refuse."""
    for job in jobs:
        wanted, cluster = job.description, _profile(job)
        if not wanted.image:
            raise JobError("job.image is missing: write the image that `make image` built and your nodes can fetch")
        if wanted.environment:
            raise JobError(f"job.environment={wanted.environment}: pods run the image's own; leave it out")
        if missing := [name for name in wanted.secrets if name not in cluster.secrets]:
            raise JobError(
                f"job.secrets={missing[0]}: write where it is into the cluster's profile, such as secrets: "
                f"{{{missing[0]}: {{secret: NAME, key: KEY}}}}"
            )
        if taken := [name for name in (*wanted.env, *wanted.secrets) if name.startswith("PET_")]:
            raise JobError(f"job.env.{taken[0]}: names that begin with PET_ are torchrun's")
        if job.run_folder.is_absolute() or ".." in job.run_folder.parts:
            raise JobError(f"run.root={job.recipe.run.root}: write a folder relative to the volume, such as runs")
        _check_size(job)


def _check_size(job: Job) -> None:
    size = len(job.recipe_text.encode())
    if size > LARGEST:
        field, its = _largest_field(job.recipe)
        cure = (
            "a pattern, such as 'data/train-*.tar' or 'train-{0000..4095}.tar'" if field.startswith("data.") else "less"
        )
        raise JobError(
            f"the recipe takes {_mib(size)}, {field} alone {_mib(its)}: pods read it from a ConfigMap, which holds "
            f"{_mib(LARGEST)}: write {cure}"
        )
    values = sum(len(f"{name}{value}".encode()) for name, value in job.environment.items())
    if values > LARGEST:
        raise JobError(f"job.env and network.nccl take {_mib(values)}: Kubernetes takes {_mib(LARGEST)} of them")


def _largest_field(recipe: Recipe) -> tuple[str, int]:
    """A field by name, and its bytes."""
    sizes = {
        f"{section}.{name}": len(str(value).encode())
        for section, fields in recipe.model_dump(mode="json").items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    }
    return max(sizes.items(), key=lambda item: item[1])


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
