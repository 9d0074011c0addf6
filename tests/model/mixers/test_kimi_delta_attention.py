"""Kimi Delta Attention's forms against the recurrence and against the mixer written down a second time.

What every mixer must hold it is asked in test_every_mixer.py, and in every layout in tests/parallel/test_layouts.py.
"""

import pytest
import torch
import torch.nn.functional as F

from powernap.model.batch import plan_segments
from powernap.model.mixers.delta_rule import sequential_delta_rule
from powernap.model.mixers.fla import KernelError
from powernap.model.mixers.kimi_delta_attention import (
    KimiDeltaAttention,
    chunked_kimi_delta_rule,
    decayed_products,
)
from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import tiny

B, H, K, V = 2, 3, 5, 4
kimi_delta_rule = KimiDeltaAttention(heads=H, key_dim=K, value_dim=V).rule
FORMS = [sequential_delta_rule, chunked_kimi_delta_rule]


def inputs(length, decay=1.0, device="cpu", sizes=(B, H, K, V)):
    b, h, k_dim, v_dim = sizes
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(b, length, h, k_dim), dim=-1) for _ in range(2))
    g = -decay * F.softplus(normal(b, length, h, k_dim))
    values = [q, k, normal(b, length, h, v_dim), g, normal(b, length, h).sigmoid(), normal(b, h, k_dim, v_dim)]
    return [x.to(device).requires_grad_() for x in values]


