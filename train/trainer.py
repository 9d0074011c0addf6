"""A training run, read from top to bottom: set up, take batches, step, log, checkpoint, evaluate."""

import itertools
import math
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from powernap.model.batch import pad_end, plan_segments
from powernap.model.compiled import compile_functions
from powernap.model.fast_weights import LayerStates, cat_batch
from powernap.model.health import FastWeightHealth
from powernap.model.loss_terms import LossTerm, LossTerms, Term
from powernap.model.parameters import parameters
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.manifest import CheckpointError
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.shards import whole_shape
from powernap.parallel.checkpoint.writer import Writer
from powernap.parallel.malloc import freed_memory_returned
from powernap.parallel.schedule import forward_backward
from powernap.parallel.topology import Topology, distributed_session
from powernap.parallel.zero.early_partition import EarlyPartition
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.batches import check_same_segments, cut_batch, fingerprint, read_batches, seed_dropout
from powernap.train.callbacks import Callback, Callbacks
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch, State, merge_states
from powernap.train.data.sample import DataError
from powernap.train.distillation import build_teacher
from powernap.train.evaluation.evaluate import evaluate, evaluation_passes
from powernap.train.lr_schedule import lr_factor
from powernap.train.numerics.anomaly import anomalies_detected
from powernap.train.numerics.deterministic import deterministic
from powernap.train.numerics.gradient_noise import GradientNoise
from powernap.train.numerics.skipped_steps import SkippedSteps
from powernap.train.numerics.spikes import Spikes
from powernap.train.optimizer import build_optimizer, set_lr
from powernap.train.run import branch
from powernap.train.run.folder import RunFolder, work_of
from powernap.train.run.provenance import versions
from powernap.train.run.resume import Past
from powernap.train.run.secrets import mask_values
from powernap.train.run.signals import Signals
from powernap.train.run.start import Source, Start, find_together
from powernap.train.tracking.run_log import RunLog


def train(
    recipe: Recipe,
    signals: Signals,
    resume: bool = False,
    detect_anomaly: bool = False,
    callbacks: Sequence[Callback] = (),
    loss_terms: Sequence[LossTerm] = (),
) -> bool:
    """Run `recipe` in this process and its peers; with `resume`, from the newest valid checkpoint in the run's folder.

    Args:
        signals: if any rank's ask to stop, all ranks stop after the same step and save a checkpoint of it.
        detect_anomaly: end the run at the first non-finite number; see anomaly.py.
        callbacks: see callbacks.py.
        loss_terms: see model/loss_terms.py.

    Returns:
        whether the run is finished; False: it was asked to stop
    """
    parallel = recipe.parallel
    with (
        deterministic(recipe.train.deterministic),
        distributed_session(parallel.tensor, parallel.pipeline, timeout_seconds=parallel.timeout_seconds) as topology,
        RunFolder(recipe.run_folder).locked(topology),
    ):
        trainer = Trainer(recipe, topology, resume, callbacks, loss_terms)
        with trainer.log, anomalies_detected(trainer.stage, topology, detect_anomaly):
            with signals.saving():
                stopped = trainer.train(signals)
        topology.progress.note("waiting for the other ranks to be done")
        topology.barrier()  # torchrun kills all ranks once one exits with an error code, as after a stop
    return not stopped


@dataclass
class TrainState:
    """What the next step needs besides weights and optimizer states; saved in checkpoints."""

    step: int = 0  # the last one completed
    data: State | None = None  # of the sample stream after that step; None: at its start, or on ranks that do not read
    unusable: int = 0  # samples and shards left out so far
    layer_states: LayerStates | None = None  # under sleep.carry, of this stage's sequences; None before the first step


