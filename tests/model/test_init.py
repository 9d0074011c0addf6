"""The weights that training begins with."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from powernap.model.config import SleepConfig
from powernap.model.stage import HybridStage
from tests.helpers import tiny


@pytest.fixture(scope="module")
def stage(topology):
    torch.manual_seed(0)
    model = tiny.model_config(
        vocab_size=400,
        hidden_size=64,
        mlp=dict(ffn_hidden_size=96),
        attention=dict(heads=4),
        gdn=dict(heads=64),
        embedding_std=0.5,
    )
    return HybridStage(model, SleepConfig(), topology.groups)


def test_matrices_keep_the_size_of_what_they_read_and_branches_add_up_to_it(stage):
    """Standard deviation 1/sqrt(inputs); of the two a block that write to the residual stream less, as all add up."""
    for name, weight in stage.named_parameters():
        if weight.ndim != 2:
            continue
        expected = 1 / math.sqrt(weight.shape[1])
        if name.endswith(("out_proj.weight", "linear_fc2.weight")):
            expected /= math.sqrt(2 * stage.model.num_layers)
        if name == "embedding.weight":
            expected = 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.06), name
        assert abs(weight.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_near_that_of_a_uniform_guess(topology, tied):
    """With a tied head and embeddings of deviation 1 it would be 18 times that."""
    model = tiny.model_config(hidden_size=128, attention=dict(heads=4), vocab_size=400, tie_embeddings=tied)
    torch.manual_seed(0)
    stage = HybridStage(model, SleepConfig(), topology.groups)
    tokens, loss_mask = tiny.batch(sequences=8, vocab_size=400)
    loss = tiny.run(stage, tokens, loss_mask).loss / loss_mask.sum()
    assert loss.item() == pytest.approx(math.log(400), rel=0.15)


def test_fast_weights_outlive_windows(stage):
    """Half-lives of a hundred to seven thousand tokens, as the input's part of the decay is zero."""
    for mixer in stage.fast_weight_mixers.values():
        half_lives = math.log(2) / (mixer.A_log.exp() * F.softplus(mixer.dt_bias))
        assert 85 < half_lives.min() < 300 and 2000 < half_lives.max() < 7000


def test_no_two_weights_begin_alike(stage):
    drawn = {name: p for name, p in stage.named_parameters() if p.unique().numel() > 1}
    assert len(drawn) > 20
    for (one, a), (other, b) in itertools.combinations(drawn.items(), 2):
        count = min(a.numel(), b.numel())
        assert not torch.equal(a.flatten()[:count], b.flatten()[:count]), (one, other)
