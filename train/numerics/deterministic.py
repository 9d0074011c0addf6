"""The same bits in every run of a recipe.

On CPUs a run has that without it: the order of every sum is settled by shapes, threads and ranks. On CUDA this has not run
yet. There it asks for

* torch's deterministic kernels, an error naming the operation where one has none. Without them some, scatters among
  them, add up with atomics, in the order in which threads happen to come;
* cuBLAS with a fixed workspace, without which products on several streams may take another algorithm; it reads that when
  it starts, so it is set before CUDA is;
* cuDNN without trying out which algorithm is fastest;
* NCCL's rings, whose order of adding the ranks is fixed. Left to itself it chooses by message and topology, and may
  reduce inside the switch.

What it cannot ask for: FLA's Triton kernels of the delta rule. In the sources that we have read (gated_delta_rule/chunk.py
and wy_fast.py, 2025; not those of a certain release) every block writes a place of its own and parts are added by torch,
no atomics; but Triton's autotuner picks their tiles and warps by time, which may change from run to run, and with it the
order of a sum. TRITON_CACHE_DIR does not keep its choice unless TRITON_CACHE_AUTOTUNING=1 is set. Nor does it cover
another GPU, library version or layout.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "TRITON_CACHE_AUTOTUNING": "1"}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, the same operations on the same numbers give the same bits; entered before CUDA starts.

    What the environment says already stays.
    """
    if not wanted:
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    others: Any = torch.utils.deterministic  # torch types no switch there
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        others.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    # Filling every buffer before use would cost time, and help only code that reads what nobody wrote.
    others.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        others.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3:]