class Trainer:
    """A run on this rank: model, optimizer, data, log. All ranks hold one and call it together."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        resume: bool,
        callbacks: Sequence[Callback] = (),
        loss_terms: Sequence[LossTerm] = (),
    ):
        self.recipe, self.topology = recipe, topology
        self.callbacks = Callbacks(callbacks)
        self._stops = False
        self.folder = folder = RunFolder(recipe.run_folder)
        start, self.passed_over = find_checkpoint(folder, topology) if resume else (None, [])
        source = find_together(recipe, topology) if recipe.train.start_from and not start else None
        branches = recipe.train.branch_from is not None and not start
        if branches:
            start = branch.open_together(recipe, topology)
        self.notes = source.describe(recipe) if source else []  # what the log says of the start
        topology.raise_together(partial(self.begin, start, source, resume, branches))
        opened = Start(source, recipe, topology) if source else None
        self.stage, self.zero = build(recipe, topology, opened, draw=start is None)
        self.add_loss_terms(loss_terms)
        if self.callbacks.names:
            self.notes.append(f"callbacks: {', '.join(self.callbacks.names)}")
        self.state, skipped_steps = self.restore(start, branches) if start else (TrainState(), [])
        self.first_step = self.state.step + 1
        resume_step = self.state.step if resume or branches else None
        self.skipped_steps = SkippedSteps(recipe, folder, topology, skipped_steps, resume_step)
        self.spikes = Spikes(recipe.train.spike_factor, self.stage, topology)
        self.noise = GradientNoise(recipe.sequences_per_rank, topology.dp_size) if recipe.train.gradient_noise else None
        self.writer = checkpoint_writer(recipe, folder, topology)
        self.log = RunLog(recipe, folder, topology, resume_step)

    def begin(self, start: Checkpoint | None, source: Source | None, resume: bool, branches: bool) -> None:
        """On the main rank: make the run's folder, and record in its history what it starts from and what has changed."""
        folder, recipe = self.folder, self.recipe
        origin = source.record() if source else None
        changes = folder.past().changes(recipe) if resume else {}
        if branches:
            assert start is not None
            branch.copy_records(start.folder, folder)
            changes = Past.of_checkpoint(start.folder, start.manifest).changes(recipe, branch.OWN)
            origin = {"folder": str(start.folder), "step": start.step, "branch": True}
            self.notes.append(f"branch of {start.folder}: continues after step {start.step:,}")
        if resume and start is None:
            self.notes.append("no checkpoint to continue from: training begins at step 1")
        folder.create(recipe, origin)
        about = ({"started_from": origin} if origin else {}) | ({"changes": changes} if changes else {})
        folder.record(start.step if start else 0, **about)
        if note := frozen_note(recipe):
            self.notes.append(note)
        self.notes += [f"changed: {field}={now}, was {before}" for field, (before, now) in changes.items()]

    def add_loss_terms(self, loss_terms: Sequence[LossTerm]) -> None:
        """Those of the caller, and distillation, if the recipe has any."""
        terms: list[Term] = [*loss_terms]
        if loss_terms:
            self.notes.append(f"loss terms: {', '.join(term.name for term in loss_terms)}")
        if self.recipe.distillation.teacher:
            teacher = build_teacher(self.recipe, self.topology)
            self.notes.append(f"distillation: the teacher is {teacher.described}")
            terms.append(teacher)
        if terms:
            self.stage.loss_terms = LossTerms(terms, self.topology.device)

    def restore(self, start: Checkpoint, branches: bool) -> tuple[TrainState, list[int]]:
        """Load weights and optimizer states; returns the rest of the checkpoint, and the steps skipped before it."""
        start.load(self.stage, self.zero, self.topology)
        saved = start.state
        if not branches:  # a branch is a run of its own in MLflow
            self.topology.raise_together(lambda: self.folder.restore_mlflow_run_id(saved["mlflow_run_id"]))
        layer_states = start.load_layer_states(self.stage, self.topology) if self.recipe.sleep.carry else None
        self.callbacks.restore(saved.get("callbacks", {}))
        return TrainState(start.step, saved["data"], saved["skipped"], layer_states), saved["skipped_steps"]

    def train(self, signals: Signals) -> bool:
        """Train until all steps are done or any rank is asked to stop; returns whether one was."""
        recipe, topology, state = self.recipe, self.topology, self.state
        self.log.start(count_parameters(self.stage, topology), self.passed_over, self.notes)
        batches = read_batches(recipe, topology, state.data)
        self.callbacks.call(Callback.on_train_begin, self)
        stop = self.agree_to_stop(signals)
        while state.step < recipe.train.steps and not stop:
            signals.check()
            topology.progress.step = state.step + 1
            metrics = self.step(batches)
            self.callbacks.step_end(self, metrics)
            last = state.step == recipe.train.steps
            stop = self.agree_to_stop(signals) and not last
            if recipe.data.test and not stop and (last or is_due(state.step, recipe.evaluation.every)):
                topology.progress.note("evaluating")
                now = recipe.at(state.step)
                passes, samples = evaluation_passes(now), recipe.evaluation.samples
                found = evaluate(self.stage, now, passes, samples, topology, floors=False).metrics()
                metrics |= found
                self.callbacks.call(Callback.on_evaluate, self, found)
                stop = self.agree_to_stop(signals) and not last
            self.log.step(state.step, metrics)
            self.skipped_steps.check_budget()
            self.log.checkpoint(self.writer.news())
            if last or stop or is_due(state.step, recipe.checkpoint.every):
                self.save()
        topology.progress.note("waiting for the last checkpoint to be written")
        self.log.checkpoint(self.writer.finish())
        self.callbacks.call(Callback.on_train_end, self)
        if state.unusable:
            self.log.event("%d samples or shards could not be used", state.unusable)
        if stop:
            self.log.stopped(state.step)
        return stop

    def stop(self) -> None:
        """Stop after this step with a checkpoint, as a signal would; on any rank, for all."""
        self._stops = True

    def agree_to_stop(self, signals: Signals) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks."""
        self.topology.progress.note("agreeing with all ranks on whether to stop")
        return bool(self.topology.all_reduce_max(self._stops or signals.stop is not None))

    def step(self, batches: Iterator[tuple[Batch, State | None]]) -> dict[str, Any]:
        """Read a batch, step, log skips and spikes; returns the step's metrics."""
        recipe, topology, state, step = self.recipe, self.topology, self.state, self.state.step + 1
        topology.progress.note("reading the batch")
        batch, state.data = next(batches)
        if step == self.first_step:
            topology.raise_together(partial(write_work, self.folder, recipe, batch))
        metrics, state.layer_states = train_step(
            recipe, self.stage, self.zero, batch, step, topology, state.layer_states
        )
        norms = self.zero.gradient_norms
        assert norms is not None
        if self.noise:
            assert self.zero.mean_square_norm is not None
            metrics |= self.noise.add(self.zero.mean_square_norm, metrics["grad_norm"])
        if "skipped_step" in metrics:
            line, state.layer_states = self.skipped_steps.add(
                step, metrics, batch, self.stage, norms, state.layer_states
            )
            self.log.event("%s", line)
        else:
            for line in self.spikes.check(step, metrics, norms):
                self.log.event("%s", line)
        self.count_unusable(step, metrics.pop("unusable", []))
        state.step = step
        return metrics

    def count_unusable(self, step: int, reasons: list[str]) -> None:
        """Count and log samples and shards left out. Raises DataError if they exceed data.skip_budget."""
        budget = self.recipe.data.skip_budget
        for reason in reasons:
            self.state.unusable += 1
            self.log.event("step %d, done without: %s", step, reason)
            if self.state.unusable > budget:
                raise DataError(f"more than data.skip_budget={budget} skipped; last: {reason}")

    def save(self) -> None:
        """Start writing a checkpoint of the last step."""
        topology, state = self.topology, self.state
        self.callbacks.call(Callback.on_save, self)
        topology.progress.note("saving a checkpoint")
        states = topology.all_gather_over_data(state.data)
        state.data = merge_states(states) if topology.is_data_source else None
        saved = {
            "data": state.data,
            "skipped": state.unusable,
            "skipped_steps": self.skipped_steps.steps,
            "mlflow_run_id": self.folder.mlflow_run_id,
        }
        if callbacks := self.callbacks.states():
            saved["callbacks"] = callbacks
        self.writer.save(state.step, self.stage, self.zero, saved, state.layer_states)


