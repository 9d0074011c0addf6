"""Run by test_not_finite.py in its processes: training with bad steps in between, against training without them."""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import deepspeed.comm
import torch
from deepspeed.runtime.zero import stage_1_and_2

from powernap.model.config import SleepConfig
from powernap.model.megatron import parallel_state
from powernap.parallel import schedule
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.topology import init_distributed
from powernap.parallel.zero import optimizer as zero
from powernap.train import trainer
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from tests.helpers import layouts, tiny, zero_layouts

STEPS = 3
BAD_AFTER = {1: "gradient", 2: "loss"}  # good step -> what is wrong in the one after it
PARAMETER = "mlp.linear_fc1.weight"


@dataclass(frozen=True)
class Case(zero_layouts.Case):
    precision: str = "fp32"
    optimizer: str = "adamw"
    tied: bool = False
    large: bool = False  # in place of a NaN a gradient whose norm is too large for float32
    control: bool = False  # disable the skipping


def compare(case: Case, **process_group) -> dict:
    """Whether bad steps changed anything on this rank, and whether the later ones are those of an undisturbed run."""
    topology = init_distributed(case.tensor, case.pipeline, timeout_seconds=60, **process_group)
    stage, engine = build(case, topology)
    result = {"norms": {}, "unchanged": {}, "named": {}}
    looks = stage_1_and_2.is_invalid_grad_norm
    if case.control:
        stage_1_and_2.is_invalid_grad_norm = lambda norm: False
    for step in range(1, STEPS + 1):
        train_step(case, stage, engine, topology, step)
        if kind := BAD_AFTER.get(step):
            before = everything(stage, engine)
            result["norms"][kind] = train_step(case, stage, engine, topology, 100 + step, kind)
            result["unchanged"][kind] = same(before, everything(stage, engine))
            names = [stage.global_name(name) for name, _ in stage.named_parameters()]
            finite = engine.gradient_norms.isfinite().tolist()
            result["named"][kind] = [name for name, ok in zip(names, finite, strict=True) if not ok]
    stage_1_and_2.is_invalid_grad_norm = looks
    stage_alone, alone = build(case, topology)
    for step in range(1, STEPS + 1):
        train_step(case, stage_alone, alone, topology, step)
    result["as_undisturbed"] = same(everything(stage, engine), everything(stage_alone, alone))
    result["finite"] = all(bool(tensor.isfinite().all()) for tensor in everything(stage, engine))
    result["states"] = len(engine.zero.optimizer.state)
    for one in (engine, alone):
        one.engine.destroy()
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()
    return result


def build(case: Case, topology):
    model = tiny.model_config(pattern="AG", vocab_size=20, tie_embeddings=case.tied)
    blocks = split_layers(model.pattern, case.pipeline)[topology.pp_rank]
    stage = layouts.build(model, SleepConfig(), topology.groups, blocks, case.sequence).float()
    config = OptimizerConfig(name=case.optimizer, lr=2e-3, weight_decay=0.1, warmup_steps=0)
    engine = zero.ZeroOptimizer(
        stage,
        build_optimizer(stage, config),
        topology,
        precision=case.precision,
        clip=zero_layouts.CLIP,
        micro_batch_size=1,
        zero_stage=case.zero_stage,
        offload=case.offload,
    )
    return stage, engine


def train_step(case: Case, stage, engine, topology, step: int, bad: str | None = None) -> float:
    """The gradient norm of train/trainer.py's own step; `bad`: "gradient" or "loss", on the last rank."""
    last = topology.rank == topology.world_size - 1

    def forward_backward(*arguments, **options):
        with spoiled(stage, bad == "gradient" and last, 1e25 if case.large else float("nan")):
            loss = schedule.forward_backward(*arguments, **options)
        return loss * float("inf") if bad == "loss" and last else loss

    with mock.patch.object(trainer, "forward_backward", forward_backward):
        _, norm = zero_layouts.train_step(case, stage, engine, topology, step)
    return norm


@contextmanager
def spoiled(stage, bad: bool, value: float):
    """If `bad`, one weight's gradient is `value` in one place."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    parameter = next(p for name, p in stage.named_parameters() if name.endswith(PARAMETER))
    hooks = [parameter.register_hook(spoil)] if bad else []
    yield
    for hook in hooks:
        hook.remove()


def everything(stage, engine) -> list[torch.Tensor]:
    """Weights, master weights, moments and step counters of this rank: copies."""
    with engine.gathered_parameters():
        tensors = [parameter.detach().clone() for parameter in stage.parameters()]
    for master, state in engine.zero.optimizer.state.items():
        tensors.append(master.detach().clone())
        tensors += [torch.as_tensor(value).clone() for value in state.values()]
    return tensors


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
