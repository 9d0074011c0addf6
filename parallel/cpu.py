"""What the libraries underneath need to run without CUDA. Called once, before DeepSpeed is imported.

Everything else is the same code as on CUDA, with gloo for NCCL.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.overrides import TorchFunctionMode


def prepare() -> None:
    """Set the stage for Megatron-core and DeepSpeed; does nothing that matters where CUDA is available."""
    if torch.cuda.is_available():
        return
    # DeepSpeed guesses its accelerator, and warns that it did.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its Muon is wrapped in torch.compile, which on CPUs calls a C++ compiler that need not be there.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    # Megatron-core asks for the current CUDA device where it makes a buffer: sequence-parallel gathers, pipeline links.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    import deepspeed.ops

    # On CPUs DeepSpeed compiles a shared-memory all-reduce when it starts: a minute and a C++ compiler, for collectives
    # that gloo has already.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def in_place_of_cuda() -> AbstractContextManager:
    """Inside, tensors that Megatron-core's schedules make with device="cuda" are made on the CPU if there is no CUDA."""
    return nullcontext() if torch.cuda.is_available() else _CudaIsCpu()


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def as_it_is() -> AbstractContextManager:
    """Inside `in_place_of_cuda`: our own code, which names no CUDA device and need not be looked through."""
    return nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()
