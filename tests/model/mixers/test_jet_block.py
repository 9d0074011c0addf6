"""Jet-Nemotron's block against its formulas, a token and a channel at a time; its slot's checks are test_every_mixer's."""

import pytest
import torch
import torch.nn.functional as F

from powernap.model.mixers.delta_rule import sequential_delta_rule
from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import mixers, tiny

CHOICES = {
    "plain": {},
    "shared keys": {"heads": 4, "key_heads": 2},
    "of open models": {"scale_queries": True, "l2_eps": 1e-6},
}


def reference(module, x, jet):
    """x [B, T, D] -> (output, state), from projections that are apart."""
    batch, length, width = x.shape
    groups, values, d_k, d_v, taps = jet.groups, jet.heads // jet.groups, jet.key_dim, jet.value_dim, jet.conv_kernel
    rows = module.in_proj.weight.view(groups, -1, width)
    parts = rows.split([d_k, d_k, values * d_v, values * d_v, values, values], dim=1)
    q, k, v, z, beta, alpha = (torch.einsum("btd,grd->btgr", x, part) for part in parts)
    kernels = F.silu(x @ module.generator_in.weight.T) @ module.generator_out.flatten(0, 1).T
    kernels = kernels + module.generator_bias.flatten()
    kernels = kernels.view(batch, length, groups, values * d_v, taps)
    mixed = torch.zeros_like(v)
    for t in range(length):
        for i in range(taps):
            if (source := t - taps + 1 + i) >= 0:
                mixed[:, t] += kernels[:, t, :, :, i] * v[:, source]

    def normed(y):
        return F.silu(y) / (F.silu(y).pow(2).sum(-1, keepdim=True) + jet.l2_eps).sqrt()

    q, k = (normed(y).repeat_interleave(values, dim=2) for y in (q, k))
    q = q * (d_k**-0.5 if jet.scale_queries else 1)
    v, z = (y.reshape(batch, length, jet.heads, d_v) for y in (F.silu(mixed), z))
    beta, alpha = (y.reshape(batch, length, jet.heads) for y in (beta, alpha))
    g = -module.A_log.exp() * F.softplus(alpha + module.dt_bias)
    output, state = sequential_delta_rule(q, k, v, g, beta.sigmoid(), x.new_zeros(batch, jet.heads, d_k, d_v))
    output = F.rms_norm(output, (d_v,), module.norm.weight, module.norm.eps) * F.silu(z)
    return output.flatten(2) @ module.out_proj.weight.T, state


@pytest.mark.parametrize("choice", CHOICES)
def test_against_its_formulas(topology, choice):
    """Output, state and all gradients of one window, in float64."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="J", jet=CHOICES[choice]))
    module, jet = stage.decoder.layers[0].self_attention, stage.model.jet
    x = torch.randn(3, tiny.WINDOW, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = torch.ones(3, tiny.WINDOW + 1, dtype=torch.long)
    (segment,) = tiny.plan_segments(tokens, tokens.bool(), stage.model, stage.sleep, 1)
    (zero,) = stage.empty_layer_states(3)
    found = module(x.transpose(0, 1), zero, stage._window(segment, tokens[:, :-1]))
    expected = reference(module, x, jet)
    torch.testing.assert_close(found[0].transpose(0, 1), expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-11)
    sums = [output.square().sum() + state.square().sum() for output, state in (found, expected)]
    mixers.assert_same_gradients(*sums, list(module.parameters()), 1e-10)


def test_the_taps_differ_from_token_to_token(topology):
    """What tells it from a gated delta net: the same value, other taps."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="J"))
    module = stage.decoder.layers[0].self_attention
    x = torch.randn(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    narrow = F.silu(x @ module.generator_in.weight.T)
    kernels = narrow @ module.generator_out.flatten(0, 1).T
    assert (kernels[0] - kernels[1]).abs().min() > 1e-6


def test_its_generator_is_split_like_its_heads():
    fields = [
        "model.pattern=AJ",
        "model.jet={heads: 4, key_dim: 8, value_dim: 8, generator_dim: 5}",
        "parallel.tensor=2",
    ]
    with pytest.raises(
        RecipeError, match=r"model.jet.generator_dim=5 must be a multiple of parallel.tensor=2: 6 would be"
    ):
        load_recipe("depo", [*fields, "optimizer.name=adamw"])