def find_checkpoint(folder: RunFolder, topology: Topology) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, verified by all ranks, and why newer ones were passed over.

    Raises:
        CheckpointError: if there are checkpoints, but none is valid.
    """
    topology.progress.note("checking the checkpoints")
    checkpoint, passed_over = Checkpoint.newest(folder.checkpoints, topology)
    if passed_over and not checkpoint:
        raise CheckpointError(
            f"no checkpoint of {folder.path} is whole: {passed_over[0]}; put a good one back, or start a new run"
        )
    return checkpoint, passed_over


def checkpoint_writer(recipe: Recipe, folder: RunFolder, topology: Topology) -> Writer:
    about = {"versions": versions(), "config": mask_values(recipe.model_dump(mode="json"))}
    config = recipe.checkpoint
    return Writer(
        folder.checkpoints,
        topology,
        about,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        asynchronous=config.asynchronous,
    )


def build(
    recipe: Recipe, topology: Topology, start: Start | None = None, draw: bool = True
) -> tuple[HybridStage, ZeroOptimizer]:
    """This rank's part of the model with its initial weights, and its optimizer.

    Weights are drawn from the same seed on every rank, but for those that `start` has. A rank never holds more than its part
    of the weights and one block, which is drawn or read before ZeRO 3 splits it.

    Args:
        draw: False: weights and states come from a checkpoint next.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for mixer in dict.fromkeys(recipe.model.mixers):
        mixer.check_kernels(dtype, topology.device)
    torch.manual_seed(recipe.run.seed)
    partition = EarlyPartition(topology, recipe.train.precision) if recipe.zero.stage == 3 else None

    def built(name: str, module: torch.nn.Module) -> None:
        if start:
            start.weights(name, module)
        if partition:
            partition(module)

    with freed_memory_returned():
        stage = HybridStage(
            recipe.model,
            recipe.sleep,
            topology.groups,
            blocks=recipe.stage_blocks[topology.pp_rank],
            sequence_parallel=recipe.parallel.sequence,
            draw=draw and (not start or bool(start.source.drawn(recipe))),
            built=built,
        ).to(topology.device)
    stage.z_loss, stage.dropout = recipe.train.z_loss, recipe.train.dropout
    zero = ZeroOptimizer(
        stage,
        build_optimizer(stage, recipe.optimizer, recipe.train.trains),
        topology,
        precision=recipe.train.precision,
        clip=recipe.optimizer.clip,
        micro_batch_size=recipe.micro_batch_size,
        zero_stage=recipe.zero.stage,
        offload=recipe.zero.offload,
        ema=recipe.train.ema,
        compare_ranks=recipe.train.gradient_noise,
    )
    if start and recipe.train.start_optimizer:
        start.optimizer(stage, zero)
    if recipe.train.compile:
        compile_functions()
    return stage, zero


