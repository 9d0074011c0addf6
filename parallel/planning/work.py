"""What one optimizer step computes: the segments of a sequence and their FLOPs. Nothing here imports torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from powernap.model.errors import PowernapError
from powernap.parallel.planning.layout import (
    Costs,
    consolidation_flops,
    embedding_flops,
    head_flops,
    prediction_flops,
    sequence_costs,
)

Recipe = Any  # a train.config.Recipe: this package cannot import it, train/ imports this one


class PlanError(PowernapError):
    """What no layout can do: one line that says what to write instead."""


@dataclass(frozen=True)
class Segment:
    """One pass over one window, as model/segments.py cuts it, with what it computes."""

    window: int
    pass_number: int
    start: int  # its first token
    tokens: int
    blocks: range
    final_blocks: range  # those that no later pass over this window runs
    flops: list[int]  # of every block of the model, per token
    from_embeddings: bool = True  # False: from the hidden states of the pass before
    predicts: bool = False
    write_only: bool = False  # its last block writes and is done: nobody reads the hidden states
    with_grad: bool = True

    @property
    def label(self) -> str:
        """Two characters: the window as a letter, the pass as a digit, "?" where it predicts."""
        window = chr(ord("a") + self.window % 26)
        return window + ("?" if self.predicts else str(self.pass_number % 10))


def cut(recipe: Recipe, predicts: Sequence[bool] | None = None) -> list[Segment]:
    """The segments of a sequence, with sequence parallelism lengthened as train/trainer.py does; N is the largest.

    Args:
        predicts: for each window whether it holds loss tokens; None: only the last one does, or, as sleep.every_window
            says, every one.

    Raises:
        PlanError: if `predicts` does not name every window.
    """
    model, sleep, passes = recipe.model, recipe.sleep, max(recipe.sleep.pass_choices)
    length = round_up(recipe.data.sequence_length - 1, recipe.sequence_shards)
    count = math.ceil(length / model.window)
    predicts = [sleep.every_window or number == count - 1 for number in range(count)] if predicts is None else predicts
    if len(predicts) != count:
        raise PlanError(f"{length} tokens are {count} windows of model.window={model.window}, not {len(predicts)}")
    every, awake = range(model.num_layers), prediction_flops(model, sleep)
    asleep = list(zip(sleep.pass_blocks(model, passes), consolidation_flops(model, sleep, passes), strict=True))
    loop_start = sleep.loop_range[0] if sleep.loop_range else 0
    backprop = sleep.backprop_passes or passes
    segments = []
    for window in range(count):
        start = window * model.window
        tokens = min(model.window, length - start)
        sleeps = not predicts[window] or (sleep.every_window and (window < count - 1 or sleep.carry))
        if predicts[window]:
            number, final = (0, range(0)) if sleeps else (1, every)
            segments.append(Segment(window, number, start, tokens, every, final, awake, predicts=True))
        if not sleeps:
            continue
        for number, (blocks, flops) in enumerate(asleep, start=1):
            final = range(blocks.start, blocks.stop if number == passes else loop_start)
            needed = not sleep.carry or any(predicts[window + 1 :])  # not after the last loss: see model/segments.py
            segments.append(
                Segment(
                    window, number, start, tokens, blocks, final, flops,
                    from_embeddings=number == 1 or sleep.pass_input == "embeddings",
                    write_only=sleep.only_writes(number, passes),
                    with_grad=number > passes - backprop and needed,
                )
            )  # fmt: skip
    return segments


def micro_batches(recipe: Recipe) -> int:
    """Micro-batches that a rank runs in one optimizer step."""
    return recipe.sequences_per_rank // recipe.micro_batch_size


def windows_slept_and_read(segments: list[Segment]) -> tuple[int, int]:
    return len({s.window for s in segments if not s.predicts}), sum(s.predicts for s in segments)


def stage_work(recipe: Recipe, segments: list[Segment]) -> list[int]:
    """FLOPs per token of every window that each pipeline stage computes forward in a sequence."""
    slept, read = windows_slept_and_read(segments)
    passes = max(recipe.sleep.pass_choices)
    costs = sequence_costs(recipe.model, passes, sleep=recipe.sleep, consolidated=slept, predicted=read)
    return [_work(costs, blocks) for blocks in recipe.stage_blocks]


def _work(costs: Costs, blocks: range) -> int:
    ends = costs.embedding * (blocks.start == 0) + costs.head * (blocks.stop == len(costs.blocks))
    return sum(costs.blocks[blocks.start : blocks.stop]) + ends


def step_flops(recipe: Recipe, segments: list[Segment]) -> int:
    """FLOPs of one optimizer step over all ranks: forward, twice that backward, once more where it is recomputed."""
    total = 0
    for segment in segments:
        flops = sum(segment.flops) + (head_flops(recipe.model) if segment.predicts else 0)
        total += flops * segment.tokens * (1 + _backward_factor(recipe, segment))
    return total * recipe.train.global_batch_size


def step_times(recipe: Recipe, segments: list[Segment]) -> tuple[list[list[float]], list[list[float]]]:
    """FLOPs of a forward and a backward step, [stages][segments], for one sequence on one rank."""
    forward = []
    for blocks in recipe.stage_blocks:
        forward.append([])
        for segment in segments:
            flops = sum(segment.flops[blocks.start : blocks.stop])
            flops += embedding_flops(recipe.model) if blocks.start == 0 else 0
            flops += head_flops(recipe.model) if segment.predicts and blocks.stop == recipe.model.num_layers else 0
            forward[-1].append(float(flops * segment.tokens))
    backward = [
        [time * _backward_factor(recipe, segment) for time, segment in zip(times, segments, strict=True)]
        for times in forward
    ]
    return forward, backward


def _backward_factor(recipe: Recipe, segment: Segment) -> int:
    """Time of a segment's backward step in forward steps."""
    return (2 + recipe.train.recompute) if segment.with_grad else 0


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
