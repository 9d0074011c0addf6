"""A cluster's profile: scheduler settings shared by all jobs. `--on NAME` reads clusters/NAME.yaml.

Looked for in clusters/ below the working folder, in ~/.config/powernap/clusters, then among those shipped in launch/clusters.
"""

import inspect
import os
import re
from abc import abstractmethod
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

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
]  # nothing that a shell would take apart


class Network(Section):
    """How ranks of several nodes talk."""

    interface: str | None = Field(
        None, pattern=r"^[\w.\-^=,]+$", description="network interface of NCCL and gloo, such as ib0; null: they choose"
    )
    nccl: dict[str, str] = Field({}, description="NCCL's settings, such as {NCCL_IB_HCA: mlx5}")
    port: int | None = Field(None, ge=1024, le=65535, description="where ranks meet; null: drawn, and another if taken")

    @field_validator("nccl")
    @classmethod
    def _names(cls, settings: dict[str, str]) -> dict[str, str]:
        for name in settings:
            if not re.fullmatch(r"NCCL_[A-Z0-9_]+", name):
                raise ValueError(f"'{name}' is no setting of NCCL: they begin with NCCL_")
        return settings

    @property
    def environment(self) -> dict[str, str]:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        return ({name: self.interface for name in names} if self.interface else {}) | self.nccl


class Profile(Section):
    """What all kinds of cluster share. A kind of another package derives from it (docs/extending.md)."""

    # Where a job's files are: on this machine, on disks that are mounted here, too, or where only its nodes see them.
    files: ClassVar[Literal["here", "shared", "elsewhere"]] = "shared"

    kind: str
    job: JobDescription = Field(
        JobDescription(), description="the job.* fields that jobs here have if the command line says nothing"
    )
    device_memory: str | None = Field(
        None, description="memory of a GPU, such as 80GB: layouts that do not fit are refused; null: not checked"
    )
    network: Network = Network()

    @abstractmethod
    def backend(self) -> "Backend":
        """What submits to it and asks about jobs."""

    @field_validator("device_memory")
    @classmethod
    def _size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text


class _SecretsInFiles(Profile):
    secrets: dict[str, str] = Field(
        {},
        description="variable -> file that holds its value and that nobody else may read; those not named here are taken "
        "from the submitting shell's environment",
    )

    @field_validator("secrets")
    @classmethod
    def _names(cls, secrets: dict[str, str]) -> dict[str, str]:
        for name in secrets:
            if not re.fullmatch(VARIABLE, name):
                raise ValueError(f"'{name}' is no name for an environment variable")
        return secrets


class LocalCluster(_SecretsInFiles):
    """This machine: torchrun under a process of its own, which outlives the terminal."""

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
    constraint: Word | None = Field(None, description="features of nodes, such as 'h100&nvlink'")
    gpu_type: Word | None = Field(None, description="type in --gpus-per-node=TYPE:COUNT; null: any")
    exclusive: bool = Field(False, description="whole nodes")
    container: Literal["none", "pyxis", "apptainer"] = "none"
    accounting: bool | None = Field(None, description="whether sacct answers; null: ask it")
    setup: list[str] = Field([], description="lines of shell before srun, such as 'module load cuda/12.4'")
    directives: list[str] = Field([], description="further sbatch options, such as --switches=1")

    def backend(self) -> "Backend":
        from powernap.launch.jobs.backends.slurm import Slurm

        return Slurm(self)

    @field_validator("directives")
    @classmethod
    def _options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"--[a-z][a-z\-]*(=[\w.\-:,=/&|*@+\[\]()%]+)?", option):
                raise ValueError(f"'{option}': write --option or --option=value, without blanks and quotes")
        return options


class SecretKey(Section):
    """A key of a Kubernetes Secret."""

    secret: str = Field(pattern=DNS_NAME)
    key: str = Field(pattern=r"^[\w.\-]+$")


class Storage(Section):
    """The volume that holds runs and shards on every node."""

    claim: str = Field(pattern=DNS_NAME, description="PersistentVolumeClaim, ReadWriteMany")
    path: str = Field("/workspace", pattern=r"^/[\w./\-]*$", description="where it is mounted; jobs run in it")


