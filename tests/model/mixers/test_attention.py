"""Attention's choices, alone and together: against a second implementation, and what every mixer must hold."""

import pytest
import torch
import torch.nn.functional as F

from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import mixers, tiny

CHOICES = {
    "grouped": {"kv_heads": 1},
    "wider heads": {"head_dim": 12},
    "normed": {"qk_norm": True},
    "gated": {"output_gate": True},
    "partly rotated": {"rotary_dims": 4},
    "without positions": {"rotary_dims": 0},
    "normed over the width, biased": {"kv_heads": 1, "qk_norm": True, "qk_norm_over": "width", "qkv_bias": True},
    "all": {"kv_heads": 1, "head_dim": 12, "qk_norm": True, "output_gate": True, "rotary_dims": 4},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("check", mixers.CHECKS, ids=lambda check: check.__name__)
def test_holds(topology, monkeypatch, check, choice):
    monkeypatch.setitem(mixers.FURTHER, "A", CHOICES[choice])
    check(topology, "A")


def reference(
    module,
    x,
    heads,
    kv_heads,
    width,
    qk_norm,
    output_gate,
    rotary_dims,
    qk_norm_over="head",
    qkv_bias=False,
    base=10000.0,
):
    """One window of x [B, L, D] a head at a time, from projections that are apart."""
    queries, length = heads // kv_heads, x.shape[1]
    rows = module.qkv_proj.weight.view(kv_heads, -1, width, x.shape[-1])
    places, half = torch.arange(length, dtype=x.dtype), rotary_dims // 2
    angles = places[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / max(1, half))

    biases = module.qkv_proj.bias.view(kv_heads, -1, width) if qkv_bias else torch.zeros(kv_heads, queries + 2, width)

    def row(group, which):
        return x @ rows[group][which].T + biases[group][which]

    def normed(y, norm, head, everyone):
        """everyone: where all heads' rows are."""
        if not qk_norm:
            return y
        weight, squares = norm.weight, y.pow(2).mean(-1, keepdim=True)
        if qk_norm_over == "width":
            weight = weight[head * width : (head + 1) * width]
            squares = torch.cat([row(*place) for place in everyone], -1).pow(2).mean(-1, keepdim=True)
        return y / (squares + norm.eps).sqrt() * weight

    def rotated(y):
        a, b, rest = y[..., :half], y[..., half:rotary_dims], y[..., rotary_dims:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)

    all_q, all_k = [(h // queries, h % queries) for h in range(heads)], [(group, -2) for group in range(kv_heads)]
    outputs = []
    for head in range(heads):
        group, number = rows[head // queries], head // queries
        q, k, v = row(number, head % queries), row(number, -2), row(number, -1)
        q = rotated(normed(q, getattr(module, "q_norm", None), head, all_q))
        k = rotated(normed(k, getattr(module, "k_norm", None), number, all_k))
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
        if output_gate:
            outputs[-1] = outputs[-1] * torch.sigmoid(x @ group[queries + head % queries].T)
    return torch.cat(outputs, -1) @ module.out_proj.weight.T


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("choice", [{}, *CHOICES.values()], ids=["plain", *CHOICES])
def test_against_heads_one_by_one(topology, choice, heads):
    """Outputs and all gradients of one window, in float64."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="A", attention={"heads": heads, **choice}))
    module, width = stage.decoder.layers[0].self_attention, choice.get("head_dim", 16 // heads)
    sizes = {"kv_heads": heads, "qk_norm": False, "output_gate": False, "rotary_dims": width, **choice}
    sizes.pop("head_dim", None)
    x = torch.randn(3, tiny.WINDOW, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens = torch.ones(3, tiny.WINDOW + 1, dtype=torch.long)
    (segment,) = tiny.plan_segments(tokens, tokens.bool(), stage.model, stage.sleep, 1)
    window = stage._window(segment, tokens[:, :-1])
    found = module(x.transpose(0, 1), None, window)[0].transpose(0, 1)
    expected = reference(module, x, heads, width=width, **sizes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    along = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mixers.assert_same_gradients((found * along).sum(), (expected * along).sum(), list(module.parameters()), 1e-11)


def test_scaled_dot_product_attention_groups_heads_as_we_do():
    """Query h sees key and value h // (heads / kv_heads): neighbours share."""
    query, key, value = (torch.randn(1, n, 3, 8, dtype=torch.float64) for n in (4, 2, 2))
    found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    repeated = (x.repeat_interleave(2, dim=1) for x in (key, value))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, *repeated))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention.kv_heads=3"], "attention.kv_heads=3 must divide attention.heads=4"),
        (["model.attention.heads=6"], "attention.heads=6 must divide hidden_size=256, or write attention.head_dim"),
        (["model.attention.rotary_dims=3"], "attention.rotary_dims = 3 must be even"),
        (["model.attention.rotary_dims=80"], "attention.rotary_dims=80 must be at most the width of a head, 64"),
        (["model.attention.head_dim=33"], "the width of a head = 33 must be even"),
        (
            ["model.attention.kv_heads=1", "parallel.tensor=2", "optimizer.name=adamw"],
            "attention.kv_heads=1 must be a multiple of parallel.tensor=2",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        load_recipe("depo", overrides)
