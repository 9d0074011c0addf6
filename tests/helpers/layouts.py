"""What test_layouts.py runs in its processes: one optimizer step's gradients in a layout, against one process.

Every rank compares every gradient it holds, its slices of tensor-parallel ones, with those of model/sleep.py's loop on
rank 0 alone, in float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.health import FastWeightHealth
from powernap.model.mixers.module import MixerModule
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel import schedule, topology
from powernap.parallel.planning.layout import split_layers
from powernap.train import trainer
from powernap.train.data.loader import Batch
from tests.helpers import tiny
from tests.helpers.processes import single_rank_groups

DATA_RANKS = 2  # at most
ANSWERS: dict[str, tuple] = {}  # one process's by what it computes, on rank 0: layouts of one problem share it


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    layout: str | None = None
    recompute: bool = True
    windows: int = 3
    predicting: tuple[int, ...] = (2,)
    last_window: int = tiny.WINDOW  # tokens of the last window
    pads: bool = False
    passes: int = 2
    micro_batches: int = 4
    unequal: bool = False  # sequences differ in their number of loss tokens, and the trainer scales the loss
    model: dict = field(default_factory=dict)
    sleep: dict = field(default_factory=dict)
    broken: str | None = None  # break this on purpose: the comparison must see it

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def compare(case: Case, **process_group) -> dict:
    """Run one case; the relative error of the loss and of this rank's worst gradient."""
    here = topology.initialize(case.tensor, case.pipeline, timeout_seconds=60, **process_group)
    model, sleep = tiny.model_config(**{"vocab_size": 20, **case.model}), SleepConfig(**case.sleep)
    batches = [micro_batch(case, model, sleep, seed) for seed in range(case.micro_batches * case.data)]
    loss_tokens = sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches)
    scale = case.data / loss_tokens if case.unequal else 0.37  # ZeRO averages, here ranks are added up
    loss, expected, predictions, left, health = one_process(case, model, sleep, batches, scale)

    blocks = split_layers(model.pattern, case.pipeline, case.layout)[here.pp_rank]
    with broken(case.broken):
        stage = build(model, sleep, here.groups, blocks, case.sequence)
    own = batches[here.dp_rank :: case.data]
    if sleep.carry:
        for batch in own:
            lost = case.broken == "carried fast weights"
            batch.memory = None if lost else own_memory(batch.memory, stage, here)
    with broken(case.broken), watched_sends(case) as freed:
        if case.unequal:
            metrics = train_step(case, stage, own, here)
            own_loss = metrics["loss"] * loss_tokens
            reference = health[here.dp_rank]  # of this model's first micro-batch
            watched = max(abs(metrics[name] / value - 1) for name, value in reference.items())
        else:
            own_loss = schedule.forward_backward(stage, own, scale, here, recompute=case.recompute)
            schedule.sum_shared_gradients(stage, here)
            own_loss = here.all_reduce_over_data(own_loss).item()
    worst = {"error": 0.0, "name": None}
    for name, parameter in stage.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        here.all_reduce_over_data(gradient)
        reference = expected[stage.global_name(name)]
        difference = (gradient - own_slice(reference, parameter, here)).abs().max() / (reference.abs().max() + 1e-12)
        if not difference <= worst["error"]:
            worst = {"error": difference.item(), "name": stage.global_name(name)}
    read, read_loss, read_left = schedule.predict(stage, own[0], here)
    carried = 0.0
    if sleep.carry:
        reference = own_memory(left[here.dp_rank], stage, here)  # of own[0]
        carried = max(
            (found - expected).abs().max().item()
            for memory in (own[0].left, read_left)
            for found, expected in zip(memory, reference, strict=True)
        )
    result = {
        "loss": abs(own_loss / loss - 1),
        "gradient": worst,
        "predictions": torch.equal(read, predictions[here.dp_rank][0]),
        "read_loss": abs(read_loss.item() / predictions[here.dp_rank][1] - 1),
        "carried": carried,
        "freed": len(freed),
        "health": watched if case.unequal else 0.0,
        "counted": trainer.count_parameters(stage, here) / sum(gradient.numel() for gradient in expected.values()),
        "parameters": len(list(stage.parameters())),
    }
    topology.shutdown()
    return result