class Toleration(Section):
    """A taint of nodes that jobs accept."""

    key: str | None = Field(None, pattern=LABEL_KEY)
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = Field(None, pattern=LABEL_VALUE)
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class KubernetesCluster(Profile):
    """Kubernetes: a JobSet, or Kubeflow's TrainJob."""

    files: ClassVar[Literal["elsewhere"]] = "elsewhere"

    kind: Literal["kubernetes"]
    context: str | None = Field(None, description="of the kubeconfig; null: the current one")
    namespace: str = Field("default", pattern=r"^[a-z0-9]([a-z0-9\-]*[a-z0-9])?$", max_length=63)
    form: Literal["jobset", "trainjob"] = Field("jobset", description="what is created: JobSet's or Kubeflow Trainer's")
    storage: Storage = Field(description="the volume that holds runs and shards: {claim: NAME, path: /workspace}")
    queue: str | None = Field(None, pattern=DNS_NAME, description="Kueue's LocalQueue; null: none")
    priority_class: str | None = Field(None, pattern=DNS_NAME)
    service_account: str | None = Field(None, pattern=DNS_NAME, description="null: the namespace's default")
    image_pull_secrets: list[Annotated[str, Field(pattern=DNS_NAME)]] = []
    gpu_resource: str = Field("nvidia.com/gpu", pattern=LABEL_KEY, description="what a GPU is called")
    fabric: dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[int, Field(ge=1)]] = Field(
        {}, description="network devices of a node's pod, such as {rdma/hca_shared_devices_a: 1}"
    )
    shared_memory: str = Field("8GiB", description="/dev/shm of a pod, part of its memory: NCCL and readers use it")
    host_network: bool = Field(False, description="pods use the node's network, as some fabrics want")
    node_selector: dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[str, Field(pattern=LABEL_VALUE)]] = {}
    tolerations: list[Toleration] = []
    spread: str | None = Field(
        None,
        pattern=LABEL_KEY,
        description="label of nodes over which pods are spread evenly, such as kubernetes.io/hostname",
    )
    together: str | None = Field(
        None,
        pattern=LABEL_KEY,
        description="label of nodes within one value of which a job stays, alone, such as a rack's",
    )
    user: int = Field(1000, ge=1, description="user and group that pods run as, and that own the volume's new files")
    read_only_root: bool = Field(True, description="the image's file system is not written to")
    keep: str = Field("7d", description="how long an ended job stays known")
    secrets: dict[str, SecretKey] = Field({}, description="variable -> the Secret and key that hold its value")

    def backend(self) -> "Backend":
        from powernap.launch.jobs.backends.kubernetes import Kubernetes

        return Kubernetes(self)

    @field_validator("shared_memory")
    @classmethod
    def _shared_memory_is_a_size(cls, text: str) -> str:
        parse_size(text)
        return text

    @field_validator("keep")
    @classmethod
    def _keep_is_a_duration(cls, text: str) -> str:
        parse_duration(text)
        return text


BUILT_IN: dict[str, type[Profile]] = {"local": LocalCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster}


def kinds() -> dict[str, type[Profile]]:
    """Kind of a cluster -> class of its profile: Powernap's own, and those of installed packages (powernap.clusters)."""
    found = dict(BUILT_IN)
    for name, kind in plugins("clusters").items():
        if name in found or not (inspect.isclass(kind) and issubclass(kind, Profile) and not kind.__abstractmethods__):
            raise PluginError(
                f"entry point {name} of powernap.clusters: must be a new name for a class derived from "
                "powernap.launch.jobs.cluster.Profile, with a backend"
            )
        found[name] = kind
    return found


def find_cluster(name: str) -> Profile:
    """The profile called `name`, or in the file `name`.

    Raises:
        JobError: if there is none, or its fields are wrong.
    """
    path = expanded_path(name) if name.endswith((".yaml", ".yml")) else _known_clusters().get(name)
    if path is None or not path.is_file():
        raise JobError(f"no cluster '{name}': known are {', '.join(_known_clusters())}; or write clusters/{name}.yaml")
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
    """Name -> file; the nearest wins."""
    folders = [Path(str(resources.files("powernap.launch.clusters"))), Path("clusters")]
    with suppress(PathError):  # without a home there are no settings
        settings = expanded_path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
        folders.insert(1, settings / "powernap" / "clusters")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
