"""Bitwise reproducible runs of a recipe.

On CPUs a run is reproducible without it: shapes, threads and ranks fix the order of every sum. On CUDA this has not run
yet. There it sets

* torch's deterministic kernels, with an error that names an operation without one. Other kernels, scatters among them,
  add with atomics, in arbitrary thread order;
* a fixed cuBLAS workspace, without which products on several streams may use another algorithm; cuBLAS reads it on
  start, so it is set before CUDA is initialized;
* cuDNN without benchmarking for the fastest algorithm;
* NCCL's ring algorithm, which adds the ranks in a fixed order. By default NCCL chooses by message and topology, and may
  reduce inside the switch.

It cannot control FLA's Triton kernels of the delta rule. In the sources that we have read (gated_delta_rule/chunk.py
and wy_fast.py, 2025; of no certain release) every block writes to its own location and torch adds the parts, without
atomics; but Triton's autotuner picks tiles and warps by timing, which may change from run to run, and with it the order
of a sum. TRITON_CACHE_DIR does not keep its choice unless TRITON_CACHE_AUTOTUNING=1 is set. Nor does it cover another
GPU, library version or layout.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "TRITON_CACHE_AUTOTUNING": "1"}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, the same operations on the same numbers give the same bits; enter before CUDA is initialized.

    Environment variables that are already set are kept.
    """
    if not wanted:
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    others: Any = torch.utils.deterministic  # torch does not type its switches
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        others.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    # Filling every buffer before use would cost time, and help only code that reads uninitialized memory.
    others.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        others.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3:]
