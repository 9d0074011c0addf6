"""A run and an export that an earlier Powernap wrote (stored/): their loss is what it was. New formats still read them.

Made at commit be8ac72, on two tensor ranks; the loss is what that commit computed on SEQUENCES.
"""

from pathlib import Path

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.train.generation.generate import load_run
from powernap.train.run.folder import RunFolder

STORED = Path(__file__).parent / "stored"
SEQUENCES = torch.arange(1, 73).remainder(13).add(1).view(3, 24)  # two windows each
LOSS = 116.05476379394531


def loss_of(stage: HybridStage, passes: int) -> float:
    """Of the second window."""
    loss_mask = torch.zeros_like(SEQUENCES, dtype=torch.bool)
    loss_mask[:, 12:] = True
    segments = plan_segments(SEQUENCES, loss_mask, stage.model, stage.sleep, passes)
    with torch.no_grad():
        return float(sleep_and_predict(stage, segments, SEQUENCES, loss_mask, recompute="none").loss)


def test_a_stored_run(topology):
    run = RunFolder(STORED / "run")
    recipe = run.recipe()
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups)
    run.newest_checkpoint().load_weights(stage)
    assert loss_of(stage, 2) == pytest.approx(LOSS, rel=1e-6)


def test_a_stored_export():
    model = load_run(str(STORED / "exported"))
    assert loss_of(model.stage, 2) == pytest.approx(LOSS, rel=1e-6)
