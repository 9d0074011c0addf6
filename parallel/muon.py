"""Muon (Jordan et al. 2024) where ZeRO steps flat partitions and tensor ranks have slices of matrices.

Muon needs whole matrices, ZeRO's optimizer sees none. So the gradient of a matrix becomes its update first: momentum (Nesterov),
orthogonalised by five Newton-Schulz steps, times sqrt(max(1, rows / columns)). ZeRO then reduces it like a gradient, and the
optimizer subtracts it. Newton-Schulz commutes with a permutation of rows or columns: the slices of tensor ranks are joined as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from powernap.parallel.checkpoint.shards import split_of
from powernap.parallel.topology import Topology

MOMENTUM = "momentum_buffer"
STEPS = 5  # of Newton-Schulz


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps float32 partitions: groups with "muon" hold updates in place of gradients; the others take AdamW."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for partition in group["params"]:
                if partition.grad is None:
                    continue
                update = partition.grad if group["muon"] else self._adamw(partition, group)
                partition.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _adamw(self, partition: torch.Tensor, group: dict) -> torch.Tensor:
        from deepspeed.runtime.zero.muon.original_muon import adam_update

        state = self.state[partition]
        if "step" not in state:
            state |= {"exp_avg": torch.zeros_like(partition), "exp_avg_sq": torch.zeros_like(partition), "step": 0}
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        return adam_update(partition.grad, *moments, state["step"], group["betas"], group["eps"])


def orthogonalised(
    gradient: torch.Tensor, momentum: torch.Tensor, decay: float, parameter: torch.nn.Parameter, topology: Topology
) -> torch.Tensor:
    """The update of this rank's slice of a matrix; all tensor ranks call it together. Changes `gradient` and `momentum`.

    Args:
        gradient, momentum: [rows, columns] of the slice.
        decay: of the momentum.
        parameter: for its split, and its `projections` (model/part.py) if each is a matrix of its own.
    """
    sizes = getattr(parameter, "projections", ())
    momentum.lerp_(gradient, 1 - decay)
    update = gradient.lerp_(momentum, decay)
    if not sizes:
        return _whole_update(update, parameter, topology)
    # [heads, rows of a head, columns]; a matrix that lists each projection once is cut in their proportion.
    heads = max(1, len(update) // sum(sizes))
    share = len(update) // heads
    rows = [size * share // sum(sizes) for size in sizes]
    parts = update.view(heads, share, -1).split(rows, dim=1)
    done = [_whole_update(part.flatten(0, 1), parameter, topology).view_as(part) for part in parts]
    return torch.cat(done, dim=1).view_as(update)


def _whole_update(update: torch.Tensor, parameter: torch.nn.Parameter, topology: Topology) -> torch.Tensor:
    """This rank's slice of the update of a matrix, or of a projection in it, given its slice of the momentum."""
    split = split_of(parameter)
    if split is None or topology.tp_size == 1:
        return _orthogonal(update)
    slices = [torch.empty_like(update) for _ in range(topology.tp_size)]
    dist.all_gather(slices, update.contiguous(), group=topology.groups.tp)
    return _orthogonal(torch.cat(slices, split.dim)).chunk(topology.tp_size, split.dim)[topology.tp_rank]


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz with the numbers of DeepSpeed's `zeropower_via_newtonschulz5`, which torch compiles for every shape that it meets."""
    from deepspeed.runtime.zero.muon import original_muon

    rows, columns = matrix.shape
    x = matrix.to(original_muon.ns_compute_dtype("standard"))
    x = x.T if rows > columns else x
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = (x.T if rows > columns else x) * math.sqrt(max(1.0, rows / columns))
    return x.to(matrix.dtype)