def frozen_note(recipe: Recipe) -> str | None:
    """What a run trains, if that is not all."""
    weights = parameters(recipe.model, recipe.sleep, range(recipe.model.num_layers))
    sizes = {weight.name: weight.size() for weight in weights}
    trained = [name for name in sizes if recipe.train.trains(name)]
    if len(trained) == len(sizes):
        return None
    return f"trains {sum(sizes[name] for name in trained):,} of {sum(sizes.values()):,} parameters, in {len(trained)} of {len(sizes)} tensors"


def count_parameters(stage: HybridStage, topology: Topology) -> int:
    """Parameters of the whole model."""
    sizes = {
        stage.global_name(name): float(math.prod(whole_shape(p, topology.tp_size)))
        for name, p in stage.named_parameters()
    }
    return round(sum(topology.merge_over_model(sizes).values()))


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def train_step(
    recipe: Recipe,
    stage: HybridStage,
    zero: ZeroOptimizer,
    batch: Batch,
    step: int,
    topology: Topology,
    layer_states: LayerStates | None = None,
) -> tuple[dict[str, Any], LayerStates | None]:
    """One optimizer step on this rank's share of the global batch.

    Args:
        layer_states: under sleep.carry, those of this stage's sequences after the previous step; None at the first.

    Returns:
        the step's metrics over all ranks, with "skipped_step" if loss or gradient was not finite and nothing changed,
        and with "unusable", a list of reasons, if samples or shards were left out; and the layer states for the next
        step, None without sleep.carry
    """
    start = time.perf_counter()
    recipe = recipe.at(step)
    if (recipe.model.window, recipe.sleep.eviction) != (stage.model.window, stage.sleep.eviction):
        stage.adopt(recipe.model, recipe.sleep)
    if stage.loss_terms:
        stage.loss_terms.begin(step)
    passes = draw_passes(recipe, step)
    micro_batches = cut_batch(recipe, batch, passes, topology, layer_states)
    if recipe.train.dropout:
        seed_dropout(micro_batches, batch, recipe.run.seed, step)
    if recipe.zero.stage == 3:
        check_same_segments(micro_batches, topology)
    topology.progress.note("counting the loss tokens of all data ranks")
    # The loss is a mean over the loss tokens of the *global* batch, wherever they fell. ZeRO averages over ranks.
    counts = [int(batch.loss_mask[:, 1:].sum()), len(batch.unusable), fingerprint(batch.tokens)]
    loss_tokens, unusable, samples = topology.all_reduce_over_data(
        torch.tensor(counts, device=topology.device)
    ).tolist()
    if not loss_tokens:
        raise DataError(f"step {step}: no sequence of the batch holds a loss token")
    watched = step == 1 or step % recipe.train.log_every == 0
    health = FastWeightHealth(stage) if watched else None
    scale = topology.dp_size / loss_tokens
    with zero.accumulation():
        loss = forward_backward(
            stage,
            micro_batches,
            scale,
            topology,
            recompute=recipe.train.recompute,
            offload_inputs=recipe.train.offload_inputs,
            health=health,
        )
        zero.skip_step_if_nonfinite(loss)
    factor = lr_factor(step, recipe.train.steps, recipe.optimizer)
    set_lr(zero.param_groups, factor)
    topology.progress.note("averaging gradients over data ranks and stepping the optimizer")
    grad_norm = zero.step()
    loss = float(topology.all_reduce_over_data(loss)) / loss_tokens
    seconds = time.perf_counter() - start
    tokens = recipe.train.global_batch_size * (recipe.data.sequence_length - 1)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": recipe.optimizer.lr * factor,
        "tokens": tokens,
        "seconds": seconds,
        "passes": passes,
        "samples": f"{samples:x}",
    }
    if stage.loss_terms and stage.loss_terms.active:
        sums = topology.all_reduce_over_data(topology.all_reduce_over_stages(stage.loss_terms.sums))
        metrics |= zip(stage.loss_terms.names, (sums / loss_tokens).tolist(), strict=True)
    if not math.isfinite(grad_norm):
        metrics["skipped_step"] = True
    if unusable:
        metrics["unusable"] = [reason for part in topology.all_gather_over_data(batch.unusable) for reason in part]
    if health:
        metrics["tokens_per_second"] = tokens / seconds
        metrics["peak_memory_bytes"] = peak_memory_bytes(topology.device)
        metrics.update(topology.merge_over_model(health.summary()))
    if not recipe.sleep.carry:
        return metrics, None
    states = [micro_batch.left for micro_batch in micro_batches if micro_batch.left is not None]
    assert len(states) == len(micro_batches)
    return metrics, cat_batch(states)


