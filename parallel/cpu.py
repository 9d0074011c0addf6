"""What the libraries underneath need to run without CUDA. Called once, before DeepSpeed is imported.

Everything else is the same code as on CUDA, with gloo for NCCL.
"""

import os

import torch


def prepare() -> None:
    """Set the stage for Megatron-core and DeepSpeed; does nothing that matters where CUDA is available."""
    if torch.cuda.is_available():
        return
    # DeepSpeed guesses its accelerator, and warns that it did.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its Muon is wrapped in torch.compile, which on CPUs calls a C++ compiler that need not be there.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    import deepspeed.ops

    # On CPUs DeepSpeed compiles a shared-memory all-reduce when it starts: a minute and a C++ compiler, for collectives
    # that gloo has already.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
