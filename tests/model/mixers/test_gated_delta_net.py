"""The gated delta net's choices, alone and together: against a second implementation, and what every mixer must hold."""

import pytest
import torch
import torch.nn.functional as F

from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import mixers, tiny

CHOICES = {
    "shared keys": {"key_heads": 1},
    "scaled queries": {"scale_queries": True, "l2_eps": 1e-6},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "all": {"key_heads": 2, "heads": 4, "scale_queries": True, "l2_eps": 1e-2, "allow_neg_eigval": True},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("check", mixers.CHECKS, ids=lambda check: check.__name__)
def test_holds(topology, monkeypatch, check, choice):
    monkeypatch.setitem(mixers.FURTHER, "G", CHOICES[choice])
    check(topology, "G")


def reference(module, x, heads, key_heads, d_k, d_v, taps, scale_queries, l2_eps, allow_neg_eigval):
    """x [B, L, D], a head of values and a token at a time, from projections that are apart; returns output and state."""
    values, batch, length = heads // key_heads, x.shape[0], x.shape[1]
    rows = module.in_proj.weight.view(key_heads, -1, x.shape[-1])
    outputs, states = [], []
    for head in range(heads):
        group, own = rows[head // values], head % values
        kernel = module.conv_weight[head // values]
        start = 2 * d_k + own * d_v
        parts = {"q": slice(0, d_k), "k": slice(d_k, 2 * d_k), "v": slice(start, start + d_v)}
        found = {}
        for name, part in parts.items():
            seen = F.pad(x @ group[part].T, (0, 0, taps - 1, 0))
            mixed = [(seen[:, t : t + taps] * kernel[part].T).sum(1) for t in range(length)]
            found[name] = F.silu(torch.stack(mixed, 1))
        after = 2 * d_k + values * d_v
        z = x @ group[after + own * d_v : after + (own + 1) * d_v].T
        beta = torch.sigmoid(x @ group[after + values * d_v + own]) * (2 if allow_neg_eigval else 1)
        alpha = x @ group[after + values * d_v + values + own]
        decay = torch.exp(-module.A_log[head].exp() * F.softplus(alpha + module.dt_bias[head]))
        q, k = (y / (y.pow(2).sum(-1, keepdim=True) + l2_eps).sqrt() for y in (found["q"], found["k"]))
        q = q / d_k**0.5 if scale_queries else q
        state, read = x.new_zeros(batch, d_k, d_v), []
        for t in range(length):
            state = decay[:, t, None, None] * state
            error = found["v"][:, t] - torch.einsum("bk,bkv->bv", k[:, t], state)
            state = state + torch.einsum("bk,bv->bkv", k[:, t], beta[:, t, None] * error)
            read.append(torch.einsum("bk,bkv->bv", q[:, t], state))
        y = torch.stack(read, 1)
        y = y / (y.pow(2).mean(-1, keepdim=True) + module.norm.eps).sqrt() * module.norm.weight
        outputs.append(y * F.silu(z))
        states.append(state)
    return torch.cat(outputs, -1) @ module.out_proj.weight.T, torch.stack(states, 1)


@pytest.mark.parametrize("choice", [{}, *CHOICES.values()], ids=["plain", *CHOICES])
def test_against_heads_one_by_one(topology, choice):
    """Output, state and all gradients of one window, in float64."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="G", gdn=choice))
    module, gdn = stage.decoder.layers[0].self_attention, stage.model.gdn
    x = torch.randn(3, tiny.WINDOW, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = torch.ones(3, tiny.WINDOW + 1, dtype=torch.long)
    (segment,) = tiny.plan_segments(tokens, tokens.bool(), stage.model, stage.sleep, 1)
    (zero,) = stage.empty_layer_states(3)
    found, state = module(x.transpose(0, 1), zero, stage._window(segment, tokens[:, :-1]))
    expected, expected_state = reference(
        module, x, gdn.heads, gdn.key_heads or gdn.heads, gdn.key_dim, gdn.value_dim, gdn.conv_kernel, gdn.scale_queries,
        gdn.l2_eps, gdn.allow_neg_eigval,
    )  # fmt: skip
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in (expected, expected_state)]
    sums = [
        (y * along[0]).sum() + (s * along[1]).sum()
        for y, s in ((found.transpose(0, 1), state), (expected, expected_state))
    ]
    mixers.assert_same_gradients(*sums, list(module.parameters()), 1e-10)


@pytest.mark.parametrize("l2_eps", [0.0, 1e-6])
def test_keys_of_bf16_are_of_length_one(l2_eps):
    """A norm that is rounded to bf16 scales all of a key: |k|^2 is off by up to 0.8 %. Rounding each number averages out."""
    gdn = tiny.model_config(pattern="G", gdn={"key_dim": 128, "l2_eps": l2_eps}).gdn
    x = torch.randn(1000, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    off = [(k.double().square().sum(-1) - 1).abs().max() for k in (gdn.normalize(x), F.normalize(x, dim=-1))]
    assert off[0] < 0.003 < 0.006 < off[1], off
    assert torch.equal(gdn.normalize(x.double()), F.normalize(x.double(), dim=-1)) or l2_eps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.gdn.key_heads=3"], "gdn.key_heads=3 must divide gdn.heads=4"),
        (["model.gdn.key_heads=1", "parallel.tensor=2", "optimizer.name=adamw"], "gdn.key_heads=1 must be a multiple of parallel.tensor=2"),
        (["model.pattern=AK", "model.kda={heads: 4, key_dim: 8, value_dim: 8, key_heads: 2}"], "kda.key_heads=2: each head has"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load_recipe("depo", overrides)