def run(form, values, **options):
    """Output, final state and the gradients of a random weighting of both."""
    generator = torch.Generator().manual_seed(9)
    output, state = form(*values, **options)
    loss = 0.0
    for result in (output, state):
        if result is not None:
            weight = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
            loss = loss + (result * weight).sum()
    return [output, state, *torch.autograd.grad(loss, values, allow_unused=True)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:  # a NaN is close to nothing
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33, 75])
@pytest.mark.parametrize("decay", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("need_output", [True, False])
def test_the_chunked_form_is_the_recurrence(length, decay, need_output):
    values = inputs(length, decay)
    expected = run(sequential_delta_rule, values, need_output=need_output)
    for max_chunk in (1, 8, 32):
        assert_close(run(chunked_kimi_delta_rule, values, need_output=need_output, max_chunk=max_chunk), expected)


def test_the_recurrence_is_the_papers_equation():
    """S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T and o_t = S_t^T q_t, with the matrices written out."""
    q, k, v, g, beta, state = (x.detach() for x in inputs(9))
    output, end = sequential_delta_rule(q, k, v, g, beta, state)
    for t in range(9):
        strength = beta[:, t, :, None, None]
        forget = torch.eye(K) - strength * k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        state = forget @ torch.diag_embed(g[:, t].exp()) @ state
        state = state + strength * k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        expected = (state.transpose(-1, -2) @ q[:, t].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(output[:, t], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(end, state, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [0.01, 1.0, 300.0])
def test_channels_that_decay_alike_are_the_gated_delta_rule(form, decay):
    """The gradient of g, too: a head's is the sum over its channels'."""
    q, k, v, g, beta, state = inputs(40, decay)
    g = g[..., 0].detach().requires_grad_()

    def of_one_decay(q, k, v, g, beta, state):
        return form(q, k, v, g.unsqueeze(-1).expand_as(k), beta, state)

    values = [q, k, v, g, beta, state]
    assert_close(run(of_one_decay, values), run(sequential_delta_rule, values))


def test_a_channel_forgets_alone():
    """Without writes each row of the state decays by its own alpha."""
    q, k, v, g, beta, state = inputs(40, 0.1)
    for form in FORMS:
        _, after = form(q, k, v, g, beta * 0, state)
        torch.testing.assert_close(after, g.sum(1).exp().unsqueeze(-1) * state, rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 25])
def test_decayed_products_are_those_of_every_pair(length):
    generator = torch.Generator().manual_seed(length)
    x, y, k = (torch.randn(6, length, K, generator=generator, dtype=torch.float64) for _ in range(3))
    gamma = -torch.rand(6, length, K, generator=generator, dtype=torch.float64).cumsum(1)
    decay = (gamma.unsqueeze(2) - gamma.unsqueeze(1)).exp()
    for row, found in zip((x, y), decayed_products([x, y], k, gamma), strict=True):
        expected = torch.einsum("nik,njk,nijk->nij", row, k, decay).tril()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_two_halves_with_the_state_handed_on_equal_the_whole():
    *tokens, state = inputs(50)
    output, whole = kimi_delta_rule(*tokens, state)
    first, middle = kimi_delta_rule(*(x[:, :23] for x in tokens), state)
    second, last = kimi_delta_rule(*(x[:, 23:] for x in tokens), middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-12)


def test_strong_and_weak_decays_side_by_side_are_finite_in_float32():
    """One channel forgets all at each token, its neighbour nothing."""
    values = inputs(75)
    strength = torch.tensor([1e4, 1e-6, 300.0, 0.0, 1.0])
    values[3] = (values[3] * strength).detach().requires_grad_()
    expected = run(sequential_delta_rule, values)
    found = run(chunked_kimi_delta_rule, [x.detach().float().requires_grad_() for x in values])
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


def test_bfloat16_inputs_keep_a_float32_state():
    values = [x.detach().float() for x in inputs(33)]
    low = [x.bfloat16() for x in values[:3]] + values[3:]
    output, state = kimi_delta_rule(*low)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = sequential_delta_rule(*low)
    assert (output - expected).float().norm() / expected.float().norm() < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FLA's Triton kernel needs a CUDA device")
@pytest.mark.parametrize("decay", [0.1, 300.0])
@pytest.mark.parametrize("length", [24, 64, 300])
def test_flas_kernel_is_the_recurrence(length, decay):
    pytest.importorskip("fla")
    exact = inputs(length, decay, device="cuda", sizes=(2, 4, 64, 64))
    low = [x.detach().bfloat16().requires_grad_() for x in exact[:3]]
    low += [x.detach().float().requires_grad_() for x in exact[3:]]
    for one, other in zip(run(kimi_delta_rule, low), run(sequential_delta_rule, exact), strict=True):
        # Under strong decay the gates' gradients are nothing but rounding.
        assert (one.double() - other).norm() <= 2e-2 * (1 + other.norm())


def test_the_mixer_written_down_a_second_time(topology):
    """One window in plain torch with conv1d and the recurrence, from the weights by their rows' names."""
    sizes = dict(heads=2, key_dim=5, value_dim=3, conv_kernel=4)
    stage = tiny.build_stage(topology, tiny.model_config(pattern="K", kda=sizes))
    layer, length = stage.decoder.layers[0].self_attention, tiny.WINDOW
    x = torch.randn(length, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, length + 1)
    segment = plan_segments(nothing.long() + 1, nothing.bool(), stage.model, stage.sleep, 1)[0]
    window = stage._window(segment, torch.ones(2, length).long())
    found, state = layer(x, stage.empty_layer_states(2)[0], window)

    rows = F.linear(x, layer.in_proj.weight).view(length, 2, 2, -1)  # [q 5 | k 5 | v 3 | z 3 | beta 1 | alpha 5] a head
    outputs, states = [], []
    for head in range(2):
        qkv, z, beta, alpha = rows[:, :, head].split([13, 3, 1, 5], dim=-1)
        taps = layer.conv_weight[head].unsqueeze(1)
        conv = F.conv1d(F.pad(qkv.permute(1, 2, 0), (3, 0)), taps, groups=13).permute(2, 0, 1)
        q, k, v = F.silu(conv).split([5, 5, 3], dim=-1)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        held, read = torch.zeros(2, 5, 3, dtype=torch.float64), []
        for t in range(length):
            held = (-layer.A_log[head].exp() * F.softplus(alpha[t] + layer.dt_bias[head])).exp().unsqueeze(-1) * held
            wrong = v[t] - torch.einsum("bkv,bk->bv", held, k[t])
            held = held + torch.einsum("bk,bv->bkv", k[t], beta[t].sigmoid() * wrong)
            read.append(torch.einsum("bkv,bk->bv", held, q[t]))
        y = torch.stack(read)
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
        outputs.append(y * z.sigmoid())
        states.append(held)
    expected = F.linear(torch.cat(outputs, dim=-1), layer.out_proj.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, torch.stack(states, dim=1), rtol=0, atol=1e-12)


def test_every_channel_starts_with_its_own_decay(topology):
    """Half-lives as a gated delta net's: about a hundred to seven thousand tokens."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="K", kda=dict(heads=4, key_dim=64)))
    layer = stage.decoder.layers[0].self_attention
    assert layer.A_log.shape == (4,) and layer.dt_bias.shape == (4, 64)
    assert len(layer.dt_bias.unique()) == 4 * 64
    step = F.softplus(layer.dt_bias)
    assert step.min() < 2e-4 and step.max() > 1e-3


def test_sizes_that_do_not_fit_are_answered_with_a_recipes_fields(monkeypatch):
    fields = ["model.pattern=AKAK", "model.kda={heads: 4, key_dim: 64, value_dim: 64}"]
    assert isinstance(load_recipe("depo", fields).model.mixers[1], KimiDeltaAttention)
    with pytest.raises(RecipeError, match="kda.heads=3 must be a multiple of parallel.tensor=2"):
        load_recipe("depo", [*fields, "model.kda.heads=3", "parallel.tensor=2", "optimizer.name=adamw"])
    with pytest.raises(RecipeError, match="kda is missing: .* needs kda.heads, kda.key_dim, kda.value_dim"):
        load_recipe("depo", fields[:1])
    monkeypatch.setattr("powernap.model.mixers.fla.find_spec", lambda name: name)
    mixer = KimiDeltaAttention(heads=1, key_dim=264, value_dim=8)
    with pytest.raises(KernelError, match="model.kda.key_dim=264: .* at most 256"):
        mixer.check_kernels(torch.bfloat16, torch.device("cuda"))
