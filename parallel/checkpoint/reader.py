"""Reading a checkpoint into any layout, not only the one that wrote it.

Every rank wrote a range of a parameter's flattened tensor-parallel shard. A rank reads what overlaps its own range;
only if the number of tensor ranks has changed, whole parameters are assembled, one at a time.
"""

from collections import defaultdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from powernap.model.fast_weights import LayerStates
from powernap.model.parameters import float32_names
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint import manifest
from powernap.parallel.checkpoint.manifest import CheckpointError
from powernap.parallel.checkpoint.shards import Split, shard, shard_shape, split_of, unshard, whole_shape
from powernap.parallel.topology import Topology
from powernap.parallel.zero.fragment import EMA, MASTER
from powernap.parallel.zero.optimizer import ZeroOptimizer


class _Extent(NamedTuple):
    file: str
    tensor: int  # rank
    start: int
    stop: int


class Checkpoint:
    """A checkpoint whose files have been checked.

    Attributes:
        step: the number of optimizer steps behind it.
        state: the trainer's.
    """

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder = folder
        self.manifest = content
        self.step: int = content["step"]
        self.state: dict[str, Any] = content["state"]
        self._tensor_ranks: int = content["layout"]["parallel.tensor"]
        self._data_ranks: int = content["layout"]["parallel.data"]
        self._extents: dict[str, list[_Extent]] = defaultdict(list)
        for file, entry in content["files"].items():
            for name, (start, stop) in entry["fragments"].items():
                self._extents[name].append(_Extent(file, entry["tensor"], start, stop))
        self._open: dict[str, Any] = {}
        self._weights = MASTER  # which kind `whole` reads

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`, after reading every byte of it.

        Raises:
            CheckpointError: if a file is missing or modified.
        """
        return cls(folder, manifest.verify(folder))

    @classmethod
    def newest(cls, folder: Path, topology: Topology | None = None) -> tuple["Checkpoint | None", list[str]]:
        """The newest whole checkpoint in a run's `checkpoints`, and why newer ones were passed over.

        Args:
            topology: the ranks that share the reading; None: this process alone.
        """
        candidates, verify = manifest.checkpoints(folder), manifest.verify
        if topology and topology.world_size > 1:
            # A shared file system may show ranks different files.
            candidates, verify = topology.broadcast_object(candidates), partial(verify_together, topology=topology)
        newest, content, passed_over = manifest.newest_valid(candidates, verify)
        return (cls(newest, content) if newest else None), passed_over

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters of the model."""
        return list(self.manifest["parameters"])

    def averaged(self) -> Self:
        """The same checkpoint with the running mean of its weights in place of them; frozen ones have none.

        Raises:
            CheckpointError: if it was trained without.
        """
        if not any(EMA in group["kinds"] for group in self.manifest["groups"]):
            raise CheckpointError(
                f"{self.folder}: was trained without train.ema: it has no running mean of its weights"
            )
        self._weights = EMA
        return self

    def whole(self, name: str, kind: str | None = None) -> torch.Tensor:
        """A whole parameter, or one of its optimizer states, float32 on the CPU."""
        entry = self.manifest["parameters"][name]
        kind = kind or (MASTER if entry["group"] is None else self._weights)
        split = entry["split"] and Split(*entry["split"])
        ranks = self._tensor_ranks if split else 1
        shape = shard_shape(entry["shape"], split, ranks)
        shards = [self._read_shard(name, kind, rank, 0, prod(shape)).view(shape) for rank in range(ranks)]
        return unshard(shards, split, entry["shape"])

    def shard(self, name: str, split: Split | None, rank: int, ranks: int) -> torch.Tensor:
        """The master weights of a parameter that tensor rank `rank` of `ranks` has, float32 on the CPU."""
        shape = shard_shape(self.manifest["parameters"][name]["shape"], split, ranks)
        return self._part(name, MASTER, split, rank, ranks, 0, prod(shape)).view(shape)

    def load(self, stage: HybridStage, zero: ZeroOptimizer, topology: Topology) -> None:
        """Restore weights and optimizer states of this rank. All ranks call it."""
        self._check_model({stage.global_name(name): p for name, p in stage.named_parameters()}, stage)
        zero.restore_groups(self._groups_of(stage, zero))
        for name, parameter in stage.named_parameters():
            fragment = zero.fragment(parameter)
            if fragment is None:
                continue
            shard_of = (split_of(parameter), topology.tp_rank, topology.tp_size)
            for kind, (start, values) in zero.values(parameter, fragment).items():
                values.copy_(self._part(stage.global_name(name), kind, *shard_of, start, start + len(values)))
        zero.adopt_masters()
        self._open.clear()

    def load_weights(self, stage: HybridStage, precision: str = "fp32") -> None:
        """Copy the weights, rounded as training in `precision` computes with them, into a whole model on this rank."""
        parameters = {stage.global_name(name): parameter for name, parameter in stage.named_parameters()}
        self._check_model(parameters, stage)
        unrounded = float32_names(stage.model, stage.sleep)
        with torch.no_grad():
            for name, parameter in parameters.items():
                weights = self.whole(name)
                parameter.copy_(weights.bfloat16() if precision == "bf16" and name not in unrounded else weights)
        self._open.clear()

    def load_layer_states(self, stage: HybridStage, topology: Topology) -> LayerStates | None:
        """The states that this rank's sequences carry to the next step; None if the checkpoint has none.

        Sequence i of data rank d is lane i * data ranks + d of the stream.
        """
        lanes = self.manifest.get("lanes")
        if not lanes:
            return None
        rank_lanes = range(topology.dp_rank, lanes["count"], topology.dp_size)
        layer_states = []
        for block in stage.fast_weight_mixers:
            heads, *rest = lanes["blocks"][str(block)]
            whole = torch.empty(lanes["count"], heads, *rest)
            share = heads // self._tensor_ranks
            for file, entry in self.manifest["files"].items():
                if str(block) in entry["blocks"]:
                    shard_heads = slice(entry["tensor"] * share, (entry["tensor"] + 1) * share)
                    whole[entry["data"] :: self._data_ranks, shard_heads] = self._tensor(file, f"fast_weights/{block}")[
                        :
                    ]
            share = heads // topology.tp_size
            shard_heads = slice(topology.tp_rank * share, (topology.tp_rank + 1) * share)
            layer_states.append(
                whole[rank_lanes.start :: rank_lanes.step, shard_heads].contiguous().to(topology.device)
            )
        self._open.clear()
        return tuple(layer_states)

    def _groups_of(self, stage: HybridStage, zero: ZeroOptimizer) -> list[dict[str, Any]]:
        """What was saved of each of the optimizer's groups, which a run that starts from the states may have cut in another way."""
        names = {id(parameter): name for name, parameter in stage.trained_parameters.items()}
        saved, found = self.manifest["groups"], []
        for number, group in enumerate(zero.parameter_groups):
            own = [self.manifest["parameters"][names[id(p)]]["group"] for p in group if id(p) in names]
            found.append(saved[own[0] if own else min(number, len(saved) - 1)])
        return found

    def _part(
        self, name: str, kind: str, split: Split | None, rank: int, ranks: int, start: int, stop: int
    ) -> torch.Tensor:
        """A range of the shard of a parameter that tensor rank `rank` of `ranks` has."""
        if split is None or ranks == self._tensor_ranks:
            return self._read_shard(name, kind, rank if split else 0, start, stop)
        return shard(self.whole(name, kind), split, rank, ranks).flatten()[start:stop]

    def _read_shard(self, name: str, kind: str, rank: int, start: int, stop: int) -> torch.Tensor:
        """A range of the shard that tensor rank `rank` wrote."""
        values = torch.empty(stop - start)
        covered = 0
        for part in self._extents[name]:
            first, last = max(part.start, start), min(part.stop, stop)
            if part.tensor != rank or first >= last:
                continue
            values[first - start : last - start] = self._tensor(part.file, f"{kind}/{name}")[
                first - part.start : last - part.start
            ]
            covered += last - first
        if covered != stop - start:
            raise CheckpointError(f"{self.folder}: has {covered:,} of {stop - start:,} values of {kind}/{name}")
        return values

    def _tensor(self, file: str, name: str):
        """A lazy tensor of a file: only the slices that are taken are read."""
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {' '.join(str(error).split())}") from None

    def _check_model(self, parameters: dict[str, torch.nn.Parameter], stage: HybridStage) -> None:
        """Raise CheckpointError unless `parameters` are the checkpoint's, as far as they belong to the stage."""
        saved = self.manifest["parameters"]
        missing = [name for name in parameters if name not in saved]
        if stage.is_first and stage.is_last:
            missing += [name for name in saved if name not in parameters]
        if missing:
            raise CheckpointError(f"{self.folder}: holds another model: {sorted(missing)[:3]} differ")
        for name, parameter in parameters.items():
            shape = whole_shape(parameter, stage.tp_group.size())
            if shape != saved[name]["shape"]:
                raise CheckpointError(
                    f"{self.folder}: holds another model: {name} is {saved[name]['shape']} there, {shape} here"
                )


def verify_together(candidate: Path, topology: Topology) -> dict[str, Any]:
    """`manifest.verify` by all ranks, each of which reads its share of the files; they return, or raise, the same."""
    content, problem = topology.broadcast_object(_try_manifest(candidate) if topology.is_main else None)
    if problem is None:
        share = list(content["files"])[topology.rank :: topology.world_size]
        problems = (manifest.check_file(candidate, name, content["files"][name]) for name in share)
        problem = next(filter(None, topology.all_gather_object(next(filter(None, problems), None))), None)
    if problem is not None:
        raise CheckpointError(problem)
    return content


def _try_manifest(candidate: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return manifest.read_manifest(candidate), None
    except CheckpointError as error:
        return None, str(error)
