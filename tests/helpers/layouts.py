"""Run by test_layouts.py in its processes: one optimizer step's gradients in a layout, against one process.

Every rank compares every gradient it holds, its slices of tensor-parallel ones, with those of model/sleep.py's loop on
rank 0 alone, in float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from powernap.model import recompute as recompute_module
from powernap.model import stage as stage_module
from powernap.model.batch import find_loss_tokens, plan_segments
from powernap.model.config import SleepConfig
from powernap.model.dropout import Dropout, row_seeds
from powernap.model.fast_weights import begin_anew, cat_batch
from powernap.model.health import FastWeightHealth
from powernap.model.mixers.module import MixerModule
from powernap.model.recompute import Recompute
from powernap.model.segments import HEAD_NUMBERS, Segment
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel import host_inputs, schedule
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.topology import init_distributed, shutdown_distributed
from powernap.train import trainer
from powernap.train.data.loader import Batch
from tests.helpers import tiny
from tests.helpers.processes import single_rank_groups

DATA_RANKS = 2  # at most
ANSWERS: dict[str, tuple] = {}  # one process's by problem, on rank 0: shared by all layouts of a problem
FURTHER = {  # OLMo-Hybrid's norms, a block without an MLP, and the letters that no other case has
    "pattern": "AgGSJ",
    "sliding_attention": {"heads": 2, "reach": 4},
    "attention": {
        "heads": 4,
        "kv_heads": 2,
        "qk_norm": True,
        "qk_norm_over": "width",
        "qkv_bias": True,
        "norms": "post",
    },
    "gdn": {"norms": "sandwich", "norm_eps": 1e-5},
}
GROUPED = {  # the choices of attention, gated delta net and norms
    "zero_centred_norms": True,
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "output_gate": True, "rotary_dims": 4},
    "gdn": {"heads": 4, "key_heads": 2, "scale_queries": True, "l2_eps": 1e-6},
}


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    layout: str | None = None
    recompute: Recompute = "none"
    offload_inputs: bool = False
    windows: int = 3
    predicting: tuple[int, ...] = (2,)
    last_window: int = tiny.WINDOW  # tokens of the last window
    pads: bool = False
    separate: bool = (
        False  # rows of several documents, in place of `windows` and `predicting`: each is compared with itself alone
    )
    probes: bool = False  # after each of the windows, in place of `predicting`
    passes: int = 2
    micro_batches: int = 2
    head_numbers: int = HEAD_NUMBERS  # logits in a chunk
    dropout: float = 0.0
    unequal: bool = False  # sequences differ in their number of loss tokens, and the trainer scales the loss
    model: dict = field(default_factory=dict)
    sleep: dict = field(default_factory=dict)
    broken: str | None = None  # break this on purpose: the comparison must see it

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def compare(case: Case, **process_group) -> dict:
    """Run one case; the relative error of the loss and of this rank's worst gradient."""
    topology = init_distributed(case.tensor, case.pipeline, timeout_seconds=60, **process_group)
    model, sleep = tiny.model_config(**{"vocab_size": 20, **case.model}), SleepConfig(**case.sleep)
    stage_module.HEAD_NUMBERS = HEAD_NUMBERS  # one process has no chunks
    batches = [micro_batch(case, model, sleep, seed) for seed in range(case.micro_batches * case.data)]
    loss_tokens = sum(int(batch.loss_mask[:, 1:].sum()) for batch in batches)
    scale = case.data / loss_tokens if case.unequal else 0.37  # ZeRO averages over ranks, here they are summed
    loss, expected, predictions, left, health = one_process(case, model, sleep, batches, scale)

    stage_module.HEAD_NUMBERS = case.head_numbers
    blocks = split_layers(model.pattern, case.pipeline, case.layout)[topology.pp_rank]
    with broken(case.broken):
        stage = build(model, sleep, topology.groups, blocks, case.sequence)
    stage.dropout = case.dropout
    own = batches[topology.dp_rank :: case.data]
    if sleep.carry:
        for batch in own:
            lost = case.broken == "carried fast weights"
            batch.layer_states = None if lost else own_states(batch.layer_states, stage, topology)
    with broken(case.broken), watched_sends(case) as freed:
        if case.unequal:
            metrics = train_step(case, stage, own, topology)
            own_loss = metrics["loss"] * loss_tokens
            reference = health[topology.dp_rank]  # of this model's first micro-batch
            watched = max(abs(metrics[name] / value - 1) for name, value in reference.items())
        else:
            own_loss = schedule.forward_backward(
                stage, own, scale, topology, recompute=case.recompute, offload_inputs=case.offload_inputs
            )
            schedule.sum_shared_gradients(stage, topology)
            own_loss = topology.all_reduce_over_data(own_loss).item()
    worst = {"error": 0.0, "name": None}
    for name, parameter in stage.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        topology.all_reduce_over_data(gradient)
        reference = expected[stage.global_name(name)]
        difference = (gradient - own_slice(reference, parameter, topology)).abs().max() / (
            reference.abs().max() + 1e-12
        )
        if not difference <= worst["error"]:
            worst = {"error": difference.item(), "name": stage.global_name(name)}
    read, read_losses, read_left = schedule.predict(stage, own[0], topology)
    carried = 0.0
    if sleep.carry:
        reference = own_states(left[topology.dp_rank], stage, topology)  # of own[0]
        carried = max(
            (found - expected).abs().max().item()
            for layer_states in (own[0].left, read_left)
            for found, expected in zip(layer_states, reference, strict=True)
        )
    expected_losses = predictions[topology.dp_rank][1]
    result = {
        "loss": abs(own_loss / loss - 1),
        "gradient": worst,
        "predictions": torch.equal(read, predictions[topology.dp_rank][0]),
        "read_losses": ((read_losses - expected_losses).abs().max() / expected_losses.max()).item(),
        "carried": carried,
        "freed": len(freed),
        "health": watched if case.unequal else 0.0,
        "counted": trainer.count_parameters(stage, topology) / sum(gradient.numel() for gradient in expected.values()),
        "parameters": len(list(stage.parameters())),
    }
    shutdown_distributed()
    return result


