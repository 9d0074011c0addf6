"""What a teacher (train/distillation.py) adds to a layout's cost. Nothing here imports torch."""

from typing import Any

from powernap.model.parameters import parameters
from powernap.model.part import FP32
from powernap.model.segments import Segment

Recipe = Any  # a train.config.Recipe: see work.py


def teacher_bytes(recipe: Recipe, segments: list[Segment], stage: int, size: int) -> tuple[int, int]:
    """Of a rank of one pipeline stage: its part of the teacher's weights, whole on every data rank, and what the teacher leaves.

    That is hidden states at the loss tokens, on the last stage, in a pipeline of all micro-batches; as if every token of a window that is
    read bore loss. What the teacher computes with is gone when the schedule begins.

    Args:
        size: bytes of a number.
    """
    teacher, tensor = recipe.teacher, recipe.parallel.tensor
    if teacher is None:
        return 0, 0
    weights = parameters(teacher.model, teacher.sleep, teacher.stage_blocks[stage])
    exact = FP32 * sum(w.size(tensor) for w in weights if w.float32) if size < FP32 else 0
    left = 0
    if stage == recipe.parallel.pipeline - 1:
        sequences = recipe.micro_batch_size if stage == 0 else recipe.sequences_per_rank
        left = size * teacher.model.hidden_size * sequences * sum(len(s.tokens) for s in segments if s.predicts)
    return size * sum(w.size(tensor) for w in weights) + exact, left


def teacher_segments(recipe: Recipe, segments: list[Segment]) -> list[Segment]:
    """What the teacher reads of a sequence."""
    whole = range(recipe.teacher.model.num_layers)
    read = [segment.tokens for segment in segments if segment.predicts]
    if recipe.distillation.context == "sequence" and read:
        read = [range(max(segment.tokens.stop for segment in segments))]
    return [Segment(0, 1, tokens, whole, whole, predicts=True) for tokens in read]
