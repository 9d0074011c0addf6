"""Run by test_loss_terms.py in its processes: one step's gradients with a loss term in a layout, against its formula on whole
logits in one process, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F

from powernap.model import loss_terms
from powernap.model import stage as stage_module
from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.loss_terms import LossTerm, LossTerms
from powernap.model.recompute import Recompute
from powernap.model.segments import HEAD_NUMBERS
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel import schedule
from powernap.parallel import teacher as teacher_module
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.teacher import Teacher
from powernap.parallel.topology import init_distributed, shutdown_distributed
from tests.helpers import layouts, tiny
from tests.helpers.processes import single_rank_groups

WEIGHT, STEP, SCALE, TEMPERATURE = 0.7, 3, 0.37, 2.5
TEACHER = tiny.model_config(pattern="AaG", hidden_size=12, window=3 * tiny.WINDOW)
EXPECTED: dict[str, tuple] = {}  # one process's, on rank 0


@dataclass(frozen=True)
class Case:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    head_numbers: int = HEAD_NUMBERS  # logits in a chunk
    predicting: tuple[int, ...] = (1, 2)
    vocab_size: int = 20
    sleep: dict = field(default_factory=dict)
    context: str | None = None  # of distillation, in place of `confidence`
    broken: str | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def confidence(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Minus the entropy, and a part that depends on the target."""
    logs = logits.log_softmax(-1)
    of_target = logs.gather(1, targets[:, None]).squeeze(1)
    return (logs.exp() * logs).sum(-1) + 0.5 * of_target.square()


def compare(case: Case, **process_group) -> dict:
    """Relative errors of the term's mean, the loss and this rank's worst gradient."""
    topology = init_distributed(case.tensor, case.pipeline, timeout_seconds=60, **process_group)
    model, sleep = tiny.model_config(vocab_size=case.vocab_size), SleepConfig(**case.sleep)
    batches = [micro_batch(case, model, sleep, seed) for seed in range(2 * case.data)]
    loss, value, expected = one_process(case, model, sleep, batches)
    blocks = split_layers(model.pattern, case.pipeline, None)[topology.pp_rank]
    stage_module.HEAD_NUMBERS = case.head_numbers
    stage = layouts.build(model, sleep, topology.groups, blocks, case.sequence)
    stage.loss_terms = LossTerms([term_of(case, topology)], stage.device)
    stage.loss_terms.begin(STEP)
    with broken(case.broken):
        found = schedule.forward_backward(
            stage, batches[topology.dp_rank :: case.data], SCALE, topology, recompute=case.recompute
        )
        schedule.sum_shared_gradients(stage, topology)
    stage_module.HEAD_NUMBERS = HEAD_NUMBERS
    sums = topology.all_reduce_over_data(topology.all_reduce_over_stages(stage.loss_terms.sums))
    worst = 0.0
    for name, parameter in stage.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        topology.all_reduce_over_data(gradient)
        reference = expected[stage.global_name(name)]
        difference = (gradient - layouts.own_slice(reference, parameter, topology)).abs().max()
        worst = max(worst, float(difference / (reference.abs().max() + 1e-12)))
    found = topology.all_reduce_over_data(found).item()
    shutdown_distributed()
    return {"loss": abs(found / loss - 1), "value": abs(sums.item() / value - 1), "gradient": worst}


def weight(step: int) -> float:
    return WEIGHT * (step == STEP)


def term_of(case: Case, topology):
    if case.context is None:
        return LossTerm("confidence", confidence, weight)
    blocks = split_layers(TEACHER.pattern, case.pipeline, None)[topology.pp_rank]
    stage = layouts.build(teacher_of(case), SleepConfig(), topology.groups, blocks, case.sequence).requires_grad_(False)
    whole = case.context == "sequence"
    return Teacher(stage, topology, weight=weight, temperature=TEMPERATURE, whole_sequence=whole)


def teacher_of(case: Case) -> ModelConfig:
    return TEACHER.model_copy(update={"vocab_size": case.vocab_size})


