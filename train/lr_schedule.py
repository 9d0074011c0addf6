"""The learning rate of every step. Nothing here imports torch."""

from powernap.model.plugins import plugins
from powernap.train.config import OptimizerConfig


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of `step` (from 1) as a fraction of the peak: linear warm-up, constant, linear decay, or another
    package's schedule."""
    if config.schedule != "wsd":
        return plugins("schedules")[config.schedule](step, steps, config)
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    progress = (step - 1) / steps
    if progress < config.hold:
        return warmup
    decay = (1.0 - progress) / (1.0 - config.hold)
    return warmup * max(config.final_lr, decay)
