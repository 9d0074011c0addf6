"""A training run, read from top to bottom: set up, take batches, step, log, checkpoint, evaluate."""

import itertools
import math
import random
import resource
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from powernap.model.batch import SegmentError, pad_end, plan_segments
from powernap.model.fast_weights import Memory, cat_batch, reset_rows, split_batch
from powernap.model.health import FastWeightHealth
from powernap.model.stage import HybridStage
from powernap.parallel import topology
from powernap.parallel.checkpoint.manifest import CheckpointError
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import Writer
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology
from powernap.parallel.zero import ZeroOptimizer
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch, State, merge_states, training_batches
from powernap.train.data.sample import DataError
from powernap.train.evaluation.evaluate import evaluate, evaluation_passes
from powernap.train.numerics.anomaly import anomalies_detected
from powernap.train.numerics.deterministic import deterministic
from powernap.train.numerics.skipped_steps import SkippedSteps
from powernap.train.numerics.spikes import Spikes
from powernap.train.optimizer import build_optimizer, lr_factor, set_lr
from powernap.train.run.folder import RunFolder, work_of
from powernap.train.run.provenance import versions
from powernap.train.run.secrets import mask_values
from powernap.train.run.signals import Signals
from powernap.train.tracking.run_log import RunLog


def train(recipe: Recipe, signals: Signals, resume: bool = False, detect_anomaly: bool = False) -> bool:
    """Run `recipe` in this process and its peers; with `resume`, from the newest whole checkpoint of the run's folder.

    Args:
        signals: when any rank's ask to stop, all stop after the same step, with a checkpoint of it.
        detect_anomaly: the first number that is not finite ends the run: see anomaly.py.

    Returns:
        whether the run is done; False: it was asked to stop
    """
    parallel = recipe.parallel
    with (
        deterministic(recipe.train.deterministic),
        topology.joined(parallel.tensor, parallel.pipeline, timeout_seconds=parallel.timeout_seconds) as here,
        RunFolder(recipe.run_folder).locked(here),
    ):
        folder = RunFolder(recipe.run_folder)
        start, passed_over = find_checkpoint(folder, here) if resume else (None, [])
        here.raise_together(lambda: folder.create(recipe))

        stage, zero = build(recipe, here)
        done = 0
        state: dict[str, Any] = {"data": None, "skipped": 0, "skipped_steps": []}
        memory: Memory | None = None
        if start:
            start.load(stage, zero, here)
            done, state = start.step, start.state
            here.raise_together(lambda: folder.restore_mlflow_run_id(state["mlflow_run_id"]))
            if recipe.sleep.carry:
                memory = start.load_memory(stage, here)
        skipped, data_state = state["skipped"], state["data"]
        resume_step = done if resume else None
        skipped_steps = SkippedSteps(recipe, folder, here, state["skipped_steps"], resume_step)
        spikes = Spikes(recipe.train.spike_factor, stage, here)
        writer = checkpoint_writer(recipe, folder, here)
        with RunLog(recipe, folder, here, resume_step) as log, anomalies_detected(stage, here, detect_anomaly):
            log.start(count_parameters(stage, here), passed_over)
            batches = read_batches(recipe, here, data_state)
            stop = agree_to_stop(signals, here)
            for step in range(done + 1, recipe.train.steps + 1):
                if stop:
                    break
                signals.check()
                here.progress.step = step
                here.progress.note("reading the batch")
                batch, data_state = next(batches)
                if step == done + 1:
                    here.raise_together(partial(write_work, folder, recipe, batch))
                metrics, memory = train_step(recipe, stage, zero, batch, step, here, memory)
                assert zero.gradient_norms is not None
                if "skipped_step" in metrics:
                    line, memory = skipped_steps.add(step, metrics, batch, stage, zero.gradient_norms, memory)
                    log.event("%s", line)
                else:
                    for line in spikes.look(step, metrics, zero.gradient_norms):
                        log.event("%s", line)
                for reason in metrics.pop("skipped", []):
                    skipped += 1
                    log.event("step %d, done without: %s", step, reason)
                    if skipped > recipe.data.skip_budget:
                        raise DataError(f"more than data.skip_budget={recipe.data.skip_budget} skipped; last: {reason}")
                last = step == recipe.train.steps
                stop = agree_to_stop(signals, here) and not last
                if recipe.data.test and not stop and (last or is_due(step, recipe.evaluation.every)):
                    passes, samples = evaluation_passes(recipe), recipe.evaluation.samples
                    here.progress.note("evaluating")
                    metrics |= evaluate(stage, recipe, passes, samples, here, floors=False).metrics()
                log.step(step, metrics)
                skipped_steps.check_budget()
                log.checkpoint(writer.news())
                if last or stop or is_due(step, recipe.checkpoint.every):
                    here.progress.note("saving a checkpoint")
                    states = here.all_gather_over_data(data_state)
                    data_state = merge_states(states) if here.is_data_source else None
                    state = {
                        "data": data_state,
                        "skipped": skipped,
                        "skipped_steps": skipped_steps.steps,
                        "mlflow_run_id": folder.mlflow_run_id,
                    }
                    writer.save(step, stage, zero, state, memory)
            here.progress.note("waiting for the last checkpoint to be written")
            log.checkpoint(writer.finish())
            if skipped:
                log.event("%d samples or shards could not be used", skipped)
            if stop:
                log.stopped(here.progress.step or done)
        here.progress.note("waiting for the other ranks to be done")
        here.barrier()  # torchrun ends all when the first one leaves
    return not stop