def micro_batch(case: Case, model, sleep, seed: int) -> schedule.MicroBatch:
    tokens, loss_mask = tiny.batch(2, case.windows, case.predicting, seed)
    stop = tokens.shape[1] - tiny.WINDOW + case.last_window
    tokens, loss_mask = tokens[:, :stop], loss_mask[:, :stop]
    if case.pads:
        tokens[seed % 2, : 2 + seed % 3] = model.pad_token_id
    if case.unequal:
        loss_mask = tiny.thin_out(loss_mask, seed)
    segments = plan_segments(tokens, loss_mask, model, sleep, case.passes)
    memory = None
    if sleep.carry:
        shapes = [(len(tokens), *model.mixers[block].state_shape) for block in model.fast_weight_blocks]
        generator = torch.Generator().manual_seed(seed)
        memory = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return schedule.MicroBatch(segments, tokens, loss_mask, memory)


def train_step(case: Case, stage: HybridStage, own: list[schedule.MicroBatch], here) -> dict:
    """The metrics of train/trainer.py's step on these micro-batches; gradients stay as they are before ZeRO averages."""
    tokens, loss_mask = (torch.cat([getattr(part, name) for part in own]) for name in ("tokens", "loss_mask"))
    recipe = tiny.recipe(
        stage.model,
        stage.sleep,
        case.passes,
        tokens.shape[1],
        train={
            "steps": 1,
            "global_batch_size": len(tokens) * case.data,
            "micro_batch_size": len(own[0].tokens),
            "recompute": case.recompute,
        },
        optimizer={"warmup_steps": 0},
        parallel={"data": case.data, "tensor": case.tensor, "pipeline": case.pipeline, "sequence": case.sequence},
    )
    batch = Batch(tokens, loss_mask, torch.ones(len(tokens), dtype=torch.bool), [])
    metrics, _ = trainer.train_step(recipe, stage, NoOptimizer(stage, here), batch, 1, here)
    return metrics


class NoOptimizer:
    """In the place of ZeroOptimizer, which knows no float64: averages nothing, steps nothing."""

    param_groups = ()

    def __init__(self, stage: HybridStage, here):
        self.stage, self.here = stage, here

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        yield
        schedule.sum_shared_gradients(self.stage, self.here)

    def skip_step_if_nonfinite(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> float:
        return 0.0


def own_memory(memory, stage: HybridStage, here) -> tuple[torch.Tensor, ...]:
    """The blocks and heads that this rank holds of the whole model's fast weights."""
    states = dict(zip(stage.model.fast_weight_blocks, memory, strict=True))
    return tuple(states[block].chunk(here.tp_size, 1)[here.tp_rank] for block in stage.fast_weight_mixers)


def one_process(case: Case, model, sleep, batches, scale: float):
    """Loss, gradients by name, predictions, memory left and health of the loop on rank 0 alone, on all ranks."""
    found, groups = [None], single_rank_groups()
    of_data = (case.windows, case.predicting, case.last_window, case.pads, case.unequal, len(batches))
    key = repr((model, sleep, case.passes, scale, of_data))
    if dist.get_rank() == 0:
        if key not in ANSWERS:
            ANSWERS[key] = compute_alone(build(model, sleep, groups), batches, case.passes, scale)
        found = [ANSWERS[key]]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def compute_alone(stage: HybridStage, batches: list[schedule.MicroBatch], passes: int, scale: float) -> tuple:
    """Loss and gradients of all micro-batches as one; the rest for the first of each data-parallel rank."""
    predictions, left, healths = [], [], []
    for batch in batches[:DATA_RANKS]:
        health = FastWeightHealth(stage)
        with torch.no_grad():
            output = sleep_and_predict(
                stage, batch.segments, batch.tokens, batch.loss_mask, memory=batch.memory, predict=True, health=health
            )
        healths.append(health.summary())
        predictions.append((output.predictions, output.loss.item()))
        left.append(output.memory)
    tokens, loss_mask = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "loss_mask"))
    memory = None
    if stage.sleep.carry:
        memory = tuple(torch.cat(states) for states in zip(*(batch.memory for batch in batches), strict=True))
    segments = plan_segments(tokens, loss_mask, stage.model, stage.sleep, passes)
    loss = sleep_and_predict(stage, segments, tokens, loss_mask, memory=memory, recompute=False).loss
    (loss * scale).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.named_parameters()}
    return loss.item(), gradients, predictions, left, healths


