"""What one optimizer step computes: the segments of a sequence and their FLOPs. Nothing here imports torch."""

from collections.abc import Sequence
from typing import Any

from powernap.model.errors import PowernapError
from powernap.model.parameters import parameters
from powernap.model.segments import Probe, Segment, cut, windows_of
from powernap.parallel.planning.layout import (
    consolidation_flops,
    embedding_flops,
    head_flops,
    prediction_flops,
)

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
    """FLOPs of one optimizer step over all ranks: forward, twice that backward, once more if recomputed."""
    total = 0
    for segment, blocks in zip(segments, segment_flops(recipe, segments), strict=True):
        flops = sum(blocks) + (head_flops(recipe.model) if segment.predicts else 0)
        total += flops * len(segment.tokens) * (1 + _backward_factor(recipe, segment))
        total -= sum(frozen_flops(recipe, segment)) * len(segment.tokens)
    return total * recipe.train.global_batch_size


def step_flops_by_passes(recipe: Recipe, predicts: Sequence[bool] | None, probes: Sequence[Probe]) -> dict[int, int]:
    """`step_flops` for each N that may be drawn."""
    flops = {}
    for passes in sorted(set(recipe.sleep.pass_choices)):
        sleep = recipe.sleep.model_copy(update={"passes": passes, "pass_weights": None})
        one = recipe.model_copy(update={"sleep": sleep})
        flops[passes] = step_flops(one, segments_of(one, predicts, probes))
    return flops


def step_times(recipe: Recipe, segments: list[Segment]) -> tuple[list[list[float]], list[list[float]]]:
    """FLOPs of a forward and a backward step, [stages][segments], for one sequence on one rank."""
    forward: list[list[float]] = []
    by_block = segment_flops(recipe, segments)
    for blocks in recipe.stage_blocks:
        forward.append([])
        for segment, block_flops in zip(segments, by_block, strict=True):
            flops = sum(block_flops[blocks.start : blocks.stop])
            flops += embedding_flops(recipe.model) if blocks.start == 0 and segment.from_embeddings else 0
            flops += head_flops(recipe.model) if segment.predicts and blocks.stop == recipe.model.num_layers else 0
            forward[-1].append(float(flops * len(segment.tokens)))
    backward = [
        [time * _backward_factor(recipe, segment) for time, segment in zip(times, segments, strict=True)]
        for times in forward
    ]
    less = [frozen_flops(recipe, segment) for segment in segments]
    for times, blocks in zip(backward, recipe.stage_blocks, strict=True):
        for index, segment in enumerate(segments):
            times[index] -= sum(less[index][blocks.start : blocks.stop]) * len(segment.tokens)
    return forward, backward


def frozen_flops(recipe: Recipe, segment: Segment) -> list[int]:
    """FLOPs per token of the weight gradients that frozen matrices do not have, [blocks of the model]; the head's in the last."""
    model, trains, less = recipe.model, recipe.train.trains, [0] * recipe.model.num_layers
    if not segment.with_grad:
        return less
    for weight in parameters(model, recipe.sleep, range(model.num_layers), global_names=True):
        if weight.is_matrix and weight.name.startswith("decoder.") and not trains(weight.name):
            block = int(weight.name.split(".")[2])
            less[block] += 2 * weight.size() * (block in segment.blocks)
    head = "embedding.weight" if model.tie_embeddings else "output_layer.weight"
    if segment.predicts and not trains(head):
        less[-1] += 2 * model.vocab_size * model.hidden_size
    return less


def _backward_factor(recipe: Recipe, segment: Segment) -> int:
    """Time of a segment's backward step, in units of its forward step."""
    return (2 + recipe.train.recompute) if segment.with_grad else 0


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