def micro_batch(case: Case, model, sleep, seed: int) -> schedule.MicroBatch:
    tokens, loss_mask = tiny.batch(2, case.windows, case.predicting, seed, min(17, model.vocab_size))
    stop = tokens.shape[1] - tiny.WINDOW + case.last_window
    tokens, loss_mask = tokens[:, :stop], loss_mask[:, :stop]
    starts = None
    if case.separate:
        tokens, loss_mask, starts = tiny.separate_batch(seed, tiny.ROWS[seed % 2 * 2 :][:2])
    if case.probes:
        tokens, loss_mask, _ = tiny.batch_with_probes(2, case.windows, seed)
    if case.pads:
        tokens[seed % 2, : 2 + seed % 3] = model.pad_token_id
    if case.unequal:
        loss_mask = tiny.thin_out(loss_mask, seed)
    segments = plan_segments(tokens, loss_mask, model, sleep, case.passes, probes_of(case), separate=starts is not None)
    if case.dropout:
        segments = seeded(segments, tokens)
    layer_states = None
    if sleep.carry:
        shapes = [(len(tokens), *model.mixers[block].state_shape) for block in model.fast_weight_blocks]
        generator = torch.Generator().manual_seed(seed)
        layer_states = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return schedule.MicroBatch.on(tokens.device, segments, tokens, loss_mask, layer_states, starts)


def seeded(segments: list[Segment], tokens: torch.Tensor) -> list[Segment]:
    """With dropout, as in some step."""
    return [replace(segment, dropout_seeds=row_seeds(tokens, 1, 2)) for segment in segments]


def probes_of(case: Case) -> list[tuple[int, int]]:
    return tiny.batch_with_probes(windows=case.windows)[2] if case.probes else []


def train_step(case: Case, stage: HybridStage, own: list[schedule.MicroBatch], topology) -> dict:
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
            "offload_inputs": case.offload_inputs,
        },
        optimizer={"warmup_steps": 0},
        parallel={"data": case.data, "tensor": case.tensor, "pipeline": case.pipeline, "sequence": case.sequence},
    )
    starts = torch.cat([part.document_starts for part in own]) if case.separate else None
    begins = torch.ones(len(tokens), dtype=torch.bool)
    batch = Batch(tokens, loss_mask, begins, [], probes_of(case), document_starts=starts)
    metrics, _ = trainer.train_step(recipe, stage, NoOptimizer(stage, topology), batch, 1, topology)
    return metrics


