"""What a recipe says of a step is what the step does."""

import pytest
import torch

from powernap.model.config import SleepConfig
from powernap.train import trainer
from powernap.train.data.loader import Batch
from tests.helpers import tiny


def recipe(passes=2, seed=0, **optimizer):
    return tiny.recipe(
        tiny.model_config(),
        SleepConfig(),
        passes,
        3 * tiny.WINDOW + 1,
        seed,
        train={"steps": 4, "global_batch_size": 3},
        optimizer={"warmup_steps": 0, **optimizer},
    )


def test_gradients_are_clipped_to_optimizer_clip(topology):
    """After one step Adam's first moment is (1 - beta_1) times the gradient that was stepped."""
    wanted = recipe(clip=0.01, betas=[0.75, 0.9])
    stage, zero = trainer.build(wanted, topology)
    tokens, loss_mask = tiny.batch()
    metrics, _ = trainer.train_step(
        wanted, stage, zero, Batch(tokens, loss_mask, torch.ones(3).bool(), []), 1, topology
    )
    assert metrics["grad_norm"] > 0.1
    moments = [state["exp_avg"].norm() for state in zero.zero.optimizer.state.values()]
    assert torch.stack(moments).norm() / (1 - 0.75) == pytest.approx(0.01, rel=1e-3)


def test_n_is_drawn_from_the_seed_and_the_step():
    one, again, other = (
        [trainer.draw_passes(wanted, step) for step in range(1, 41)]
        for wanted in (recipe([1, 2, 4], seed) for seed in (0, 0, 1))
    )
    assert one == again != other
    assert set(one) == {1, 2, 4}
