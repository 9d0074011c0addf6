"""The optimizer of a recipe."""

import torch

from powernap.model.parameters import parameters
from powernap.model.plugins import plugins
from powernap.model.stage import HybridStage
from powernap.parallel.planning.memory import optimizer_groups
from powernap.train.config import OptimizerConfig


def build_optimizer(stage: HybridStage, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters, Muon over the blocks' matrices with AdamW over the rest, or another package's optimizer.

    Weight decay applies to matrices only, not to embeddings, norms, convolutions and gates, nor, beside Muon, to the
    output head.
    """
    weights = {weight.name: weight for weight in parameters(stage.model, stage.sleep, stage.blocks)}
    ordered = [weights[name] for name, _ in stage.named_parameters()]
    named = dict(stage.named_parameters())
    matrices, rest = ([named[w.name] for w in group] for group, _ in optimizer_groups(ordered, config.name))
    adamw = {"lr": config.lr, "peak_lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name != "muon":
        decayed = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        groups = [{**adamw, **group} for group in decayed]
        if config.name == "adamw":
            return torch.optim.AdamW(groups, fused=True)
        return plugins("optimizers")[config.name](groups, config)
    # torch's Muon cannot step ZeRO's flat partitions; DeepSpeed's works with ZeRO to see whole matrices.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for parameter in matrices:
        parameter.use_muon = True
    muon = {"use_muon": True, "lr": config.muon_lr, "momentum": config.muon_momentum, "ns_method": "standard"}
    aux = {key: adamw[key] for key in ("lr", "betas", "eps")}
    # Two groups on every pipeline stage, even if one is empty: ZeRO sums the norm group by group.
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, **muon},
        {"params": rest, "use_muon": False, "weight_decay": 0.0, **aux},
    ]
    optimizer = MuonWithAuxAdam(groups)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr(param_groups: list[dict], factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in param_groups:
        group["lr"] = group["peak_lr"] * factor
