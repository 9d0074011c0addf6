"""A block's norms before, after and around mixer and MLP, and blocks without an MLP."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from powernap.model.parameters import parameters
from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import mixers, plain, tiny

NORMS = ("pre", "post", "sandwich")


@pytest.mark.parametrize(
    ("letter", "norms"),
    [("a", "pre"), ("g", "pre"), *itertools.product("AaGg", NORMS[1:])],  # A, G, pre: test_every_mixer.py
)
@pytest.mark.parametrize("check", mixers.CHECKS, ids=lambda check: check.__name__)
def test_holds(topology, monkeypatch, check, letter, norms):
    monkeypatch.setitem(mixers.FURTHER, letter, {"norms": norms})
    check(topology, letter)


@pytest.mark.parametrize("letter", ["A", "a", "G", "g"])
@pytest.mark.parametrize("norms", NORMS)
def test_against_the_sum_written_out(topology, norms, letter):
    """Hidden states and all gradients, in float64."""
    model = tiny.model_config(
        pattern=letter, **{"A": {"attention": {"norms": norms}}, "G": {"gdn": {"norms": norms}}}[letter.upper()]
    )
    stage = tiny.build_stage(topology, model)
    layer, tokens = stage.decoder.layers[0], torch.ones(3, tiny.WINDOW + 1, dtype=torch.long)
    (segment,) = tiny.plan_segments(tokens, tokens.bool(), model, stage.sleep, 1)
    x = torch.randn(tiny.WINDOW, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state, window = next(iter(stage.empty_layer_states(3)), None), stage._window(segment, tokens[:, :-1])
    found, _ = layer(x, state, window)

    def norm(y, module):
        return F.rms_norm(y, (16,), module.weight, model.norm_eps)

    before, after = norms != "post", norms != "pre"
    mixed, _ = layer.self_attention(norm(x, layer.input_layernorm) if before else x, state, window)
    expected = x + (norm(mixed, layer.post_mixer_layernorm) if after else mixed)
    if letter.isupper():
        inside = plain.mlp(layer.mlp, norm(expected, layer.pre_mlp_layernorm) if before else expected)
        expected = expected + (norm(inside, layer.post_mlp_layernorm) if after else inside)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = torch.cos(x)
    mixers.assert_same_gradients((found * along).sum(), (expected * along).sum(), list(layer.parameters()), 1e-11)


def test_small_letters_have_no_mlp():
    """Inserted between blocks of attention, as a pretrained model gets fast weights."""
    recipe = load_recipe("depo", ["model.pattern=AgAg"])
    weights = parameters(recipe.model, recipe.sleep, range(4))
    assert [b for b in range(4) if any(w.name.startswith(f"decoder.layers.{b}.mlp") for w in weights)] == [0, 2]
    assert [b for b in range(4) if any(w.name == f"decoder.layers.{b}.pre_mlp_layernorm.weight" for w in weights)] == [
        0,
        2,
    ]
    assert recipe.model.fast_weight_blocks == (1, 3)
    with pytest.raises(
        RecipeError, match="use only the letters A, G, M, K, S, J, small ones for blocks without an MLP"
    ):
        load_recipe("depo", ["model.pattern=Ax"])
