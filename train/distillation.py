"""Distillation: a trained model's logits as a second target, so that a retrofit keeps what the source knew.

At each loss token the loss is the cross-entropy + weight x temperature^2 x KL(teacher || model), of the softmax of both models' logits /
temperature (Hinton et al., arXiv 1503.02531). The fields are read without torch.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from powernap.model.section import Section
from powernap.train.paths import SharedPath

if TYPE_CHECKING:
    from powernap.parallel.teacher import Teacher
    from powernap.parallel.topology import Topology
    from powernap.train.config import Recipe
    from powernap.train.run.start import Source


class DistillationConfig(Section):
    """The logits of a trained model as a second target beside the data."""

    teacher: SharedPath | None = Field(
        None,
        min_length=1,
        description="the trained model, given as in train.start_from, with this model's tokens; null: no distillation",
    )
    weight: float = Field(
        1.0,
        ge=0,
        description="of KL(teacher || model) beside the cross-entropy; by step: {0: 1.0, 2000: 0.1}; where it is 0 the teacher rests",
    )
    temperature: float = Field(1.0, gt=0, description="that both models' logits are divided by")
    context: Literal["window", "sequence"] = Field(
        "window",
        description="what the teacher has read before a token: of its window alone, or of the sequence, with nothing evicted",
    )


def teacher_recipe(recipe: "Recipe") -> "Recipe":
    """The teacher as a recipe of its own, in this one's layout and precision, that reads with N=1 what `context` says.

    Raises:
        RecipeError: if there is no such model, or it does not fit.
    """
    return _found(recipe)[1]


def check_context(recipe: "Recipe") -> None:
    """Raise ValueError if the teacher cannot read what `context` says."""
    if recipe.distillation.teacher is None or recipe.distillation.context == "window":
        return
    for field, value in (("data.documents", recipe.data.documents), ("sleep.carry", recipe.sleep.carry)):
        if value in ("separate", True):
            raise ValueError(
                f"distillation.context=sequence with {field}={str(value).lower()}: a sequence is not what a token's context is: "
                "write distillation.context=window"
            )


def check_teacher(recipe: "Recipe") -> None:
    """Raise RecipeError unless the teacher is there and fits."""
    _found(recipe)


def _found(recipe: "Recipe") -> "tuple[Source, Recipe]":
    from powernap.train.recipe_file import RecipeError
    from powernap.train.run.start import Source

    given = recipe.distillation.teacher
    train = recipe.train.model_copy(
        update={
            "start_from": given, "insert": None, "start_optimizer": False, "branch_from": None, "freeze": None, "only": None,
        }
    )  # fmt: skip
    model = recipe.model.without_blocks(recipe.train.insert or ())
    try:
        source = Source.find(recipe.model_copy(update={"model": model, "train": train}))
        values = model.model_dump() if source.kind == "hugging face" else _sections(source.model)
        values["window"] = _longest(recipe)
        if values["vocab_size"] != model.vocab_size:
            raise RecipeError(f"has model.vocab_size={values['vocab_size']}, this recipe {model.vocab_size}")
        teacher = type(recipe).model_validate(
            {
                "run": recipe.run,
                "model": values,
                "sleep": {"pass_norm": "pass_norm.weight" in source.shapes},
                "data": recipe.data.model_copy(update={"documents": "packed"}),
                "train": train,
                "optimizer": {"warmup_steps": 0},
                "parallel": recipe.parallel.model_copy(update={"pipeline_layout": None}),
            }
        )
        source.check(teacher)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"distillation.teacher={given}: {reason}") from None
    except RecipeError as error:
        reason = str(error).removeprefix(f"train.start_from={given}: ")
        raise RecipeError(f"distillation.teacher={given}: {reason}") from None
    return source, teacher


def _longest(recipe: "Recipe") -> int:
    """Tokens that the teacher reads at once, at most."""
    if recipe.distillation.context == "window":
        return max(phase.model.window for _, phase in recipe.phases)
    return -(-(recipe.data.sequence_length - 1) // recipe.sequence_shards) * recipe.sequence_shards


def _sections(flat: dict[str, Any]) -> dict[str, Any]:
    """The reverse of recipe_file.flatten, but for fields that changed over the steps, such as the window."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    return values


def build_teacher(recipe: "Recipe", topology: "Topology") -> "Teacher":
    """This rank's part of the teacher, frozen. All ranks call it."""
    import torch

    from powernap.model.mixers.module import MixerModule
    from powernap.model.stage import HybridStage
    from powernap.parallel.malloc import freed_memory_returned
    from powernap.parallel.teacher import Teacher
    from powernap.train.run.start import Start, find_together

    own = teacher_recipe(recipe)
    start = Start(find_together(own, topology), own, topology)
    with freed_memory_returned():
        stage = HybridStage(
            own.model,
            own.sleep,
            topology.groups,
            blocks=own.stage_blocks[topology.pp_rank],
            sequence_parallel=own.parallel.sequence,
            draw=False,
            built=start.weights,
        )
    for mixer in (
        [part for part in stage.modules() if isinstance(part, MixerModule)] if recipe.train.precision == "bf16" else []
    ):
        mixer.keep_unrounded()
        mixer.unrounded = {name: values.to(topology.device) for name, values in mixer.unrounded.items()}
    stage.to(topology.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32).requires_grad_(
        False
    )
    config = recipe.distillation
    return Teacher(
        stage,
        topology,
        weight=lambda step: recipe.at(step).distillation.weight,
        temperature=config.temperature,
        whole_sequence=config.context == "sequence",
        described=f"{start.source.folder}" + (f", step {start.source.step:,}" if start.source.step else ""),
    )
