"""Run by test_zero_layouts.py in its processes: six optimizer steps in a layout, against a plain optimizer.

The plain optimizer is torch.optim.AdamW with clip_grad_norm_ around model/sleep.py's loop, on rank 0 alone, over whole
global batches. Every rank compares the losses, the gradient norms and every weight it holds, in float32.
"""

from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import original_muon

from powernap.model import stage as stage_module
from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.megatron import parallel_state
from powernap.model.mixers.module import MixerModule
from powernap.model.parameters import float32_names
from powernap.model.recompute import Recompute
from powernap.model.segments import HEAD_NUMBERS
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel import muon
from powernap.parallel.checkpoint.shards import split_of
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.topology import init_distributed
from powernap.parallel.zero import optimizer as zero
from powernap.train import trainer
from powernap.train.config import OptimizerConfig
from powernap.train.data.loader import Batch
from powernap.train.lr_schedule import lr_factor
from powernap.train.optimizer import build_optimizer
from tests.helpers import layouts, tiny
from tests.helpers.plain_muon import PlainMuon, rows_of
from tests.helpers.processes import single_rank_groups

STEPS = 6  # two with each of three numbers of passes
SCHEDULED = 10  # steps of the learning rate's schedule
SEQUENCES, MICRO_BATCH = 4, 1  # of a global batch, of a micro-batch
SEED = 3090  # of the data: in so few steps every weight moves far, and ranks differ in their loss tokens
CLIP = 0.05
ANSWERS: dict[str, tuple] = {}  # the plain optimizer's by problem, on rank 0
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.1, warmup_steps=3)
MUON = OptimizerConfig(name="muon", lr=2e-3, muon_lr=5e-3, muon_momentum=0.9, weight_decay=0.1, warmup_steps=3)
SPLIT_MUON = MUON.model_copy(update={"muon_split": True})


@dataclass(frozen=True)
class Problem:
    """A training problem: all its layouts have the same right answer."""

    passes: tuple[int, ...] = (2,)  # N of the steps, in turn
    precision: str = "fp32"
    silent: tuple[int, ...] = ()  # sequences without a loss token
    model: dict = field(default_factory=dict)
    sleep: dict = field(default_factory=dict)
    optimizer: OptimizerConfig = OPTIMIZER


@dataclass(frozen=True)
class Case:
    zero_stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    offload: bool = False
    recompute: Recompute = "none"
    offload_inputs: bool = False
    head_numbers: int = HEAD_NUMBERS  # logits in a chunk
    problem: Problem = Problem()
    broken: str | None = None  # leave this out on purpose: the comparison must see it

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def compare(case: Case, **process_group) -> dict:
    """Run one case; this rank's largest differences and the smallest norm and movement of a weight."""
    topology = init_distributed(case.tensor, case.pipeline, timeout_seconds=60, **process_group)
    # In bfloat16, as it runs, Muon's orthogonalisation multiplies rounding errors by hundreds: nothing could be compared.
    original_muon.ns_compute_dtype = lambda *_: torch.float32
    model = tiny.model_config(**{"pattern": "AG", "vocab_size": 20, **case.problem.model})
    sleep = SleepConfig(**case.problem.sleep)
    stage_module.HEAD_NUMBERS = HEAD_NUMBERS  # the plain optimizer's has no chunks
    losses, norms, start, end = plain_answer(case.problem, model, sleep)
    _, exact_norms, _, _ = plain_answer(replace(case.problem, precision="fp32"), model, sleep)

    stage_module.HEAD_NUMBERS = case.head_numbers
    blocks = split_layers(model.pattern, case.pipeline)[topology.pp_rank]
    stage = layouts.build(model, sleep, topology.groups, blocks, case.sequence).float()
    with broken(case.broken):
        engine = zero.ZeroOptimizer(
            stage,
            build_optimizer(stage, case.problem.optimizer),
            topology,
            precision=case.problem.precision,
            clip=CLIP,
            micro_batch_size=MICRO_BATCH,
            zero_stage=case.zero_stage,
            offload=case.offload,
        )
        found = [train_step(case, stage, engine, topology, step) for step in range(1, STEPS + 1)]

    unrounded = {
        parameter: mixer.unrounded[name]
        for mixer in stage.modules()
        if isinstance(mixer, MixerModule) and mixer.unrounded
        for name, parameter in mixer.float32_parameters().items()
    }
    worst = {"error": 0.0, "name": None}
    moved = float("inf")
    with engine.gathered_parameters():
        for name, parameter in stage.named_parameters():
            name = stage.global_name(name)
            expected, before = (layouts.own_slice(weights[name], parameter, topology) for weights in (end, start))
            assert parameter.shape == expected.shape
            moved = min(moved, (expected - before).abs().max().item())
            value = unrounded.get(parameter, parameter.detach())
            error = (value - expected.to(value.dtype)).float().abs().max().item()
            if not error <= worst["error"]:
                worst = {"error": error, "name": name}
    result = {
        "loss": max(abs(own / plain - 1) for (own, _), plain in zip(found, losses, strict=True)),
        "norm": max(abs(own / plain - 1) for (_, own), plain in zip(found, norms, strict=True)),
        "first_norm": abs(found[0][1] / norms[0] - 1),
        "rounding": abs(norms[0] / exact_norms[0] - 1),  # what bf16 alone does to the first norm
        "weight": worst,
        "smallest_norm": min(norms),
        "smallest_movement": moved,
        "parameters": len(list(stage.parameters())),
        "unrounded": len(unrounded),
    }
    engine.engine.destroy()
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()  # torch's, and what DeepSpeed keeps of this case's groups
    return result


