"""Checkpoints, first version: weights once, every rank's share of the optimizer, loadable on the same number of ranks.

A folder step_00000500/ holds model.pt (parameters by name), optimizer-rank*.pt (ZeRO partitions) and state.json. It is
written under a temporary name and renamed when every rank is done: a folder without `.tmp` is whole.
"""

import json
import re
import shutil
from pathlib import Path

import torch

from powernap.parallel.topology import Topology
from powernap.parallel.zero import ZeroOptimizer

_NAME = re.compile(r"step_(\d+)$")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line."""


def save(folder: Path, step: int, stage: torch.nn.Module, zero: ZeroOptimizer, topology: Topology) -> Path:
    """Write the state after `step` into `folder`; all ranks call it, each writes its share."""
    final = folder / f"step_{step:08d}"
    unfinished = final.with_suffix(".tmp")
    if topology.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    topology.barrier()
    torch.save(zero.state_dict(), unfinished / f"optimizer-rank{topology.rank}.pt")
    if topology.is_main:
        torch.save({name: p.detach() for name, p in stage.named_parameters()}, unfinished / "model.pt")
        state = {"step": step, "world_size": topology.world_size}
        (unfinished / "state.json").write_text(json.dumps(state))
    topology.barrier()
    if topology.is_main:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    topology.barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, None if there is none."""
    found = [path for path in folder.glob("step_*") if _NAME.match(path.name)]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint."""
    return int(_NAME.match(checkpoint.name).group(1))


def load(checkpoint: Path, zero: ZeroOptimizer, topology: Topology) -> int:
    """Restore this rank's share of the optimizer and, from it, the weights; return the step."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["world_size"] != topology.world_size:
        raise CheckpointError(
            f"{checkpoint}: written by {state['world_size']} processes, this run has {topology.world_size}: "
            f"use parallel.data={state['world_size']}"
        )
    path = checkpoint / f"optimizer-rank{topology.rank}.pt"
    zero.load_state_dict(torch.load(path, map_location=topology.device, weights_only=True))
    return state["step"]


def load_weights(checkpoint: Path, stage: torch.nn.Module) -> None:
    """Copy the saved parameters into `stage`, for evaluation."""
    saved = torch.load(checkpoint / "model.pt", map_location="cpu", weights_only=True)
    own = dict(stage.named_parameters())
    if saved.keys() != own.keys():
        raise CheckpointError(f"{checkpoint}: holds another model: {sorted(saved.keys() ^ own.keys())[:3]} differ")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
