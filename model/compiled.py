"""torch.compile of what stands between a block's matrix products, as `train.compile` asks for it.

Functions of tensors and numbers alone, each compiled whole: no module, process group or state is in sight, so checkpoints, N
passes, tensor and pipeline ranks and ZeRO's hooks are as without. Each shape is compiled once, forward and backward.

Not whole blocks: dynamo stops at Megatron-core's linear layers and at every kernel all the same, and what it makes of the pieces saves
other tensors when a segment is recomputed than when it ran first, which torch.utils.checkpoint refuses (torch 2.13).
"""

import os

from powernap.model import norm, swiglu
from powernap.model.mixers import rotary

FUNCTIONS = ((norm, "rms_norm"), (swiglu, "gate_and_up"), (rotary, "rotate"))
MOST_VARIANTS = 64  # of one function: widths x lengths of windows x which inputs want gradients


def compile_functions(backend: str = "inductor") -> None:
    """From now on the functions compile themselves, in this process, when they are called with new shapes."""
    import torch._dynamo  # late: seconds

    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # parallel/cpu.py sets it for DeepSpeed, which is imported by now
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    for module, name in FUNCTIONS:
        setattr(module, name, torch.compile(getattr(module, name), backend=backend, dynamic=False, fullgraph=True))
