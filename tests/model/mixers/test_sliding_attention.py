"""Attention with a reach: against attention whose scores beyond it are hidden, in both evictions; decoding is test_every_mixer's."""

import pytest
import torch

from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import tiny
from tests.helpers.mixers import training_logits

REACH = 3


def stage_of(topology, letter, eviction, reach=REACH):
    section = {"S": {"sliding_attention": {"heads": 2, "reach": reach}}, "A": {}}[letter]
    return tiny.build_stage(topology, tiny.model_config(pattern=letter, **section), SleepConfig(eviction=eviction))


def tokens(length=3 * tiny.WINDOW - 2):
    return torch.randint(1, 17, (2, length), generator=torch.Generator().manual_seed(5))


def test_as_long_as_a_window_it_is_attention(topology):
    for eviction in ("hard", "sliding"):
        stages = [stage_of(topology, letter, eviction, tiny.WINDOW) for letter in "AS"]
        found, expected = (training_logits(stage, tokens(), 1) for stage in stages)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_tokens_beyond_its_reach_change_nothing(topology, eviction):
    """One block: a token's logits depend on itself and the two tokens before it, across windows under sliding eviction."""
    stage, own = stage_of(topology, "S", eviction), tokens()
    before = training_logits(stage, own, 1)
    for changed in range(own.shape[1]):
        other = own.clone()
        other[:, changed] = other[:, changed] % 16 + 1
        differs = (training_logits(stage, other, 1) - before).abs().amax((0, 2)) > 1e-12
        reached = [t for t in range(changed, min(changed + REACH, own.shape[1]))]
        if eviction == "hard":
            reached = [t for t in reached if t // tiny.WINDOW == changed // tiny.WINDOW]
        assert differs.nonzero().flatten().tolist() == reached


def test_decoded_a_few_tokens_at_a_time(topology):
    stage = stage_of(topology, "S", "sliding")
    decoder = Decoder(stage, 1, 2)
    parts = [torch.stack(decoder.feed_with_logits(part.tolist())) for part in tokens().split([5, 1, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), training_logits(stage, tokens(), 1), rtol=0, atol=1e-10)


def test_a_reach_beyond_the_window_is_refused():
    fields = ["model.pattern=SG", "model.sliding_attention={heads: 4, reach: 5000}"]
    with pytest.raises(RecipeError, match="sliding_attention.reach=5000 must be at most window=75"):
        load_recipe("depo", fields)
