"""What one optimizer step computes: the segments of a sequence and their FLOPs. Nothing here imports torch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from powernap.model.errors import PowernapError
from powernap.model.parameters import parameters
from powernap.model.recompute import keeps_logits
from powernap.model.segments import HEAD_NUMBERS, Probe, Segment, cut, windows_of
from powernap.parallel.planning.layout import (
    consolidation_flops,
    embedding_flops,
    head_flops,
    prediction_flops,
)
from powernap.parallel.planning.teacher import teacher_segments

Recipe = Any  # a train.config.Recipe: this package cannot import it, train/ imports this one


class PlanError(PowernapError):
    """A request that no layout can meet: one line that says what to write instead."""


def segments_of(recipe: Recipe, predicts: Sequence[bool] | None = None, probes: Sequence[Probe] = ()) -> list[Segment]:
    """The segments of a sequence, padded for sequence parallelism as in train/trainer.py, with the largest N.

    Args:
        predicts: for each window, probes among them, whether it holds loss tokens; None: only the last one does, or with sleep.every_window
            every one.
        probes: see model/segments.py.

    Raises:
        PlanError: if `predicts` does not name every window.
    """
    model, sleep = recipe.model, recipe.sleep
    length = round_up(recipe.data.sequence_length - 1, recipe.sequence_shards)
    windows = windows_of(length, model, sleep, probes, recipe.sequence_shards)
    if predicts is None:
        predicts = [sleep.every_window or window.tokens.stop == length for window in windows]
    if len(predicts) != len(windows):
        raise PlanError(
            f"{length} tokens are {len(windows)} windows of model.window={model.window}, not {len(predicts)}"
        )
    return cut(windows, predicts, [False] * len(windows), model, sleep, max(sleep.pass_choices))


def segment_flops(recipe: Recipe, segments: list[Segment]) -> list[list[int]]:
    """Forward FLOPs per token, [segments][blocks of the model]."""
    awake = prediction_flops(recipe.model, recipe.sleep)
    asleep = consolidation_flops(recipe.model, recipe.sleep, max(recipe.sleep.pass_choices))
    found = []
    for segment in segments:
        flops = awake if segment.predicts else asleep[segment.pass_number - 1]
        reading = range(segment.blocks.start, segment.blocks.stop - segment.state_only)  # the last one only writes
        keys = segment.mean_keys(recipe.model.window)
        less = [mixer.flops_less(recipe.model, recipe.sleep, keys) for mixer in recipe.model.mixers]
        found.append([flops[block] - less[block] * (block in reading) for block in range(len(less))])
    return found


def micro_batches(recipe: Recipe) -> int:
    """Micro-batches that a rank runs in one optimizer step."""
    return recipe.sequences_per_rank // recipe.micro_batch_size


def windows_slept_and_read(segments: list[Segment]) -> tuple[int, int]:
    return len({s.window for s in segments if not s.predicts}), sum(s.predicts for s in segments)


def stage_work(recipe: Recipe, segments: list[Segment]) -> list[float]:
    """Forward FLOPs of each pipeline stage for one sequence."""
    forward, _ = step_times(recipe, segments)
    return [sum(times) for times in forward]


def step_flops(recipe: Recipe, segments: list[Segment]) -> int:
    """FLOPs of one optimizer step over all ranks: forward, twice that backward, and what is computed again."""
    total, stages, frozen = 0, recipe.stage_blocks, frozen_flops(recipe)
    for segment, by_block in zip(segments, segment_flops(recipe, segments), strict=True):
        flops = sum(by_block) + (head_flops(recipe.model) if segment.predicts else 0)
        if segment.with_grad:
            flops += 2 * flops + sum(flops_again(recipe, segment, blocks, by_block) for blocks in stages)
        flops -= sum(frozen.of(segment))
        total += flops * len(segment.tokens)
    return (total + teacher_flops(recipe, segments)) * recipe.train.global_batch_size


def teacher_flops(recipe: Recipe, segments: list[Segment]) -> int:
    """FLOPs of distillation for one sequence: the teacher reads once, and its head runs as often as the trained model's."""
    teacher = recipe.teacher if recipe.distillation.weight else None
    if teacher is None:
        return 0
    read = teacher_segments(recipe, segments)
    reading = sum(sum(flops) * len(s.tokens) for s, flops in zip(read, segment_flops(teacher, read), strict=True))
    rows = sum(len(s.tokens) * (1 + recomputes_head(recipe, s)) for s in segments if s.predicts)
    return reading + rows * head_flops(teacher.model)


