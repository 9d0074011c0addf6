"""The optimizer's parameter groups: which weights train together, and with what. Nothing here imports torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from powernap.model.parameters import matches, parameters
from powernap.model.part import Weight
from powernap.model.plugins import plugins
from powernap.parallel.planning.work import Recipe

Optimizer = Any  # a train.config.OptimizerConfig: see Recipe


class Group(NamedTuple):
    """Weights of one stage that train with the same settings; none on a stage that has none of the model's."""

    weights: Sequence[Weight]
    is_muon: bool
    lr: float  # the peak
    weight_decay: float
    betas: tuple[float, float]
    moments: int  # numbers that the optimizer keeps for each parameter


def optimizer_groups(optimizer: Optimizer, model: Sequence[Weight], stage: Sequence[Weight]) -> list[Group]:
    """The groups of a stage: as many on every stage, since ZeRO sums the gradient norm group by group.

    Weight decay is for matrices, with Muon for those inside the blocks, which it trains; AdamW trains the rest. What a pattern of
    optimizer.groups matches has the settings written there. A plugin's optimizer states its `moments`.

    Args:
        model, stage: the trained weights of the whole model and of the stage, by name in the whole model.
    """
    keys = {_key(optimizer, weight): None for weight in model}
    of_stage = {key: [w for w in stage if _key(optimizer, w) == key] for key in sorted(keys)}
    return [_group(optimizer, *key, weights) for key, weights in of_stage.items()]


def stage_groups(recipe: Recipe, stage: Sequence[Weight]) -> list[Group]:
    """`optimizer_groups` of a stage with these weights."""
    model = parameters(recipe.model, recipe.sleep, range(recipe.model.num_layers))
    groups = optimizer_groups(recipe.optimizer, trained(recipe, model), trained(recipe, stage))
    averages = recipe.train.ema is not None
    return [group._replace(moments=group.moments + averages) for group in groups]


def trained(recipe: Recipe, weights: Sequence[Weight]) -> list[Weight]:
    """Those that train.freeze and train.only leave."""
    return [weight for weight in weights if recipe.train.trains(weight.name)]


def _key(optimizer: Optimizer, weight: Weight) -> tuple[int, bool]:
    """(which pattern of optimizer.groups matches, from 1; 0: none; whether it belongs to the rest)."""
    patterns = [number for number, pattern in enumerate(optimizer.groups, 1) if matches(weight.name, pattern)]
    is_inside = optimizer.name != "muon" or weight.name.startswith("decoder.")
    return patterns[0] if patterns else 0, not (weight.is_matrix and is_inside)


def _group(optimizer: Optimizer, pattern: int, is_rest: bool, weights: Sequence[Weight]) -> Group:
    is_muon = optimizer.name == "muon" and not is_rest
    own = list(optimizer.groups.values())[pattern - 1] if pattern else None
    lr, decay, betas = (getattr(own, name, None) for name in ("lr", "weight_decay", "betas"))
    usual = optimizer.muon_lr if is_muon else optimizer.lr
    return Group(
        weights,
        is_muon,
        usual if lr is None else lr,
        (0.0 if is_rest else optimizer.weight_decay) if decay is None else decay,
        betas or optimizer.betas,
        moments_of(optimizer.name, is_muon),
    )


def moments_of(optimizer: str, is_muon: bool) -> int:
    if optimizer in ("adamw", "muon"):
        return 1 if is_muon else 2
    return plugins("optimizers")[optimizer].moments
