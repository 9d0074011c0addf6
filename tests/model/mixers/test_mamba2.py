"""Mamba-2's forms against the recurrence and against the mixer written down a second time.

What every mixer must hold it is asked in test_every_mixer.py, and in every layout in tests/parallel/test_layouts.py.
"""

import pytest
import torch
import torch.nn.functional as F

from powernap.model.mixers.mamba2 import Mamba2, chunked_ssd, sequential_ssd, ssd
from powernap.train.recipe_file import RecipeError, load_recipe
from tests.helpers import tiny

B, G, H, N, P = 2, 2, 6, 5, 4


def inputs(length, decay=1.0, dtype=torch.float64, device="cpu", sizes=(B, G, H, N, P)):
    batch, groups, heads, rows, columns = sizes
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, length, groups, rows), normal(batch, length, groups, rows)
    step = F.softplus(normal(batch, length, heads))
    made = (q, k, normal(batch, length, heads, columns), -decay * step, step)
    state = normal(batch, heads, rows, columns).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return [x.to(device, dtype).requires_grad_() for x in made] + [state.requires_grad_()]


def results(function, arguments, need_output=True):
    """Output, final state and the gradients of a sum that weighs every number of both differently."""
    output, state = function(*arguments, need_output)
    parts = [x for x in (output, state) if x is not None]
    weights = (torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float64)).view_as(x) for x in parts)
    loss = sum((x.double() * weight).sum() for x, weight in zip(parts, weights, strict=True))
    return parts, torch.autograd.grad(loss, arguments, allow_unused=not need_output)


def assert_equal(one, other, bound):
    for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
        assert (a is None) == (b is None)
        # Under strong decay the gates' gradients are nothing but rounding.
        assert a is None or (a.double() - b.double()).norm() <= bound * (1 + b.double().norm())


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33, 75])
@pytest.mark.parametrize("decay", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("need_output", [True, False])
def test_the_chunked_form_is_the_recurrence(length, decay, need_output):
    arguments = inputs(length, decay)
    chunked = results(lambda *a: chunked_ssd(*a, max_chunk=8), arguments, need_output)
    assert_equal(chunked, results(sequential_ssd, arguments, need_output), 1e-12)


def test_the_recurrence_is_the_papers_equation():
    """S_t = exp(-A dt) S_{t-1} + dt B x^T and y_t = S_t^T C, written with a sum over all earlier tokens."""
    q, k, v, g, beta, state = (x.detach() for x in inputs(9))
    q, k = (x.repeat_interleave(H // G, dim=2) for x in (q, k))
    decay = g.cumsum(1)
    expected = torch.einsum("bthn,bhnp,bth->bthp", q, state, decay.exp())
    for t in range(9):
        for s in range(t + 1):
            weight = (q[:, t] * k[:, s]).sum(-1) * (decay[:, t] - decay[:, s]).exp() * beta[:, s]
            expected[:, t] += weight.unsqueeze(-1) * v[:, s]
    output, _ = sequential_ssd(*(x.detach() for x in inputs(9)))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_two_halves_with_the_state_handed_on_equal_the_whole():
    *tokens, state = inputs(20)
    whole, end = chunked_ssd(*tokens, state)
    first, middle = chunked_ssd(*(x[:, :13] for x in tokens), state)
    second, other_end = chunked_ssd(*(x[:, 13:] for x in tokens), middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_end, end, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FLA's Triton kernel needs a CUDA device")
@pytest.mark.parametrize("length", [64, 75, 300])
def test_flas_kernel_is_the_recurrence(length):
    arguments = inputs(length, dtype=torch.bfloat16, device="cuda", sizes=(2, 2, 4, 64, 64))
    expected = results(sequential_ssd, [x.detach().double().requires_grad_() for x in arguments])
    assert_equal(results(ssd, arguments), expected, 2e-2)


def test_the_mixer_written_down_a_second_time(topology):
    """One window in plain torch with conv1d and the recurrence, from the weights by their rows' names."""
    stage = tiny.build_stage(
        topology, tiny.model_config(pattern="M", mamba2=dict(heads=4, head_dim=3, state_dim=5, groups=2))
    )
    layer, length = stage.decoder.layers[0].self_attention, tiny.WINDOW
    x = torch.randn(length, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    segment = tiny.plan_segments(
        torch.ones(2, length + 1).long(), torch.zeros(2, length + 1).bool(), stage.model, stage.sleep, 1
    )[0]
    found, state = layer(x, stage.empty_layer_states(2)[0], stage._window(segment, torch.ones(2, length).long()))

    rows = F.linear(x, layer.in_proj.weight).view(length, 2, 2, -1)  # [x 6 | B 5 | C 5 | z 6 | dt 2] a group
    outputs, states = [], []
    for group in range(2):
        xbc, z, dt = rows[:, :, group].split([16, 6, 2], dim=-1)
        taps = layer.conv_weight[group].unsqueeze(1)
        conv = F.conv1d(F.pad(xbc.permute(1, 2, 0), (3, 0)), taps, layer.conv_bias[group], groups=16).permute(2, 0, 1)
        u, b, c = F.silu(conv).split([6, 5, 5], dim=-1)
        y = torch.zeros(length, 2, 2, 3, dtype=torch.float64)
        for head in range(2):
            index, held = 2 * group + head, torch.zeros(2, 5, 3, dtype=torch.float64)
            for t in range(length):
                step = F.softplus(dt[t, :, head] + layer.dt_bias[index])
                token = u[t, :, 3 * head : 3 * head + 3]
                held = (-layer.A_log[index].exp() * step).exp()[:, None, None] * held + torch.einsum(
                    "b,bn,bp->bnp", step, b[t], token
                )
                y[t, :, head] = torch.einsum("bnp,bn->bp", held, c[t]) + layer.D[index] * token
            states.append(held)
        y = y.flatten(2) * F.silu(z)
        outputs.append(y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_weight[group])
    expected = F.linear(torch.cat(outputs, dim=-1), layer.out_proj.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, torch.stack(states, dim=1), rtol=0, atol=1e-12)


def test_sizes_that_do_not_fit_are_answered_with_a_recipes_fields():
    fields = ["model.pattern=AMAM", "model.mamba2={heads: 4, head_dim: 64, state_dim: 64}"]
    assert isinstance(load_recipe("depo", fields).model.mixers[1], Mamba2)
    with pytest.raises(RecipeError, match="mamba2.groups=3 must divide mamba2.heads=4"):
        load_recipe("depo", [*fields, "model.mamba2.groups=3"])
    with pytest.raises(RecipeError, match="mamba2.groups=1 must be a multiple of parallel.tensor=2: 2 would be"):
        load_recipe("depo", [*fields, "parallel.tensor=2", "optimizer.name=adamw"])
    with pytest.raises(
        RecipeError, match="mamba2 is missing: .* needs mamba2.heads, mamba2.head_dim, mamba2.state_dim"
    ):
        load_recipe("depo", fields[:1])