def step_flops_by_passes(recipe: Recipe, predicts: Sequence[bool] | None, probes: Sequence[Probe]) -> dict[int, int]:
    """`step_flops` for each N that may be drawn."""
    flops = {}
    for passes in sorted(set(recipe.sleep.pass_choices)):
        sleep = recipe.sleep.model_copy(update={"passes": passes, "pass_weights": None})
        one = recipe.model_copy(update={"sleep": sleep})
        flops[passes] = step_flops(one, segments_of(one, predicts, probes))
    return flops


def flops_again(recipe: Recipe, segment: Segment, blocks: range, by_block: Sequence[int]) -> int:
    """FLOPs per token that a stage's backward step computes again.

    Args:
        by_block: of `segment_flops`.
    """
    recompute, model = recipe.train.recompute, recipe.model
    ran = [block for block in blocks if block in segment.blocks]
    head = 0
    if segment.predicts and blocks.stop == model.num_layers:
        head = head_flops(model) if recomputes_head(recipe, segment) else 0
    if recompute == "selective":
        write = segment.blocks.stop - 1 if segment.state_only else -1
        return head + sum(model.mixer(block).flops_again(model, recipe.sleep, block == write) for block in ran)
    times = {"none": 0, "blocks": 1, "segment": 1, "nested": 2}[recompute]
    # The first time nested needs blocks' inputs alone, so the last block does not run.
    less = by_block[ran[-1]] if ran and recompute == "nested" else 0
    return head + times * sum(by_block[block] for block in ran) - less


def head_chunks(recipe: Recipe, segment: Segment) -> int:
    """Chunks in which the head runs, as in model/stage.py."""
    tokens = len(segment.tokens) * recipe.micro_batch_size
    return math.ceil(tokens * recipe.model.vocabulary_rows(recipe.parallel.tensor) / HEAD_NUMBERS)


def recomputes_head(recipe: Recipe, segment: Segment) -> bool:
    kept = keeps_logits(recipe.train.recompute, segment, pipeline=recipe.parallel.pipeline > 1)
    return not kept or head_chunks(recipe, segment) > 1


def step_times(recipe: Recipe, segments: list[Segment]) -> tuple[list[list[float]], list[list[float]]]:
    """FLOPs of a forward and a backward step, [stages][segments], for one sequence on one rank."""
    forward: list[list[float]] = []
    backward: list[list[float]] = []
    by_segment, frozen = segment_flops(recipe, segments), frozen_flops(recipe)
    for blocks in recipe.stage_blocks:
        forward.append([])
        backward.append([])
        for segment, by_block in zip(segments, by_segment, strict=True):
            flops = sum(by_block[blocks.start : blocks.stop])
            flops += embedding_flops(recipe.model) if blocks.start == 0 and segment.from_embeddings else 0
            flops += head_flops(recipe.model) if segment.predicts and blocks.stop == recipe.model.num_layers else 0
            again = flops_again(recipe, segment, blocks, by_block)
            less = sum(frozen.of(segment)[blocks.start : blocks.stop])
            forward[-1].append(float(flops * len(segment.tokens)))
            backward[-1].append(float((2 * flops + again - less) * len(segment.tokens)) if segment.with_grad else 0.0)
    return forward, backward


class FrozenFlops(NamedTuple):
    """FLOPs per token of the weight gradients that frozen matrices do not have."""

    blocks: list[int]  # [blocks of the model]
    head: int

    def of(self, segment: Segment) -> list[int]:
        """[blocks of the model]; the head's in the last."""
        if not segment.with_grad:
            return [0] * len(self.blocks)
        less = [flops * (block in segment.blocks) for block, flops in enumerate(self.blocks)]
        less[-1] += self.head * segment.predicts
        return less


def frozen_flops(recipe: Recipe) -> FrozenFlops:
    model, trains, less = recipe.model, recipe.train.trains, [0] * recipe.model.num_layers
    for weight in parameters(model, recipe.sleep, range(model.num_layers)):
        if weight.is_matrix and weight.name.startswith("decoder.") and not trains(weight.name):
            less[int(weight.name.split(".")[2])] += 2 * weight.size()
    head = "embedding.weight" if model.tie_embeddings else "output_layer.weight"
    return FrozenFlops(less, 0 if trains(head) else 2 * model.vocab_size * model.hidden_size)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
