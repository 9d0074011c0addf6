"""What each choice of train.recompute and train.offload_inputs costs. Nothing here imports torch."""

from dataclasses import dataclass
from typing import get_args

from powernap.model.recompute import Recompute, keeps_activations
from powernap.model.segments import Segment
from powernap.parallel.planning.memory import MemoryEstimate, stage_memory
from powernap.parallel.planning.work import Recipe, step_flops


@dataclass(frozen=True)
class Choice:
    """One of them for a recipe's layout."""

    recompute: Recompute
    offload_inputs: bool
    flops_per_step: int
    bytes: int  # of the fullest rank's device
    host: int  # bytes of host memory for a rank, with offloaded optimizer states


def choices(recipe: Recipe, segments: list[Segment]) -> list[Choice]:
    """All that the recipe could have, by FLOPs, then the ones without host memory first."""
    found = [_cost(other, segments) for other in alternatives(recipe)]
    return sorted(found, key=lambda choice: (choice.flops_per_step, choice.offload_inputs))


def alternatives(recipe: Recipe) -> list[Recipe]:
    """The recipe with each valid choice, its own among them."""
    found = []
    for recompute in get_args(Recompute):
        for offload_inputs in (False, True):
            if offload_inputs and keeps_activations(recompute):
                continue
            sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
            changes = {"recompute": recompute, "offload_inputs": offload_inputs}
            try:
                found.append(
                    type(recipe).model_validate({**sections, "train": recipe.train.model_copy(update=changes)})
                )
            except ValueError:
                continue
    return found


def stage_memories(recipe: Recipe, segments: list[Segment]) -> list[MemoryEstimate]:
    return [stage_memory(recipe, segments, stage) for stage in range(recipe.parallel.pipeline)]


def in_words(recompute: Recompute, offload_inputs: bool) -> str:
    return recompute + ", inputs on host" * offload_inputs


def _cost(recipe: Recipe, segments: list[Segment]) -> Choice:
    memories = stage_memories(recipe, segments)
    return Choice(
        recipe.train.recompute,
        recipe.train.offload_inputs,
        step_flops(recipe, segments),
        max(memory.total for memory in memories),
        max(memory.host + memory.host_inputs for memory in memories),
    )
