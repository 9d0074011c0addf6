"""What is kept of a segment and what is computed again: gradients and FLOPs of every choice, against keeping everything.

Bytes: test_plan_measured.py; layouts: test_layouts.py.
"""

from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.health import FastWeightHealth
from powernap.model.mixers import MIXERS
from powernap.model.recompute import Recompute
from powernap.model.sleep import sleep_and_predict
from powernap.parallel.planning.work import recomputes_head, segments_of, step_flops
from powernap.train.numerics.anomaly import AnomalyError, anomalies_detected
from tests.helpers import layouts, mixers, tiny
from tests.helpers.cases import names

KINDS = [kind for kind in get_args(Recompute) if kind != "none"]
SLIDING = dict(eviction="sliding")
CASES = {
    "hard": ({}, {}),
    "sliding": ({}, SLIDING),
    "norm and embeddings before each pass": ({}, dict(pass_norm=True, reinject_embeddings=True)),
    "part of the blocks, last write, truncated": ({}, dict(loop_range=[1, 3], write="last", backprop_passes=2)),
    "every mixer": ({"pattern": "".join(MIXERS)}, SLIDING),
    "further choices": (layouts.FURTHER, {}),
    "grouped heads": (layouts.GROUPED, SLIDING),
}


@pytest.mark.parametrize("kind", names(["segment", "selective"], KINDS))
@pytest.mark.parametrize("name", names(["sliding", "part of the blocks, last write, truncated", "every mixer"], CASES))
def test_gradients_are_those_of_keeping_everything(topology, name, kind):
    """To the bit: the same numbers are computed again. And health counts gates once."""
    model, sleep = CASES[name]
    sleep = SleepConfig(**sleep)
    stage = tiny.build_stage(topology, tiny.model_config(**{"vocab_size": 20, **model}), sleep)
    tokens, loss_mask = tiny.batch(predicting=(1, 2))
    tokens[1, :4] = 0
    found = []
    for recompute in (kind, "none"):
        health = FastWeightHealth(stage)
        output = tiny.run(stage, tokens, loss_mask, 3, sleep, recompute=recompute, health=health)
        found.append((output.loss, tiny.gradients(stage, output.loss), health.summary()))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert tiny.largest_difference(found[0][1], found[1][1]) == 0


def test_what_is_computed_again_is_what_the_plan_counts(topology):
    """FLOPs beyond those of keeping everything, within 2.5 %: torch counts keys that a causal mask leaves out."""
    model = tiny.model_config(
        pattern="AGAG", window=32, vocab_size=97, hidden_size=512, mlp=dict(ffn_hidden_size=64),
        attention=dict(heads=4), gdn=dict(heads=4, key_dim=64, value_dim=64),
    )  # fmt: skip
    stage = tiny.build_stage(topology, model, dtype=torch.float32)
    tokens = torch.ones(1, 97, dtype=torch.long)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, 65:] = True
    segments = plan_segments(tokens, loss_mask, model, SleepConfig(), 2)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {forward: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)}
    counted, planned = {}, {}
    for kind in ("none", *KINDS):
        with FlopCounterMode(display=False, custom_mapping={**mixers.UNCOUNTED, **attention}) as counter:
            sleep_and_predict(stage, segments, tokens, loss_mask, recompute=kind).loss.backward()
        recipe = tiny.recipe(model, SleepConfig(), 2, 97, train=dict(steps=100, global_batch_size=1, recompute=kind))
        counted[kind], planned[kind] = counter.get_total_flops(), step_flops(recipe, segments_of(recipe))
    for kind in KINDS:
        again = planned[kind] - planned["none"]
        assert again > 0 and counted[kind] - counted["none"] == pytest.approx(again, rel=0.025), kind
    assert planned["selective"] < 1.1 * planned["none"] and planned["blocks"] == planned["segment"] < planned["nested"]


@pytest.mark.parametrize(("kind", "times"), [("none", 3), ("selective", 3), ("segment", 5)])
@pytest.mark.parametrize("carry", [False, True])
def test_the_last_head_is_not_computed_again(topology, monkeypatch, kind, times, carry):
    """Nor where passes over the last window follow it, for the next sequence."""
    sleep = SleepConfig(every_window=True, carry=carry)
    stage = tiny.build_stage(topology, sleep=sleep)
    head, runs = stage._head, []
    monkeypatch.setattr(stage, "_head", lambda normed: runs.append(1) or head(normed))
    tokens, loss_mask = tiny.batch(predicting=(0, 1, 2))
    tiny.run(stage, tokens, loss_mask, 2, sleep, recompute=kind).loss.backward()
    assert len(runs) == times


@pytest.mark.parametrize(("carry", "again"), [(False, [True, True, False]), (True, [True, True, True])])
def test_in_a_pipeline_it_is_if_segments_follow(carry, again):
    """Other micro-batches run between its forward and its backward pass. What real stages do: test_messages.py."""
    train = dict(steps=100, global_batch_size=4, micro_batch_size=1)
    sleep = SleepConfig(every_window=True)
    recipe = tiny.recipe(tiny.model_config(), sleep, 2, 3 * tiny.WINDOW + 1, train=train, parallel={"pipeline": 2})
    recipe = recipe.model_copy(update={"sleep": recipe.sleep.model_copy(update={"carry": carry})})
    assert [recomputes_head(recipe, segment) for segment in segments_of(recipe) if segment.predicts] == again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True])
def test_anomalies_are_found(topology, kind, backward):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    broken = stage.decoder.layers[2].mlp.linear_fc1

    def spoil_gradient(module, inputs, output):
        output[0].register_hook(lambda gradient: gradient * float("nan"))

    if backward:
        broken.register_forward_hook(spoil_gradient)
    else:
        broken.weight.data[0, 0] = float("inf")
    where = "gradient of its input not finite" if backward else "output not finite, input finite"
    with anomalies_detected(stage, topology), pytest.raises(AnomalyError, match=f"layers.2.mlp.linear_fc1: {where}"):
        tiny.run(stage, tokens, loss_mask, 2, recompute=kind).loss.backward()
