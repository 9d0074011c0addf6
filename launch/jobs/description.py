"""What a run asks of a cluster, whichever it is: the fields `job.*` of `powernap submit` and of a cluster's profile."""

import re
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from powernap.launch.jobs.units import parse_duration, parse_size
from powernap.model.errors import PowernapError
from powernap.model.section import Section
from powernap.train.run.secrets import mask_secrets

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# The launcher sets these for every process.
OURS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"}


class JobError(PowernapError):
    """A job that cannot be submitted, found or changed: one line that says what to write or do instead."""


class UnknownOutcomeError(JobError):
    """The scheduler did not answer: it may have the job. What was written down stays, so that it is found by its token."""


class Mount(NamedTuple):
    """A folder of the node inside a container."""

    source: str
    target: str
    read_only: bool


class JobDescription(Section):
    """One job. What is null is left to the layout or to the cluster."""

    nodes: int | None = Field(None, ge=1, description="machines; null: as many as the layout needs")
    processes_per_node: int | None = Field(
        None, ge=1, description="ranks on a node, one a GPU; null: all ranks on nodes that are given, else on one node"
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="what a rank computes on; gpu: one for each")
    cpus_per_process: int | None = Field(None, ge=1, description="CPU cores of a rank; null: the cluster's default")
    memory: str | None = Field(None, description="host memory of a node, such as 64GiB; null: the cluster's default")
    time: str | None = Field(None, description="limit of one start, such as 12h or 1-12:00:00; null: the cluster's own")
    grace: str = Field("2m", description="time to save between the warning and the limit, or after an eviction")
    retries: int = Field(
        3, ge=0, le=1000, description="starts after failures; those after a time limit or pre-emption do not count"
    )
    image: str | None = Field(
        None, pattern=r"^[\w./:@+\-]+$", description="container image that holds powernap; null: none"
    )
    environment: str | None = Field(
        None,
        pattern=r"^[^\n]+$",
        description="virtual environment on the cluster; null: the submitting one, or the image's",
    )
    mounts: list[str] = Field([], description="SOURCE:TARGET or SOURCE:TARGET:ro, folders of the node in the container")
    secrets: list[str] = Field(
        [], description="names of environment variables whose values the profile's `secrets` says where to find"
    )
    env: dict[str, str] = Field({}, description="environment variables that are no secrets")

    @field_validator("memory", "time", "grace")
    @classmethod
    def _quantity(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            parse_size(text) if info.field_name == "memory" else parse_duration(text)
        return text

    @field_validator("mounts")
    @classmethod
    def _places(cls, mounts: list[str]) -> list[str]:
        for mount in mounts:
            parse_mount(mount)
        return mounts

    @field_validator("environment")
    @classmethod
    def _whole_path(cls, path: str | None) -> str | None:
        if path is not None and path.startswith(("~", "$")):  # further on, it may be a folder's name
            raise ValueError("~ and $NAME are not expanded on the cluster: write the whole path, as the nodes see it")
        return path

    @field_validator("env", "secrets")
    @classmethod
    def _names(cls, names: dict[str, str] | list[str]) -> dict[str, str] | list[str]:
        for name in names:
            if not re.fullmatch(VARIABLE, name):
                raise ValueError(f"'{name}' is no name for an environment variable")
            if name in OURS:
                raise ValueError(f"{name} is set by the launcher")
        return names

    @model_validator(mode="after")
    def _no_secret_in_sight(self) -> Self:
        for name, value in self.env.items():
            if mask_secrets(f"{name}={value}") != f"{name}={value}":
                raise ValueError(
                    f"job.env.{name} looks like a secret, which files and logs would show: use job.secrets=[{name}]"
                )
        return self

    @property
    def memory_bytes(self) -> int | None:
        return parse_size(self.memory) if self.memory else None

    @property
    def time_seconds(self) -> int | None:
        return parse_duration(self.time) if self.time else None

    @property
    def grace_seconds(self) -> int:
        return parse_duration(self.grace)

    def resolved(self, ranks: int, layout: str) -> "JobDescription":
        """With nodes and processes_per_node that make up the `ranks` of `layout`.

        Raises:
            JobError: if they cannot.
        """
        nodes, each = self.nodes, self.processes_per_node
        if nodes is None:
            each = min(each or ranks, ranks)
            nodes = ranks // each
        elif each is None:
            each = ranks // nodes
        if nodes * each != ranks:
            fitting = ", ".join(f"{n} x {ranks // n}" for n in range(1, ranks + 1) if ranks % n == 0)
            raise JobError(
                f"{layout} needs {ranks} ranks, which job.nodes={self.nodes} with job.processes_per_node="
                f"{self.processes_per_node} do not make: nodes x processes may be {fitting}"
            )
        return self.model_copy(update={"nodes": nodes, "processes_per_node": each})


def parse_mount(text: str) -> Mount:
    """SOURCE:TARGET[:ro]"""
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    absolute = all(PurePosixPath(path).is_absolute() for path in (source, target))
    if not absolute or mode not in ("", "ro") or re.search(r"[\s,'\"\\$`]", source + target):
        raise ValueError(f"'{text}': write /source:/target or /source:/target:ro, without blanks, commas and quotes")
    return Mount(source, target, mode == "ro")