def write_work(folder: RunFolder, recipe: Recipe, batch: Batch) -> None:
    """Record for reports what a step computes, from the windows of the first micro-batch. Raises OSError."""
    size = recipe.micro_batch_size
    tokens, loss_mask = batch.tokens[:size], batch.loss_mask[:size]
    tokens, loss_mask = pad_end(tokens, loss_mask, recipe.sequence_shards, recipe.model.pad_token_id)
    predicts = []
    for _, phase in recipe.phases:
        segments = plan_segments(
            tokens,
            loss_mask,
            phase.model,
            phase.sleep,
            max(phase.sleep.pass_choices),
            batch.probes,
            phase.sequence_shards,
            separate=batch.document_starts is not None,
        )
        windows = itertools.groupby(segments, key=lambda segment: segment.window)
        predicts.append([any(segment.predicts for segment in same) for _, same in windows])
    folder.write_work(work_of(recipe, predicts, batch.probes))


def draw_passes(recipe: Recipe, step: int) -> int:
    """N of this step. It depends only on seed and step, so it is the same on every rank and after a resume."""
    choices, weights = recipe.sleep.pass_choices, recipe.sleep.pass_weights
    generator = random.Random(f"{recipe.run.seed}/{step}")
    if len(choices) == 1:
        return choices[0]
    return generator.choices(choices, weights)[0] if weights else generator.choice(choices)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
