"""Shims that the underlying libraries need to run without CUDA. Applied once, before DeepSpeed is imported.

Everything else is the same code as on CUDA, with gloo in place of NCCL.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


def prepare() -> None:
    """Prepare Megatron-core and DeepSpeed; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        return
    # DeepSpeed guesses its accelerator, and warns that it did.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its Muon is wrapped in torch.compile, which on CPUs calls a C++ compiler that may be missing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    # Megatron-core asks for the current CUDA device where it makes a buffer: sequence-parallel gathers, pipeline links.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    with without_mlflow():
        import deepspeed.ops

    # On CPUs DeepSpeed compiles a shared-memory all-reduce when it starts: a minute and a C++ compiler, for collectives
    # that gloo already has.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def without_mlflow() -> Iterator[None]:
    """Inside, DeepSpeed is imported without MLflow, which only its autotuner uses: a third of all that a rank imports.

    The rank that tracks imports MLflow itself.
    """
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    try:
        yield
    finally:
        if absent:
            del sys.modules["mlflow"]


def in_place_of_cuda() -> AbstractContextManager:
    """Inside, without CUDA, tensors that Megatron-core's schedules create with device="cuda" are created on the CPU."""
    return nullcontext() if torch.cuda.is_available() else _CudaIsCpu()


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def as_it_is() -> AbstractContextManager:
    """For our own code inside `in_place_of_cuda`: it names no CUDA device, so its calls are not intercepted."""
    return nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()


@contextmanager
def one_group_for_each_set_of_ranks() -> Iterator[None]:
    """Inside, `dist.new_group` returns the group that it made before where the ranks are the same.

    Megatron-core makes a group for each of twenty kinds of parallelism, most of the same few ranks. A group of gloo has
    three threads, one of which wakes 100 times a second: of twenty groups they take more CPU time than a tiny model's step.
    """
    new_group, made = dist.new_group, {}

    def new_or_made(ranks, **options):
        if (key := tuple(ranks)) not in made:
            made[key] = new_group(ranks, **options)
        return made[key]

    dist.new_group = new_or_made  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.new_group = new_group