def find_checkpoint(folder: RunFolder, here: Topology) -> tuple[Checkpoint | None, list[str]]:
    """What to go on from, checked by all ranks, and why newer checkpoints were passed over.

    Raises:
        CheckpointError: if there are checkpoints, and none is whole.
    """
    here.progress.note("checking the checkpoints")
    found, passed_over = Checkpoint.newest(folder.checkpoints, here)
    if passed_over and not found:
        raise CheckpointError(
            f"no checkpoint of {folder.path} is whole: {passed_over[0]}; put a good one back, or start a new run"
        )
    return found, passed_over


def checkpoint_writer(recipe: Recipe, folder: RunFolder, here: Topology) -> Writer:
    about = {"versions": versions(), "config": mask_values(recipe.model_dump(mode="json"))}
    wanted = recipe.checkpoint
    return Writer(
        folder.checkpoints,
        here,
        about,
        keep_last=wanted.keep_last,
        keep_every=wanted.keep_every,
        asynchronous=wanted.asynchronous,
    )


def agree_to_stop(signals: Signals, here: Topology) -> bool:
    """Whether any rank was asked to; the same answer on all."""
    here.progress.note("agreeing with all ranks on whether to stop")
    return bool(here.all_reduce_max(signals.stop is not None))


def build(recipe: Recipe, here: Topology) -> tuple[HybridStage, ZeroOptimizer]:
    """The model with its first weights, the same on every rank, and the optimizer around it."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for mixer in dict.fromkeys(recipe.model.mixers):
        mixer.check_kernels(dtype, here.device)
    torch.manual_seed(recipe.run.seed)
    blocks = recipe.stage_blocks[here.pp_rank]
    stage = HybridStage(
        recipe.model, recipe.sleep, here.groups, blocks=blocks, sequence_parallel=recipe.parallel.sequence
    ).to(here.device)
    zero = ZeroOptimizer(
        stage,
        build_optimizer(stage, recipe.optimizer),
        here,
        precision=recipe.train.precision,
        clip=recipe.optimizer.clip,
        micro_batch_size=recipe.micro_batch_size,
        level=recipe.zero.stage,
        offload=recipe.zero.offload,
    )
    return stage, zero


def count_parameters(stage: HybridStage, here: Topology) -> int:
    """Parameters of the whole model."""
    sizes = {
        # ZeRO-3 leaves a shard of a parameter here, and its whole size in ds_numel.
        stage.global_name(name): getattr(p, "ds_numel", p.numel())
        * (here.tp_size if getattr(p, "tensor_model_parallel", False) else 1)
        for name, p in stage.named_parameters()
    }
    return round(sum(here.merge_over_model(sizes).values()))


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def train_step(
    recipe: Recipe,
    stage: HybridStage,
    zero: ZeroOptimizer,
    batch: Batch,
    step: int,
    here: Topology,
    memory: Memory | None = None,
) -> tuple[dict[str, Any], Memory | None]:
    """One optimizer step on this rank's share of the global batch.

    Args:
        memory: under sleep.carry what this stage's sequences left in the step before; None at the first.

    Returns:
        the step's metrics over all ranks, with "skipped_step" if it changed nothing since loss or gradient are not
        finite; and what the sequences leave for the next step, None without sleep.carry
    """
    start = time.perf_counter()
    passes = draw_passes(recipe, step)
    micro_batches = cut_batch(recipe, batch, passes, here, memory)
    if recipe.zero.stage == 3:
        check_same_segments(micro_batches, here)
    here.progress.note("counting the loss tokens of all data ranks")
    # The loss is a mean over the loss tokens of the *global* batch, wherever they fell. ZeRO averages over ranks.
    counts = [int(batch.loss_mask[:, 1:].sum()), len(batch.skipped), fingerprint(batch.tokens)]
    loss_tokens, skipped, samples = here.all_reduce_over_data(torch.tensor(counts, device=here.device)).tolist()
    if not loss_tokens:
        raise DataError(f"step {step}: no sequence of the batch holds a loss token")
    watched = step == 1 or step % recipe.train.log_every == 0
    health = FastWeightHealth(stage) if watched else None
    scale = here.dp_size / loss_tokens
    with zero.accumulation():
        loss = forward_backward(stage, micro_batches, scale, here, recompute=recipe.train.recompute, health=health)
        zero.skip_step_if_nonfinite(loss)
    factor = lr_factor(step, recipe.train.steps, recipe.optimizer)
    set_lr(zero.param_groups, factor)
    here.progress.note("averaging gradients over data ranks and stepping the optimizer")
    grad_norm = zero.step()
    loss = float(here.all_reduce_over_data(loss)) / loss_tokens
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
    if not math.isfinite(grad_norm):
        metrics["skipped_step"] = True
    if skipped:
        metrics["skipped"] = [reason for part in here.all_gather_over_data(batch.skipped) for reason in part]
    if health:
        metrics["tokens_per_second"] = tokens / seconds
        metrics["peak_memory_bytes"] = peak_memory_bytes(here.device)
        metrics.update(here.merge_over_model(health.summary()))
    if not recipe.sleep.carry:
        return metrics, None
    left = [part.left for part in micro_batches if part.left is not None]
    assert len(left) == len(micro_batches)
    return metrics, cat_batch(left)


def fingerprint(tokens: torch.Tensor) -> int:
    """Of which sequences these are, in any order: the sum of their CRC-32. tokens [B, T]."""
    return sum(zlib.crc32(row.numpy().tobytes()) for row in tokens)


def cut_batch(recipe: Recipe, batch: Batch, passes: int, here: Topology, memory: Memory | None) -> list[MicroBatch]:
    """The micro-batches of this rank's sequences, each with its segments and with its part of `memory`."""
    size = recipe.micro_batch_size
    tokens, loss_mask = pad_end(batch.tokens, batch.loss_mask, recipe.sequence_shards, recipe.model.pad_token_id)
    tokens, loss_mask = tokens.split(size), loss_mask.split(size)
    memories: Sequence[Memory | None] = [None] * len(tokens)
    if memory is not None:
        memories = split_batch(reset_rows(memory, batch.begins.to(here.device)), len(batch.tokens), size)
    return [
        MicroBatch(
            plan_segments(tokens, loss_mask, recipe.model, recipe.sleep, passes),
            tokens.to(here.device, non_blocking=True),
            loss_mask.to(here.device, non_blocking=True),
            own,
        )
        for tokens, loss_mask, own in zip(tokens, loss_mask, memories, strict=True)
    ]


