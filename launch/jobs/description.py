"""What a run requests of any kind of cluster: the fields `job.*` of `powernap submit` and of a cluster's profile."""

import re
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from powernap.launch.jobs.units import parse_duration, parse_size
from powernap.model.errors import PowernapError
from powernap.model.section import Section
from powernap.train.run.secrets import mask_secrets

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# Variables that the launcher sets for every process.
RESERVED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"}


class JobError(PowernapError):
    """A job cannot be submitted, found or changed: one line that says what to write or do instead."""


class UnknownOutcomeError(JobError):
    """The scheduler did not answer and may have the job. Its record stays, so that it is found by its submission_id."""


class Mount(NamedTuple):
    """A folder of the node, mounted in a container."""

    source: str
    target: str
    read_only: bool


class JobDescription(Section):
    """One job. The layout or the cluster decides about fields that are null."""

    nodes: int | None = Field(None, ge=1, description="number of nodes; null: as many as the layout needs")
    processes_per_node: int | None = Field(
        None, ge=1, description="ranks per node, one per GPU; null: all ranks evenly on job.nodes, or on one node"
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="device of a rank; gpu: one GPU per rank")
    cpus_per_process: int | None = Field(None, ge=1, description="CPU cores per rank; null: the cluster's default")
    memory: str | None = Field(None, description="host memory per node, such as 64GiB; null: the cluster's default")
    time: str | None = Field(
        None, description="time limit of each start, such as 12h or 1-12:00:00; null: the cluster's default"
    )
    grace: str = Field("2m", description="time to save between the warning and the time limit, or after an eviction")
    retries: int = Field(
        3, ge=0, le=1000, description="restarts after failures; those after a time limit or preemption do not count"
    )
    image: str | None = Field(
        None, pattern=r"^[\w./:@+\-]+$", description="container image with powernap; null: no container"
    )
    environment: str | None = Field(
        None,
        pattern=r"^[^\n]+$",
        description="virtual environment on the cluster; null: the submitting one, or the image's",
    )
    mounts: list[str] = Field(
        [], description="SOURCE:TARGET or SOURCE:TARGET:ro, folders of the node to mount in the container"
    )
    secrets: list[str] = Field(
        [], description="names of environment variables with secret values; the profile's `secrets` has their sources"
    )
    env: dict[str, str] = Field({}, description="environment variables that are not secret")

    @field_validator("memory", "time", "grace")
    @classmethod
    def _quantity(cls, quantity: str | None, info: ValidationInfo) -> str | None:
        if quantity is not None:
            parse_size(quantity) if info.field_name == "memory" else parse_duration(quantity)
        return quantity

    @field_validator("mounts")
    @classmethod
    def _valid_mounts(cls, mounts: list[str]) -> list[str]:
        for mount in mounts:
            parse_mount(mount)
        return mounts

    @field_validator("environment")
    @classmethod
    def _whole_path(cls, path: str | None) -> str | None:
        if path is not None and path.startswith(("~", "$")):  # elsewhere in a path they may be part of a name
            raise ValueError("~ and $NAME are not expanded on the cluster: write the whole path, as the nodes see it")
        return path

    @field_validator("env", "secrets")
    @classmethod
    def _names(cls, names: dict[str, str] | list[str]) -> dict[str, str] | list[str]:
        for name in names:
            if not re.fullmatch(VARIABLE, name):
                raise ValueError(f"'{name}' is not a valid name of an environment variable")
            if name in RESERVED:
                raise ValueError(f"{name} is set by the launcher")
        return names

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
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
        """With nodes and processes_per_node set, whose product is `ranks`; the error names `layout`.

        Raises:
            JobError: if there are no such numbers.
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
                f"{self.processes_per_node} do not make up: nodes x processes may be {fitting}"
            )
        return self.model_copy(update={"nodes": nodes, "processes_per_node": each})


def parse_mount(text: str) -> Mount:
    """SOURCE:TARGET[:ro]"""
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    absolute = all(PurePosixPath(path).is_absolute() for path in (source, target))
    if not absolute or mode not in ("", "ro") or re.search(r"[\s,'\"\\$`]", source + target):
        raise ValueError(f"'{text}': write /source:/target or /source:/target:ro, without spaces, commas or quotes")

    return Mount(source, target, mode == "ro")