class NoOptimizer:
    """In place of ZeroOptimizer, which has no float64: averages nothing, steps nothing."""

    param_groups = ()

    def __init__(self, stage: HybridStage, topology):
        self.stage, self.topology = stage, topology

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        yield
        schedule.sum_shared_gradients(self.stage, self.topology)

    def skip_step_if_nonfinite(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> float:
        return 0.0


def own_states(layer_states, stage: HybridStage, topology) -> tuple[torch.Tensor, ...]:
    """The blocks and heads that this rank holds of the whole model's fast weights."""
    states = dict(zip(stage.model.fast_weight_blocks, layer_states, strict=True))
    return tuple(states[block].chunk(topology.tp_size, 1)[topology.tp_rank] for block in stage.fast_weight_mixers)


def one_process(case: Case, model, sleep, batches, scale: float):
    """Loss, gradients by name, predictions, layer states left and health of the loop on rank 0 alone, on all ranks."""
    found, groups = [None], single_rank_groups()
    of_data = (case.windows, case.predicting, case.last_window, case.pads, case.probes, case.unequal, len(batches),
               case.separate, case.dropout)  # fmt: skip
    key = repr((model, sleep, case.passes, scale, of_data))
    if dist.get_rank() == 0:
        if key not in ANSWERS:
            stage = build(model, sleep, groups)
            stage.dropout = case.dropout
            ANSWERS[key] = compute_alone(stage, batches, case.passes, scale, probes_of(case))
        found = [ANSWERS[key]]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def compute_alone(
    stage: HybridStage, batches: list[schedule.MicroBatch], passes: int, scale: float, probes: list[tuple[int, int]]
) -> tuple:
    """Loss and gradients of all micro-batches as one; the rest for the first of each data-parallel rank."""
    predictions, left, healths = [], [], []
    for batch in batches[:DATA_RANKS]:
        health = FastWeightHealth(stage)
        with torch.no_grad():
            output = sleep_and_predict(
                stage,
                batch.segments,
                batch.tokens,
                batch.loss_mask,
                layer_states=batch.layer_states,
                document_starts=batch.document_starts,
                predict=True,
                health=health,
            )
        healths.append(health.summary())
        predictions.append((output.predictions, output.token_losses))
        left.append(output.layer_states)
    tokens, loss_mask = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "loss_mask"))
    if batches[0].document_starts is not None:
        tokens, loss_mask = tiny.alone(tokens, loss_mask, torch.cat([batch.document_starts for batch in batches]))
    layer_states = cat_batch([batch.layer_states for batch in batches]) if stage.sleep.carry else None
    segments = plan_segments(tokens, loss_mask, stage.model, stage.sleep, passes, probes)
    segments = seeded(segments, tokens) if stage.dropout else segments
    loss = sleep_and_predict(stage, segments, tokens, loss_mask, layer_states=layer_states, recompute="none").loss
    (loss * scale).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.named_parameters()}
    return loss.item(), gradients, predictions, left, healths


def build(model, sleep, groups, blocks=None, sequence_parallel=False) -> HybridStage:
    torch.manual_seed(0)
    stage = HybridStage(model, sleep, groups, blocks=blocks, sequence_parallel=sequence_parallel).double()
    for name, parameter in stage.named_parameters():  # norms away from one, the same on every rank
        if "norm" in name and parameter.ndim == 1:
            first = groups.tp.rank() * parameter.numel() if getattr(parameter, "tensor_model_parallel", False) else 0
            numbers = torch.arange(first, first + parameter.numel())
            with torch.no_grad():
                parameter += 0.1 * torch.sin(numbers + float(len(stage.global_name(name))))
    return stage


def own_slice(full: torch.Tensor, parameter: torch.Tensor, topology) -> torch.Tensor:
    """This tensor rank's part of a weight or gradient."""
    if not getattr(parameter, "tensor_model_parallel", False) or topology.tp_size == 1:
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    if pads := -full.shape[dim] % topology.tp_size:
        full = torch.cat([full, full.new_zeros(pads, *full.shape[1:])])
    parts = full.chunk(topology.tp_size * stride, dim)  # stride 2: gate and up of the SwiGLU are split each
    return torch.cat(parts[topology.tp_rank :: topology.tp_size], dim)


def mean_of_rank_means(stage, micro_batches, loss_scale, topology, **options):
    """Each data rank divides by its own loss tokens, as if all had the same number."""
    own = sum(int(batch.loss_mask[:, 1:].sum()) for batch in micro_batches)
    return schedule.forward_backward(stage, micro_batches, 1 / own, topology, **options)


def mean_of_micro_batch_means(stage, micro_batches, loss_scale, topology, **options):
    """Each micro-batch is divided by its own loss tokens; one after the other, since a call has one scale."""
    parts = []
    for batch in micro_batches:
        scale = 1 / len(micro_batches) / int(batch.loss_mask[:, 1:].sum())
        parts.append(schedule.forward_backward(stage, [batch], scale, topology, **options))
    return sum(parts)


MEANS = {"global token mean, ranks": mean_of_rank_means, "global token mean, micro-batches": mean_of_micro_batch_means}


