"""The optimizer of a recipe."""

from collections.abc import Callable
from typing import Any

import torch

from powernap.model.parameters import parameters
from powernap.model.plugins import plugins
from powernap.model.stage import HybridStage
from powernap.parallel.muon import MuonWithAdamW
from powernap.parallel.planning.groups import Group, optimizer_groups
from powernap.train.config import OptimizerConfig


def build_optimizer(
    stage: HybridStage, config: OptimizerConfig, trains: Callable[[str], bool] = lambda name: True
) -> torch.optim.Optimizer:
    """AdamW over all parameters, Muon over the blocks' matrices with AdamW over the rest, or another package's optimizer.

    Weight decay applies to matrices only, not to embeddings, norms, convolutions and gates, nor, beside Muon, to the
    output head. Every stage has the same groups: one without parameters there has a placeholder.

    Args:
        trains: whether a parameter is trained, by name in the whole model; the others are frozen here.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(trains(stage.global_name(name)))
    model = parameters(stage.model, stage.sleep, range(stage.model.num_layers))
    weights = {weight.name: weight for weight in model if trains(weight.name)}
    named = stage.trained_parameters
    groups: list[dict[str, Any]] = []
    for group in optimizer_groups(config, list(weights.values()), [weights[name] for name in named]):
        own = [named[weight.name] for weight in group.weights] or [torch.nn.Parameter(stage.like.new_zeros(1, 1))]
        if group.is_muon and config.muon_split:
            for weight in group.weights:
                named[weight.name].projections = weight.projections  # type: ignore[attr-defined]
        groups.append({"params": own, **_settings(group, config)})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if config.name != "muon":
        return plugins("optimizers")[config.name](groups, config)
    return MuonWithAdamW(groups)


def _settings(group: Group, config: OptimizerConfig) -> dict[str, Any]:
    common = {"lr": group.lr, "peak_lr": group.lr, "weight_decay": group.weight_decay}
    if group.is_muon:
        return {**common, "muon": True, "momentum": config.muon_momentum}
    adamw = {**common, "betas": group.betas, "eps": config.eps}
    return adamw | ({"muon": False} if config.name == "muon" else {})


def set_lr(param_groups: list[dict], factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in param_groups:
        group["lr"] = group["peak_lr"] * factor
