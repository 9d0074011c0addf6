"""The learning rate of every step. Nothing here imports torch."""

import math

from powernap.model.plugins import plugins
from powernap.train.config import OptimizerConfig, Recipe


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of `step` (from 1) as a fraction of the peak: a linear warm-up, then config.schedule, which ends at
    config.final_lr; or another package's schedule."""
    warmup_steps = config.warmup_steps
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    left = max(0.0, (steps - step) / max(1, steps - warmup_steps)) if step > warmup_steps else 1.0
    match config.schedule:
        case "wsd":
            return warmup * _plateau(step, steps, config)
        case "cosine":
            shape = (1 - math.cos(math.pi * left)) / 2
        case "linear":
            shape = left
        case "inverse_sqrt":
            return warmup * max(config.final_lr, math.sqrt(max(1, warmup_steps) / max(1, warmup_steps, step)))
        case other:
            return plugins("schedules")[other](step, steps, config)
    return warmup * (config.final_lr + (1 - config.final_lr) * shape)


def _plateau(step: int, steps: int, config: OptimizerConfig) -> float:
    progress = (step - 1) / steps
    if progress < config.hold:
        return 1.0
    if config.decay == "sqrt":
        return max(config.final_lr, 1.0 - math.sqrt((progress - config.hold) / (1.0 - config.hold)))
    return max(config.final_lr, (1.0 - progress) / (1.0 - config.hold))


def rate_in_words(recipe: Recipe) -> str:
    """The learning rate over the run, in steps."""
    config, steps = recipe.optimizer, recipe.train.steps
    ends = f"to {config.final_lr:g} of it at step {steps:,}"
    match config.schedule:
        case "wsd":
            after = f"constant to step {min(steps, math.ceil(config.hold * steps)):,}, then {config.decay} {ends}"
        case "cosine" | "linear":
            after = f"{config.schedule} {ends}"
        case "inverse_sqrt":
            after = f"then with the inverse square root of the step, to {config.final_lr:g} of it at least"
        case other:
            after = f"then as {other} says"
    return f"{config.lr:g} after {config.warmup_steps:,} steps of warm-up, {after}"
