"""Checkpoints, first version: weights once, every rank's share of the optimizer, loadable in the same layout.

A folder step_00000500/ holds model.pt (whole parameters by name), optimizer-rank*.pt (ZeRO partitions), under sleep.carry
memory-rank*.pt (fast weights of each rank's sequences, heads and blocks), and state.json. It is
written under a temporary name and renamed when every rank is done: a folder without `.tmp` is whole.
"""

import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from powernap.model.fast_weights import Memory
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology
from powernap.parallel.zero import ZeroOptimizer

_NAME = re.compile(r"step_(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line."""


def save(
    folder: Path,
    step: int,
    stage: HybridStage,
    zero: ZeroOptimizer,
    topology: Topology,
    data: dict | None = None,
    memory: Memory | None = None,
) -> Path:
    """Write the state after `step` into `folder`; all ranks call it, each writes its share.

    Args:
        data: where the stream of samples goes on, as JSON; the main rank's counts.
        memory: what this rank's sequences carry to the next step, if they do.
    """
    final = folder / f"step_{step:08d}"
    unfinished = final.with_suffix(".tmp")
    if topology.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    topology.barrier()
    torch.save(zero.state_dict(), unfinished / f"optimizer-rank{topology.rank}.pt")
    if memory is not None:
        torch.save(list(memory), unfinished / f"memory-rank{topology.rank}.pt")
    parameters = whole_parameters(stage, zero, topology)
    if topology.is_main:
        torch.save(parameters, unfinished / "model.pt")
        state = {"step": step, "layout": layout_of(zero, topology), "data": data}
        (unfinished / "state.json").write_text(json.dumps(state))
    topology.barrier()
    if topology.is_main:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    topology.barrier()
    return final


def layout_of(zero: ZeroOptimizer, topology: Topology) -> dict[str, int]:
    """What must not change between saving and loading, under the recipe's names."""
    sizes = {"data": topology.data_size, "tensor": topology.tensor_size, "pipeline": topology.stages}
    return {**{f"parallel.{name}": size for name, size in sizes.items()}, "zero.stage": zero.level}


def whole_parameters(stage: HybridStage, zero: ZeroOptimizer, topology: Topology) -> dict[str, torch.Tensor] | None:
    """Every parameter of the model by name, on the main rank; None elsewhere. All ranks call it."""
    own = {}
    with zero.gathered_parameters():
        for name, parameter in stage.named_parameters():
            where = None
            if getattr(parameter, "tensor_model_parallel", False) and topology.tensor_size > 1:
                where = (parameter.partition_dim, parameter.partition_stride)
            own[stage.global_name(name)] = (where, parameter.detach().cpu().clone())
    if topology.data_rank != 0:
        return None
    found = [None] * topology.groups.mp.size() if topology.is_main else None
    dist.gather_object(own, found, group=topology.groups.mp, group_dst=0)
    if not topology.is_main:
        return None
    names = dict.fromkeys(name for part in found for name in part)
    return {name: _join([part[name] for part in found if name in part], topology.tensor_size) for name in names}


def _join(parts: list[tuple[tuple[int, int] | None, torch.Tensor]], shards: int) -> torch.Tensor:
    """The whole of what the tensor ranks hold of a parameter, in the order Megatron-core splits it."""
    where, first = parts[0]
    if where is None:
        return first
    dim, stride = where
    pieces = [shard.chunk(stride, dim) for _, shard in parts[:shards]]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)


def newest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, None if there is none."""
    found = [path for path in folder.glob("step_*") if _NAME.match(path.name)]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint."""
    return int(_NAME.match(checkpoint.name).group(1))


def load(checkpoint: Path, zero: ZeroOptimizer, topology: Topology) -> tuple[int, dict | None]:
    """Restore this rank's share of the optimizer and, from it, the weights; return the step and the `data` saved."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["layout"] != layout_of(zero, topology):
        written = " ".join(f"{key}={value}" for key, value in state["layout"].items())
        raise CheckpointError(f"{checkpoint}: written in another layout: go on with {written}")
    path = checkpoint / f"optimizer-rank{topology.rank}.pt"
    zero.load_state_dict(torch.load(path, map_location=topology.device, weights_only=True))
    return state["step"], state["data"]


def load_memory(checkpoint: Path, topology: Topology) -> Memory:
    """What this rank's sequences carried to the next step. The layout is known to be the same: see `load`."""
    path = checkpoint / f"memory-rank{topology.rank}.pt"
    return tuple(torch.load(path, map_location=topology.device, weights_only=True))


def load_weights(checkpoint: Path, stage: HybridStage) -> None:
    """Copy the saved parameters into `stage`, for evaluation."""
    saved = torch.load(checkpoint / "model.pt", map_location="cpu", weights_only=True)
    own = dict(stage.named_parameters())
    if saved.keys() != own.keys():
        raise CheckpointError(f"{checkpoint}: holds another model: {sorted(saved.keys() ^ own.keys())[:3]} differ")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