def write_work(folder: RunFolder, recipe: Recipe, batch: Batch) -> None:
    """Keep what a step computes, by the windows of the first micro-batch, for reports. Raises OSError."""
    size = recipe.micro_batch_size
    tokens, loss_mask = batch.tokens[:size], batch.loss_mask[:size]
    tokens, loss_mask = pad_end(tokens, loss_mask, recipe.sequence_shards, recipe.model.pad_token_id)
    segments = plan_segments(tokens, loss_mask, recipe.model, recipe.sleep, max(recipe.sleep.pass_choices))
    predicts = [any(s.predicts for s in same) for _, same in itertools.groupby(segments, key=lambda s: s.window)]
    folder.write_work(work_of(recipe, predicts))


def check_same_segments(micro_batches: list[MicroBatch], here: Topology) -> None:
    """Raise SegmentError unless all data ranks run the same segments: at ZeRO-3 each gathers weights with all others."""
    own = [[(segment.window, segment.pass_number) for segment in batch.segments] for batch in micro_batches]
    here.progress.note("comparing the segments of all data ranks")
    if any(other != own for other in here.all_gather_over_data(own)):
        raise SegmentError(
            f"{here.describe()}: the data ranks' sequences hold loss tokens in different windows: zero.stage=3 runs the "
            "same segments on all; batch such sequences apart, or use zero.stage=1"
        )