def build(model, sleep, groups, blocks=None, sequence_parallel=False) -> HybridStage:
    torch.manual_seed(0)
    stage = HybridStage(model, sleep, groups, blocks=blocks, sequence_parallel=sequence_parallel).double()
    for name, parameter in stage.named_parameters():  # norms away from one, the same on every rank
        if "norm" in name and parameter.ndim == 1:  # the others are split
            with torch.no_grad():
                parameter += 0.1 * torch.sin(torch.arange(parameter.numel()) + float(len(stage.global_name(name))))
    return stage


def own_slice(full: torch.Tensor, parameter: torch.Tensor, here) -> torch.Tensor:
    """This tensor rank's part of a weight or gradient."""
    if not getattr(parameter, "tensor_model_parallel", False) or here.tp_size == 1:
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    parts = full.chunk(here.tp_size * stride, dim)  # stride 2: gate and up of the SwiGLU are split each
    return torch.cat(parts[here.tp_rank :: here.tp_size], dim)


def mean_of_rank_means(stage, micro_batches, loss_scale, here, **options):
    """Each data rank divides by its own loss tokens, as if all had as many."""
    own = sum(int(batch.loss_mask[:, 1:].sum()) for batch in micro_batches)
    return schedule.forward_backward(stage, micro_batches, 1 / own, here, **options)


def mean_of_micro_batch_means(stage, micro_batches, loss_scale, here, **options):
    """Each micro-batch is divided by its own loss tokens; one after the other, since a call has one scale."""
    parts = []
    for batch in micro_batches:
        scale = 1 / len(micro_batches) / int(batch.loss_mask[:, 1:].sum())
        parts.append(schedule.forward_backward(stage, [batch], scale, here, **options))
    return sum(parts)


MEANS = {"global token mean, ranks": mean_of_rank_means, "global token mean, micro-batches": mean_of_micro_batch_means}


@contextmanager
def watched_sends(case: Case):
    """The messages whose memory is free before the sender has waited for them, when NCCL may still read it.

    As in NCCL and gloo a message holds its tensor, not the memory that the tensor had when the sending began.
    """
    isend, freed = dist.isend, []

    class Sending:
        def __init__(self, tensor, work):
            self.tensor, self.storage, self.work = tensor, StorageWeakRef(tensor.untyped_storage()), work

        def wait(self):
            if self.storage.expired():
                freed.append(self)
            return self.work.wait()

    # A copy is sent: gloo must neither keep the memory alive nor suffer from what is found here.
    if case.broken != "links":  # torch batches its own isend alone
        dist.isend = lambda tensor, **options: Sending(tensor, isend(tensor.clone(), **options))
    yield freed
    dist.isend = isend


@contextmanager
def broken(what: str | None):
    """Break one part of the engine for a while."""
    backward, shared = schedule._SegmentBoundary.backward, schedule.sum_shared_gradients
    config, keep, parameter = schedule._schedule_config, schedule.StageStep._keep, MixerModule._parameter

    def of_the_next_rank(mixer, weight):
        return parameter(mixer, weight._replace(draw=lambda shape: weight.draw(shape).roll(shape[0] // 2, 0)))

    def without_fast_weights(ctx, gradient):
        return backward(ctx, gradient)[:6] + (None,) * len(ctx.needs_input_grad[6:])

    def batched(*arguments):
        changed = config(*arguments)
        changed.batch_p2p_comm, changed.overlap_p2p_comm = True, False
        return changed

    if what == "fast weights' gradient":
        schedule._SegmentBoundary.backward = staticmethod(without_fast_weights)
    elif what == "shared gradients":
        schedule.sum_shared_gradients = lambda *_: None
    elif what == "memory of what is sent":
        schedule.StageStep._keep = lambda self, output: None
    elif what == "links":
        schedule._schedule_config = batched
    elif what == "split of a mixer":
        MixerModule._parameter = of_the_next_rank
    elif what in MEANS:
        trainer.forward_backward = MEANS[what]
    yield
    trainer.forward_backward = schedule.forward_backward
    schedule._SegmentBoundary.backward, schedule.sum_shared_gradients = backward, shared
    schedule._schedule_config, schedule.StageStep._keep = config, keep
    MixerModule._parameter = parameter
