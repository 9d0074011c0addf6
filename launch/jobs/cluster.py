"""A cluster's profile: scheduler settings shared by all jobs. `--on NAME` reads clusters/NAME.yaml.

Search order: clusters/ in the working directory, ~/.config/powernap/clusters, the shipped launch/clusters.
"""

import inspect
import os
import re
from abc import abstractmethod
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from powernap.launch.jobs.description import VARIABLE, JobDescription, JobError
from powernap.launch.jobs.units import parse_duration, parse_size
from powernap.model.plugins import PluginError, plugins
from powernap.model.section import Section
from powernap.train.paths import PathError, expanded_path
from powernap.train.recipe_file import RecipeError, check, read_sections
from powernap.train.yaml_core import settle

if TYPE_CHECKING:
    from powernap.launch.jobs.backends import Backend

LABEL_KEY = r"^([a-z0-9]([a-z0-9.\-]*[a-z0-9])?/)?[A-Za-z0-9]([\w.\-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([\w.\-]{0,61}[A-Za-z0-9])?)?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.\-]*[a-z0-9])?$"
Word = Annotated[
    str, Field(pattern=r"^[\w][\w.\-:,=/&|*@+\[\]()!]*$", max_length=200)
]  # no spaces, quotes, $ or backticks


class Network(Section):
    """Communication between nodes."""

    interface: str | None = Field(
        None, pattern=r"^[\w.\-^=,]+$", description="network interface of NCCL and gloo, such as ib0; null: they choose"
    )
    nccl: dict[str, str] = Field({}, description="NCCL's settings, such as {NCCL_IB_HCA: mlx5}")
    port: int | None = Field(
        None, ge=1024, le=65535, description="port of the rendezvous; null: random, and another if taken"
    )

    @field_validator("nccl")
    @classmethod
    def _names(cls, settings: dict[str, str]) -> dict[str, str]:
        for name in settings:
            if not re.fullmatch(r"NCCL_[A-Z0-9_]+", name):
                raise ValueError(f"'{name}' is not an NCCL setting: their names begin with NCCL_")
        return settings

    @property
    def environment(self) -> dict[str, str]:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        return ({name: self.interface for name in names} if self.interface else {}) | self.nccl


class Profile(Section):
    """Fields of every kind of cluster. Kinds of other packages derive from it (docs/extending.md)."""

    # Where a job's files are: on this machine, on disks also mounted here, or where only the job's nodes see them.
    files: ClassVar[Literal["here", "shared", "elsewhere"]] = "shared"

    kind: str
    job: JobDescription = Field(JobDescription(), description="defaults of the job.* fields for jobs on this cluster")
    device_memory: str | None = Field(
        None, description="memory of a GPU, such as 80GB: layouts that do not fit are rejected; null: not checked"
    )
    network: Network = Network()

    @abstractmethod
    def backend(self) -> "Backend":
        """The backend that submits and queries jobs."""

    @field_validator("device_memory")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None:
            parse_size(size)
        return size


class _SecretsInFiles(Profile):
    secrets: dict[str, str] = Field(
        {},
        description="variable -> file with its value, readable by its owner only; other secrets come from the environment "
        "of `powernap submit`",
    )

    @field_validator("secrets")
    @classmethod
    def _names(cls, secrets: dict[str, str]) -> dict[str, str]:
        for name in secrets:
            if not re.fullmatch(VARIABLE, name):
                raise ValueError(f"'{name}' is not a valid name of an environment variable")
        return secrets


class LocalCluster(_SecretsInFiles):
    """This machine: a supervisor process, which outlives the terminal, starts torchrun."""

    files: ClassVar[Literal["here"]] = "here"

    kind: Literal["local"]

    def backend(self) -> "Backend":
        from powernap.launch.jobs.backends.local import Local

        return Local(self)


class SlurmCluster(_SecretsInFiles):
    """SLURM: sbatch."""

    kind: Literal["slurm"]
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Word | None = Field(None, description="required node features, such as 'h100&nvlink'")
    gpu_type: Word | None = Field(None, description="type in --gpus-per-node=TYPE:COUNT; null: any")
    exclusive: bool = Field(False, description="allocate whole nodes")
    container: Literal["none", "pyxis", "apptainer"] = "none"
    accounting: bool | None = Field(None, description="whether sacct works; null: try it")
    setup: list[str] = Field([], description="shell lines to run before srun, such as 'module load cuda/12.4'")
    directives: list[str] = Field([], description="additional sbatch options, such as --switches=1")

    def backend(self) -> "Backend":
        from powernap.launch.jobs.backends.slurm import Slurm

        return Slurm(self)

    @field_validator("directives")
    @classmethod
    def _options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"--[a-z][a-z\-]*(=[\w.\-:,=/&|*@+\[\]()%]+)?", option):
                raise ValueError(f"'{option}': write --option or --option=value, without spaces or quotes")
        return options


class SecretKey(Section):
    """A key of a Kubernetes Secret."""

    secret: str = Field(pattern=DNS_NAME)
    key: str = Field(pattern=r"^[\w.\-]+$")


class Storage(Section):
    """The volume that holds runs and shards on every node."""

    claim: str = Field(pattern=DNS_NAME, description="PersistentVolumeClaim, ReadWriteMany")
    path: str = Field("/workspace", pattern=r"^/[\w./\-]*$", description="mount path and working directory of jobs")