def draw_passes(recipe: Recipe, step: int) -> int:
    """N of this step: the same on every rank and after a resume, since it depends on nothing but seed and step."""
    choices = recipe.sleep.pass_choices
    return choices[0] if len(choices) == 1 else random.Random(f"{recipe.run.seed}/{step}").choice(choices)


def read_batches(recipe: Recipe, here: Topology, state: State | None) -> Iterator[tuple[Batch, State | None]]:
    """This rank's share of each global batch, with the stream's state after it, from the batch after `state` on.

    One rank of each model reads; the others get tokens and loss mask from it, and no state.
    """
    if not here.is_data_source:
        while True:
            yield receive_batch(None, recipe, here), None
    batches = training_batches(
        recipe.data,
        batch_size=recipe.sequences_per_rank,
        vocab_size=recipe.model.vocab_size,
        rank=here.dp_rank,
        world_size=here.dp_size,
        seed=recipe.run.seed,
        whole_documents=recipe.sleep.carry,
        state=state,
    )
    for batch, now in batches:
        if here.groups.mp.size() > 1:
            receive_batch(batch, recipe, here)
        yield batch, now


def receive_batch(batch: Batch | None, recipe: Recipe, here: Topology) -> Batch:
    """The batch that this model's first rank gives, on all its ranks."""
    shape = (2, recipe.sequences_per_rank, recipe.data.sequence_length)
    if batch is None:
        packed = torch.empty(shape, dtype=torch.int64)
    else:
        # What precedes the first token is no target: its place in the loss mask has room for a row's other flag.
        loss_mask = torch.cat([batch.begins[:, None], batch.loss_mask[:, 1:]], dim=1)
        packed = torch.stack([batch.tokens, loss_mask.long()])
    tokens, loss_mask = here.broadcast_in_model(packed.to(here.device)).cpu()
    loss_mask, begins = loss_mask.bool(), loss_mask[:, 0].bool()
    loss_mask[:, 0] = False
    return Batch(tokens, loss_mask, begins, [])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