@contextmanager
def watched_sends(case: Case):
    """Messages whose memory is freed before the sender has waited for them, while NCCL may still read it.

    As in NCCL and gloo a message holds its tensor, not the memory that the tensor had when sending began.
    """
    isend, freed = dist.isend, []

    class Sending:
        def __init__(self, tensor, work):
            self.tensor, self.storage, self.work = tensor, StorageWeakRef(tensor.untyped_storage()), work

        def wait(self):
            if self.storage.expired():
                freed.append(self)
            return self.work.wait()

    # A copy is sent: gloo must neither keep the memory alive nor suffer from the faults found here.
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

    run_pass, window, own_vocabulary = HybridStage.run_pass, HybridStage._window, HybridStage.own_vocabulary

    def remembering(stage, segment, *arguments):
        return run_pass(stage, replace(segment, probe=False), *arguments)

    def without_gradient(stage, segment, tokens, hidden_states, layer_states, *others):
        read = tuple(state.detach() for state in layer_states) if segment.probe else layer_states
        hidden_states, left = run_pass(stage, segment, tokens, hidden_states, read, *others)
        return hidden_states, layer_states if segment.probe else left

    mask = Dropout.mask

    def of_the_first_rank(dropout, values, block, place):
        return mask(replace(dropout, shard=0), values, block, place)

    def drawn_anew(dropout, values, block, place):
        return (torch.rand_like(values) >= dropout.rate).to(values.dtype) / (1 - dropout.rate)

    checkpointed, copied = recompute_module._checkpointed, host_inputs.HostInputs._copied
    seen: list[torch.Tensor] = []

    def from_the_input_before(inside, keeping, selective, function, hidden_states, *others):
        seen.append(hidden_states)
        before, calls = seen[-2:][0], []

        def run(hidden_states, *others):
            calls.append(None)
            if len(calls) > 1 and hidden_states is not None and before is not None:
                hidden_states = before.detach().requires_grad_()
            return function(hidden_states, *others)

        return checkpointed(inside, keeping, selective, run, hidden_states, *others)

    def of_the_copy_before(inputs, tensor):
        seen.append(copied(inputs, tensor))
        return next((copy for copy in seen[-2::-1] if copy.shape == tensor.shape), seen[-1])

    def batched(*arguments):
        changed = config(*arguments)
        changed.batch_p2p_comm, changed.overlap_p2p_comm = True, False
        return changed

    if what == "fast weights' gradient":
        schedule._SegmentBoundary.backward = staticmethod(without_fast_weights)
    elif what == "shared gradients":
        schedule.sum_shared_gradients = lambda *_: None
    elif what == "forgetting":
        HybridStage.run_pass = remembering
    elif what == "probe's gradient":
        HybridStage.run_pass = without_gradient
    elif what == "inputs of blocks":
        recompute_module._checkpointed = from_the_input_before
    elif what == "inputs on the host":
        host_inputs.HostInputs._copied = of_the_copy_before
    elif what == "memory of what is sent":
        schedule.StageStep._keep = lambda self, output: None
    elif what == "links":
        schedule._schedule_config = batched
    elif what == "split of a mixer":
        MixerModule._parameter = of_the_next_rank
    elif what == "fast weights of another document":
        stage_module.begin_anew = lambda layer_states, begins: layer_states
    elif what == "keys of another document":
        HybridStage._window = lambda stage, segment, tokens, document_starts: window(stage, segment, tokens)
    elif what == "dropout of a rank's tokens":
        Dropout.mask = of_the_first_rank
    elif what == "dropout when computed again":
        Dropout.mask = drawn_anew
    elif what == "loss tokens":
        schedule.find_loss_tokens = lambda loss_mask: loss_mask.flatten().nonzero().squeeze(1)
    elif what == "pads of the vocabulary":
        HybridStage.own_vocabulary = property(lambda stage: stage._vocabulary_rows)
    elif what in MEANS:
        trainer.forward_backward = MEANS[what]
    yield
    schedule.find_loss_tokens = find_loss_tokens
    trainer.forward_backward = schedule.forward_backward
    schedule._SegmentBoundary.backward, schedule.sum_shared_gradients = backward, shared
    schedule._schedule_config, schedule.StageStep._keep = config, keep
    MixerModule._parameter, Dropout.mask = parameter, mask
    HybridStage.run_pass = run_pass
    recompute_module._checkpointed, host_inputs.HostInputs._copied = checkpointed, copied
    HybridStage._window, HybridStage.own_vocabulary = window, own_vocabulary
    stage_module.begin_anew = begin_anew