class Toleration(Section):
    """A node taint that jobs tolerate."""

    key: str | None = Field(None, pattern=LABEL_KEY)
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = Field(None, pattern=LABEL_VALUE)
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


# Fields of a Kubernetes profile by the names that earlier versions gave them, in profiles and in the records of jobs.
RENAMED = {"fabric": "device_resources", "spread": "spread_by", "together": "exclusive_topology", "keep": "ttl"}


class KubernetesCluster(Profile):
    """Kubernetes: a JobSet, or Kubeflow's TrainJob."""

    files: ClassVar[Literal["elsewhere"]] = "elsewhere"

    kind: Literal["kubernetes"]
    context: str | None = Field(None, description="kubeconfig context; null: the current one")
    namespace: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9\-]*[a-z0-9])?$", max_length=63)
    form: Literal["jobset", "trainjob"] = Field("jobset", description="API of the jobs: JobSet or Kubeflow Trainer")
    storage: Storage = Field(description="the volume that holds runs and shards: {claim: NAME, path: /workspace}")
    queue: str | None = Field(None, pattern=DNS_NAME, description="Kueue's LocalQueue; null: none")
    priority_class: str | None = Field(None, pattern=DNS_NAME)
    service_account: str | None = Field(None, pattern=DNS_NAME, description="null: the namespace's default")
    image_pull_secrets: list[Annotated[str, Field(pattern=DNS_NAME)]] = []
    gpu_resource: str = Field("nvidia.com/gpu", pattern=LABEL_KEY, description="resource name of GPUs")
    device_resources: dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[int, Field(ge=1)]] = Field(
        {}, description="network devices of each pod, such as {rdma/hca_shared_devices_a: 1}"
    )
    shared_memory: str = Field(
        "8GiB", description="size of a pod's /dev/shm, for NCCL and data workers; counts as its memory"
    )
    host_network: bool = Field(False, description="pods use the node's network, as some fabrics require")
    node_selector: dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[str, Field(pattern=LABEL_VALUE)]] = {}
    tolerations: list[Toleration] = []
    spread_by: str | None = Field(
        None,
        pattern=LABEL_KEY,
        description="node label over whose values pods are spread evenly, such as kubernetes.io/hostname",
    )
    exclusive_topology: str | None = Field(
        None,
        pattern=LABEL_KEY,
        description="node label, such as a rack's: each job gets one of its values to itself",
    )
    user: int = Field(1000, ge=1, description="user and group id of pods, and of new files on the volume")
    read_only_root: bool = Field(True, description="mount the image's file system read-only")
    ttl: str = Field("7d", description="time after which a finished JobSet is deleted")
    secrets: dict[str, SecretKey] = Field({}, description="variable -> the Secret and key that hold its value")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        """Where a field has both names, the old one stays and is reported as unknown."""
        if not isinstance(values, dict):
            return values
        return {old if (new := RENAMED.get(old, old)) in values else new: value for old, value in values.items()}

    def backend(self) -> "Backend":
        from powernap.launch.jobs.backends.kubernetes import Kubernetes

        return Kubernetes(self)

    @field_validator("shared_memory")
    @classmethod
    def _shared_memory_is_a_size(cls, size: str) -> str:
        parse_size(size)
        return size

    @field_validator("ttl")
    @classmethod
    def _ttl_is_a_duration(cls, duration: str) -> str:
        parse_duration(duration)
        return duration


BUILT_IN: dict[str, type[Profile]] = {"local": LocalCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster}


def kinds() -> dict[str, type[Profile]]:
    """Kind of cluster -> its profile class: Powernap's own, and those of installed packages (powernap.clusters)."""
    profiles = dict(BUILT_IN)
    for name, kind in plugins("clusters").items():
        is_profile = inspect.isclass(kind) and issubclass(kind, Profile) and not kind.__abstractmethods__
        if name in profiles or not is_profile:
            raise PluginError(
                f"entry point {name} of powernap.clusters: must be a new name for a class derived from "
                "powernap.launch.jobs.cluster.Profile, with a backend"
            )
        profiles[name] = kind
    return profiles


def find_cluster(name: str) -> Profile:
    """The profile with this name, or in this file.

    Raises:
        JobError: if there is none, or its fields are wrong.
    """
    path = expanded_path(name) if name.endswith((".yaml", ".yml")) else _known_clusters().get(name)
    if path is None or not path.is_file():
        raise JobError(
            f"no cluster '{name}': choose one of {', '.join(_known_clusters())}, or write clusters/{name}.yaml"
        )
    try:
        return parse_cluster(read_sections(path))
    except (RecipeError, JobError) as error:
        raise JobError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def parse_cluster(values: dict[str, Any]) -> Profile:
    kind, known = settle(values.get("kind")), kinds()
    if not isinstance(kind, str) or kind not in known:
        raise JobError(f"kind={kind}: write one of {', '.join(known)}")
    return check(known[kind], values)


def _known_clusters() -> dict[str, Path]:
    """Name -> file; the first in search order wins."""

    folders = [Path(str(resources.files("powernap.launch.clusters"))), Path("clusters")]
    with suppress(PathError):  # HOME is not set
        settings = expanded_path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
        folders.insert(1, settings / "powernap" / "clusters")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
