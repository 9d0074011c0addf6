"""Run by test_checkpoint.py in its processes: a few steps and a checkpoint in one layout, from which others resume."""

import json
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm
import torch

from powernap.model.config import SleepConfig
from powernap.model.megatron import parallel_state
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import Writer
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.topology import init_distributed
from powernap.parallel.zero import optimizer as zero
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from tests.helpers import layouts, tiny, zero_layouts

BEFORE, AFTER = 3, 4  # steps
MODEL = {"pattern": "AGAG", "attention": {"heads": 4}, "gdn": {"heads": 4}}
# Gradients of parts that hardly matter are rounding: with the usual eps Adam would turn them into full steps.
ADAMW = OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=3, eps=1e-6)
MUON = OptimizerConfig(name="muon", lr=2e-3, muon_lr=2e-3, warmup_steps=3, eps=1e-6)


@dataclass(frozen=True)
class Saving:
    """Train and save in this layout."""

    layout: zero_layouts.Case
    folder: str
    optimizer: OptimizerConfig = ADAMW
    tied: bool = False
    vocab_size: int = 20
    broken: str | None = None

    @property
    def world_size(self) -> int:
        return self.layout.world_size


@dataclass(frozen=True)
class Loading(Saving):
    """Load the checkpoint in this layout, save it again, continue."""

    saved: str = ""


def run(case: Saving, **process_group) -> dict:
    """Losses of the steps after the checkpoint; this rank's carried states, actual and expected; the manifest."""
    layout = case.layout
    topology = init_distributed(layout.tensor, layout.pipeline, timeout_seconds=60, **process_group)
    model = tiny.model_config(**MODEL, vocab_size=case.vocab_size, tie_embeddings=case.tied)
    blocks = split_layers(model.pattern, layout.pipeline)[topology.pp_rank]
    stage = layouts.build(model, SleepConfig(), topology.groups, blocks, layout.sequence).float()
    if isinstance(case, Loading):  # nothing may be right only because it was before
        with torch.no_grad():
            [parameter.add_(1.0) for parameter in stage.parameters()]
    engine = zero.ZeroOptimizer(
        stage,
        build_optimizer(stage, case.optimizer),
        topology,
        precision=layout.problem.precision,
        clip=zero_layouts.CLIP,
        micro_batch_size=zero_layouts.MICRO_BATCH,
        zero_stage=layout.zero_stage,
        offload=layout.offload,
    )
    folder = Path(case.folder)
    if topology.is_main:
        folder.mkdir(parents=True)
    topology.barrier()
    if isinstance(case, Loading):
        found, passed_over = Checkpoint.newest(Path(case.saved), topology)
        assert not passed_over
        found.load(stage, engine, topology)
        if case.broken == "moments":
            for state in engine.zero.optimizer.state.values():
                [value.zero_() for value in state.values() if value.ndim]
    else:
        for step in range(1, BEFORE + 1):
            zero_layouts.train_step(layout, stage, engine, topology, step)
    about = {"versions": {}, "config": {}}
    writer = Writer(folder, topology, about, asynchronous=layout.tensor == 1)
    expected = layer_states = carried(stage, model, topology)
    if isinstance(case, Loading):
        layer_states = found.load_layer_states(stage, topology)
    writer.save(BEFORE, stage, engine, {"data": {"samples": 7}}, layer_states)
    found = [zero_layouts.train_step(layout, stage, engine, topology, BEFORE + step)[0] for step in range(1, AFTER + 1)]
    writer.finish()
    engine.engine.destroy()
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()
    return {
        "losses": found,
        "memory": layer_states,
        "expected": expected,
        "manifest": json.loads((folder / "step_00000003" / "manifest.json").read_text()),
    }


def carried(stage, model, topology) -> tuple[torch.Tensor, ...]:
    """This rank's part of the states of eight lanes: rows by data rank, heads by tensor rank, blocks by stage."""
    layer_states = []
    for block, mixer in stage.fast_weight_mixers.items():
        generator = torch.Generator().manual_seed(block)
        whole = torch.randn(8, *mixer.mixer.state_shape, generator=generator)
        layer_states.append(
            whole[topology.dp_rank :: topology.dp_size].chunk(topology.tp_size, 1)[topology.tp_rank].contiguous()
        )
    return tuple(layer_states)


def differences(one: str, other: str) -> dict[str, float]:
    """The largest difference of anything in two checkpoints, by kind/name."""
    a, b = (Checkpoint.open(Path(folder) / "step_00000003") for folder in (one, other))
    assert a.parameters and set(a.parameters) == set(b.parameters)
    assert a.manifest["groups"] == b.manifest["groups"] and a.state == b.state
    kinds = {
        name: ["master", *a.manifest["groups"][told["group"]]["kinds"]]
        for name, told in a.manifest["parameters"].items()
    }
    return {
        f"{kind}/{name}": (a.whole(name, kind) - b.whole(name, kind)).abs().max().item()
        for name, of_it in kinds.items()
        for kind in of_it
    }