def taught_logits(teacher: HybridStage, tokens: torch.Tensor, window: range, context: str) -> torch.Tensor:
    """The teacher's logits in a window, [B, L, vocabulary]: of a batch that holds what it may see, and no more."""
    start = window.start if context == "window" else 0
    tokens = tokens[:, start : window.stop + 1]
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    (segment,) = plan_segments(tokens, loss_mask, teacher.model, SleepConfig(), 1)
    hidden_states, _ = teacher(segment, tokens[:, :-1], None, teacher.empty_layer_states(len(tokens)))
    return teacher.logits(hidden_states).transpose(0, 1)[:, window.start - start :]


def micro_batch(case: Case, model, sleep, seed: int) -> schedule.MicroBatch:
    tokens, loss_mask = tiny.batch(2, 3, case.predicting, seed)
    loss_mask = tiny.thin_out(loss_mask, seed)
    tokens[seed % 2, : 2 + seed % 3] = model.pad_token_id
    segments = plan_segments(tokens, loss_mask, model, sleep, 2)
    return schedule.MicroBatch.on(tokens.device, segments, tokens, loss_mask, None)


def one_process(case: Case, model, sleep, batches) -> tuple:
    """Loss, sum of the term and gradients by name, on all ranks."""
    found, groups = [None], single_rank_groups()
    key = repr((model, sleep, case.predicting, case.context, len(batches)))
    if dist.get_rank() == 0:
        if key not in EXPECTED:
            teacher = layouts.build(teacher_of(case), SleepConfig(), groups) if case.context else None
            EXPECTED[key] = formula(layouts.build(model, sleep, groups), batches, teacher, case.context)
        found = [EXPECTED[key]]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def formula(
    stage: HybridStage, batches: list[schedule.MicroBatch], teacher: HybridStage | None, context: str | None
) -> tuple:
    """Of the gradient of cross-entropy + WEIGHT x term, from the whole logits of every loss token."""
    total, values = torch.zeros(()), []
    windows: Iterator[range]

    def token_losses(hidden_states, targets, loss_mask, **_):
        logits = stage.logits(hidden_states).transpose(0, 1)[loss_mask]
        plain = F.cross_entropy(logits, targets[loss_mask], reduction="none")
        window = next(windows)
        if teacher is None:
            more = confidence(logits, targets[loss_mask])
        else:
            with torch.no_grad():
                theirs = taught_logits(teacher, batch.tokens, window, context)[loss_mask] / TEMPERATURE
            ours = (logits / TEMPERATURE).log_softmax(-1)
            more = TEMPERATURE**2 * F.kl_div(ours, theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        values.append(more.detach().sum())
        losses = plain + WEIGHT * (more - more.detach())
        return torch.zeros(targets.shape, dtype=losses.dtype).masked_scatter(loss_mask, losses)

    stage.token_losses = token_losses
    for batch in batches:
        windows = iter([segment.tokens for segment in batch.segments if segment.predicts])
        total = total + sleep_and_predict(stage, batch.segments, batch.tokens, batch.loss_mask, recompute="none").loss
    (total * SCALE).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.named_parameters()}
    return total.item(), sum(values).item(), gradients


@contextmanager
def broken(what: str | None) -> Iterator[None]:
    megatron = loss_terms.tensor_parallel
    gather, shifted = megatron.gather_from_tensor_model_parallel_region, teacher_module._shifted
    weighted, teach, read = LossTerms.weighted, schedule.StageStep.teach, Teacher._read

    def without_gradient(logits, group):
        return gather(logits.detach(), group)

    def of_other_tokens(step, numbers):
        teach(step, numbers)
        step._taught |= {n: [None if x is None else x.flip(0) for x in rows] for n, rows in step._taught.items()}

    def of_the_window_before(teacher, inputs, tokens, padded):
        return read(teacher, inputs.roll(tiny.WINDOW, 1), tokens, padded)

    if what == "gradient through the gather":
        megatron.gather_from_tensor_model_parallel_region = without_gradient
    elif what == "weight":
        LossTerms.weighted = lambda terms, values: values.sum(1)
    elif what == "sum over tensor ranks":
        teacher_module._shifted = lambda logits, group: (logits, logits.logsumexp(-1))
    elif what == "token":
        schedule.StageStep.teach = of_other_tokens
    elif what == "window":
        Teacher._read = of_the_window_before
    yield
    teacher_module._shifted = shifted
    megatron.gather_from_tensor_model_parallel_region = gather
    LossTerms.weighted, schedule.StageStep.teach, Teacher._read = weighted, teach, read
