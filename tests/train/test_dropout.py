"""train.dropout: its masks, where it is applied, that evaluation has none, and the same losses in other layouts.

tests/parallel/test_layouts.py compares all gradients.
"""

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.dropout import Dropout, row_seeds
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs, tiny
from tests.helpers.cases import asked_for, names
from tests.helpers.layouts import seeded
from tests.parallel.planning import test_plan

STEPS = 3
LAYOUTS = {
    "zero3": (2, ["parallel.data=2", "zero.stage=3"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=segment"]),
    "pipeline": (2, ["parallel.pipeline=2", "train.recompute=nested"]),
}


def test_a_mask_is_of_its_rate_and_of_its_place():
    values = torch.ones(50, 2, 40, dtype=torch.float64)
    tokens = torch.arange(20).view(2, 10)
    one = Dropout(0.25, row_seeds(tokens, seed=1, step=3), (0, 1), 50)
    mask = one.mask(values, 2, "mlp")
    assert torch.equal(one(3 * values, 2, "mlp"), 3 * mask)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75} and mask.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(mask, one.mask(values, 2, "mlp"))
    others = {
        "row": mask.flip(1),
        "block": one.mask(values, 3, "mlp"),
        "place": one.mask(values, 2, "mixer"),
        "pass": Dropout(0.25, one.seeds, (0, 2), 50).mask(values, 2, "mlp"),
        "window": Dropout(0.25, one.seeds, (1, 1), 50).mask(values, 2, "mlp"),
        "step": Dropout(0.25, row_seeds(tokens, 1, 4), (0, 1), 50).mask(values, 2, "mlp"),
        "seed": Dropout(0.25, row_seeds(tokens, 2, 3), (0, 1), 50).mask(values, 2, "mlp"),
    }
    for what, other in others.items():  # as independent masks agree: 0.75^2 + 0.25^2
        assert (other == mask).double().mean().item() == pytest.approx(0.625, abs=0.05), what
    parts = [Dropout(0.25, one.seeds, (0, 1), 50, shard).mask(values[:25], 2, "mlp") for shard in (0, 1)]
    assert torch.equal(torch.cat(parts), mask)


def test_it_is_applied_to_what_is_added(topology):
    stage = tiny.build_stage(topology, tiny.model_config(pattern="A"))
    tokens, loss_mask = tiny.batch(windows=1, predicting=(0,))
    (segment,) = plan_segments(tokens, loss_mask, stage.model, stage.sleep, 1)
    inputs, states = tokens[:, :-1], stage.empty_layer_states(3)
    plain, _ = stage(segment, inputs, None, states)
    stage.dropout = 0.5
    assert torch.equal(stage(segment, inputs, None, states)[0], plain)  # as in evaluation: without seeds there is none
    found, _ = stage(*seeded([segment], tokens), inputs, None, states)
    layer, dropout = stage.decoder.layers[0], Dropout(0.5, row_seeds(tokens, 1, 2), (0, 1), len(segment.tokens))
    before = stage._embed(inputs)
    mixed, _ = layer.self_attention(layer.input_layernorm(before), None, stage._window(segment, inputs))
    middle = before + mixed * dropout.mask(mixed, 0, "mixer")
    output, _ = layer.mlp(layer.pre_mlp_layernorm(middle))
    torch.testing.assert_close(found, middle + output * dropout.mask(output, 0, "mlp"), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    train = {"steps": STEPS, "log_every": 1, "global_batch_size": 8}
    runs.prepare(folder, train_samples=128, train=train, model={"vocab_size": 16})
    one = ["train.dropout=0.2"]
    found = runs.train_in_turn(folder, 1, {"one": one, "none": [], "small": [*one, "train.micro_batch_size=2"]})
    return found | runs.train_in_turn(
        folder, 2, {name: [*one, *its] for name, (_, its) in asked_for(request, LAYOUTS).items()}
    )


@pytest.mark.parametrize("name", names(["small", "sequence"], LAYOUTS))
def test_every_layout_and_micro_batch_has_the_same_masks(trained, name):
    found, expected, none = (
        [record["loss"] for record in read_metrics(trained[one] / "metrics.jsonl")] for one in (name, "one", "none")
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] / none[0] - 1) > 1e-3


def test_plan_counts_its_masks():
    plain, dropped = test_plan.recipe(), test_plan.recipe(train={"dropout": 0.1})
    segments = test_plan.segments_of(plain)
    bytes_of = [
        test_plan.memory.segment_activations(recipe, range(4), segments[0], "cpu") for recipe in (plain, dropped)
    ]
    mask = 4 * len(segments[0].tokens) * plain.micro_batch_size * plain.model.hidden_size
    assert bytes_of[1] - bytes_of[0] == pytest.approx(8 * mask, abs=4)