def train_step(case: Case, stage, engine, topology, step: int) -> tuple[float, float]:
    """Loss and gradient norm of train/trainer.py's own step."""
    tokens, loss_mask = global_batch(case.problem, step)
    recipe = tiny.recipe(
        stage.model,
        stage.sleep,
        passes_of(case.problem, step),
        tokens.shape[1],
        train={
            "steps": SCHEDULED,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": MICRO_BATCH,
            "precision": case.problem.precision,
            "recompute": case.recompute,
            "offload_inputs": case.offload_inputs,
        },
        optimizer=case.problem.optimizer,
        parallel={"data": case.data, "tensor": case.tensor, "pipeline": case.pipeline, "sequence": case.sequence},
        zero={"stage": case.zero_stage, "offload": case.offload},
    )
    share = slice(topology.dp_rank, None, topology.dp_size)
    begins = torch.ones(SEQUENCES // case.data, dtype=torch.bool)
    metrics, _ = trainer.train_step(
        recipe, stage, engine, Batch(tokens[share], loss_mask[share], begins, []), step, topology
    )
    return metrics["loss"], metrics["grad_norm"]


def global_batch(problem: Problem, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and loss mask, each [B, T]; each sequence has different loss tokens in the last window."""
    tokens, loss_mask = tiny.batch(SEQUENCES, windows=2, predicting=(1,), seed=SEED + step)
    loss_mask = tiny.thin_out(loss_mask, step)
    loss_mask[list(problem.silent)] = False
    return tokens, loss_mask


def passes_of(problem: Problem, step: int) -> int:
    return problem.passes[step % len(problem.passes)]


def plan(stage: HybridStage, tokens, loss_mask, problem: Problem, step: int):
    return plan_segments(tokens, loss_mask, stage.model, stage.sleep, passes_of(problem, step))


def plain_answer(problem: Problem, model, sleep):
    """(losses, norms before clipping, weights by name at the start and at the end), computed on rank 0 for all."""
    found, key = [None], repr(astuple(problem))
    groups = single_rank_groups()
    if dist.get_rank() == 0:
        if key not in ANSWERS:
            ANSWERS[key] = train_plainly(problem, layouts.build(model, sleep, groups).float())
        found = [ANSWERS[key]]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def train_plainly(problem: Problem, stage: HybridStage):
    weights = dict(stage.named_parameters())
    if problem.precision == "bf16":
        exact = {name: weights[name].detach().clone() for name in float32_names(stage.model, stage.sleep)}
        stage = stage.bfloat16()
        for name, value in exact.items():
            weights[name].data = value
    masters = {name: p.detach().float().clone() for name, p in weights.items()}
    start = {name: p.clone() for name, p in masters.items()}
    config = problem.optimizer
    decaying = {name for name, p in weights.items() if p.ndim == 2 and name != "embedding.weight"}
    inside = {name for name in decaying if name != "output_layer.weight"} if config.name == "muon" else set()
    decaying = decaying if config.name == "adamw" else set()
    groups = [
        {"params": [masters[name] for name in decaying], "weight_decay": config.weight_decay},
        {"params": [masters[name] for name in masters.keys() - decaying - inside], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)]
    if inside:
        rows = {masters[name]: rows_of(name, len(masters[name])) for name in inside} if config.muon_split else None
        matrices = [masters[name] for name in inside]
        optimizers.append(PlainMuon(matrices, config.muon_lr, config.muon_momentum, config.weight_decay, rows))
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        tokens, loss_mask = global_batch(problem, step)
        for p in weights.values():
            p.grad_dtype = torch.float32
            # Zeros, not None: ZeRO steps flat partitions, where a weight unused in a step has a gradient of zero.
            p.grad = torch.zeros_like(p, dtype=torch.float32)
        losses.append(0.0)
        for part in zip(tokens.split(1), loss_mask.split(1), strict=True):
            loss = sleep_and_predict(stage, plan(stage, *part, problem, step), *part, recompute="none").loss
            loss = loss / loss_mask[:, 1:].sum()
            if loss.requires_grad:
                loss.backward()
            losses[-1] += loss.item()
        for name, p in weights.items():
            masters[name].grad = p.grad
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP).item())
        for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor(step, SCHEDULED, config)
            optimizer.step()
        for name, p in weights.items():
            p.data.copy_(masters[name])
    return losses, norms, start, masters


@contextmanager
def broken(what: str | None):
    """Leave one part of the engine out for a while."""
    shared, copy, unrounded = zero.sum_shared_gradients, HybridStage.holds_tied_copy, MixerModule.in_float32
    if what == "sum_shared_gradients":
        zero.sum_shared_gradients = lambda *_: None
    elif what == "in_float32":
        MixerModule.in_float32 = lambda mixer, name: getattr(mixer, name)  # type: ignore[method-assign, assignment]
    elif what == "ds_pipe_replicated":
        HybridStage.holds_tied_copy = False
    elif what == "slices of matrices joined":
        muon.split_of = lambda parameter: None
    elif what in layouts.MEANS:
        trainer.forward_backward = layouts.MEANS[what]
    yield
    trainer.forward_backward = layouts.schedule.forward_backward
    zero.sum_shared_gradients, HybridStage.holds_tied_copy = shared, copy
    muon.split_of = split_of
    MixerModule.in_float32 = unrounded  # type: ignore[method-assign]
