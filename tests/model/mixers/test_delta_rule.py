"""The delta rule's forms against the token-by-token recurrence: outputs, final state, every gradient."""

import pytest
import torch
import torch.nn.functional as F

from powernap.model.mixers import fla as fla_module
from powernap.model.mixers.delta_rule import (
    chunked_delta_rule,
    gated_delta_rule,
    running_sum,
    sequential_delta_rule,
)
from powernap.model.mixers.fla import KernelError
from tests.helpers import tiny

B, H, K, V = 2, 3, 5, 4


def inputs(length, decay=1.0, dtype=torch.float64, device="cpu", sizes=(B, H, K, V)):
    b, h, k_dim, v_dim = sizes
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(b, length, h, k_dim), dim=-1) for _ in range(2))
    g = -decay * F.softplus(normal(b, length, h))
    values = [q, k, normal(b, length, h, v_dim), g, normal(b, length, h).sigmoid(), normal(b, h, k_dim, v_dim)]
    return [x.to(device, dtype).requires_grad_() for x in values]


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


@pytest.mark.parametrize("length", [1, 2, 16, 31, 64, 75, 130])
@pytest.mark.parametrize("max_chunk", [1, 8, 32, 64])
def test_chunked_equals_sequential(length, max_chunk):
    values = inputs(length)
    expected = run(sequential_delta_rule, values)
    found = run(chunked_delta_rule, values, max_chunk=max_chunk)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1e-3, 50.0, 1e4])
def test_decay_from_none_to_total_stays_exact_and_finite(decay):
    values = inputs(48, decay)
    expected = run(sequential_delta_rule, values)
    found = run(chunked_delta_rule, values)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_state_without_output_is_the_same_state():
    values = inputs(40)
    for form in (sequential_delta_rule, chunked_delta_rule):
        output, state = form(*values, need_output=False)
        assert output is None
        torch.testing.assert_close(state, sequential_delta_rule(*values)[1], rtol=0, atol=1e-12)


def test_two_halves_with_the_state_between_equal_the_whole():
    values = inputs(50)
    *tokens, state = values
    first, middle = gated_delta_rule(*(x[:, :23] for x in tokens), state)
    second, last = gated_delta_rule(*(x[:, 23:] for x in tokens), middle)
    output, whole = gated_delta_rule(*values)
    torch.testing.assert_close(torch.cat([first, second], dim=1), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-12)


def test_a_write_of_strength_two_reflects_the_state():
    """Along k its sign flips: the eigenvalue of I - beta k k^T there is -1, which no strength up to one reaches."""
    q, k, _, g, beta, state = (x.detach() for x in inputs(1, decay=0.0))
    nothing = torch.zeros(B, 1, H, V, dtype=torch.float64)
    for form in (sequential_delta_rule, chunked_delta_rule):
        _, reflected = form(q, k, nothing, g, 2 * torch.ones_like(beta), state)
        recalled, before = (torch.einsum("bhk,bhkv->bhv", k[:, 0], s) for s in (reflected, state))
        torch.testing.assert_close(recalled, -before, rtol=0, atol=1e-12)


def test_a_token_with_no_write_and_no_decay_leaves_the_state():
    q, k, v, g, beta, state = inputs(7)
    _, after = gated_delta_rule(q, k, v, g * 0, beta * 0, state)
    torch.testing.assert_close(after, state, rtol=0, atol=0)


def test_writing_the_same_key_twice_replaces_the_value():
    k = F.normalize(torch.randn(1, 1, 1, K, dtype=torch.float64), dim=-1).expand(1, 2, 1, K)
    v = torch.randn(1, 2, 1, V, dtype=torch.float64)
    gates = torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
    output, _ = gated_delta_rule(k, k, v, *gates, torch.zeros(1, 1, K, V, dtype=torch.float64))
    torch.testing.assert_close(output, v, rtol=0, atol=1e-14)  # beta = 1: the last value is read back, not a sum


def test_bfloat16_inputs_keep_a_float32_state():
    values = [x.detach() for x in inputs(33, dtype=torch.float32)]
    low = [x.bfloat16() for x in values[:3]] + values[3:]
    output, state = gated_delta_rule(*low)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = sequential_delta_rule(*low)
    assert (output - expected).float().norm() / expected.float().norm() < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FLA's Triton kernel needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("length", [24, 64, 300])
def test_fla_kernel_against_float64(dtype, bound, length):
    pytest.importorskip("fla")
    sizes = (2, 4, 64, 64)
    exact = inputs(length, decay=0.1, device="cuda", sizes=sizes)
    low = [x.detach().to(dtype).requires_grad_() for x in exact[:3]]
    low += [x.detach().float().requires_grad_() for x in exact[3:]]
    for one, other in zip(run(gated_delta_rule, low), run(sequential_delta_rule, exact), strict=True):
        assert (one.double() - other).norm() / other.norm() < bound


class TestKernelsAreCheckedBeforeTheFirstStep:
    """On a machine that pretends to have a device: which kernels are installed is asked of Python alone."""

    @pytest.fixture
    def check(self, monkeypatch):
        installed, capability = {"triton": "3.7.1"}, [9, 0]
        monkeypatch.setattr(fla_module, "find_spec", lambda name: name if name in {"fla"} else None)
        monkeypatch.setattr(fla_module, "version", installed.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))

        def check(dtype=torch.bfloat16, device="cuda", triton="3.7.1", major=9, fla=True, **sizes):
            installed["triton"], capability[0] = triton, major
            if not fla:
                monkeypatch.setattr(fla_module, "find_spec", lambda name: None)
            return tiny.model_config(gdn=sizes).gdn.check_kernels(dtype, torch.device(device))

        return check

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            (dict(fla=False), r"train.precision=bf16 on CUDA needs FLA's kernels: pip install 'powernap\[cuda\]'"),
            (dict(key_dim=264), "model.gdn.key_dim=264: .* at most 256; use more heads"),
            (dict(triton="3.6.0"), r"Triton 3.6.0 computes wrong gradients on Hopper .*pip install 'triton>=3.7.1'"),
            (dict(triton="3.10.0", key_dim=257), "gdn.key_dim"),
        ],
    )
    def test_refused(self, check, case, message):
        with pytest.raises(KernelError, match=message):
            check(**case)

    @pytest.mark.parametrize(
        "case",
        [
            dict(),
            dict(key_dim=256),
            dict(triton="3.10.0"),
            dict(triton="3.6.0", major=8),
            dict(device="cpu", fla=False, key_dim=264),
            dict(dtype=torch.float32, fla=False, key_dim=264),
        ],
    )
    def test_taken(self, check, case):
        check(**case)


@pytest.mark.parametrize("dim", [-1, -2])
def test_running_sums_where_cumsum_has_no_deterministic_kernel(monkeypatch, dim):
    x = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x.cumsum(dim)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert torch.equal(running_sum(x, dim), expected)
    monkeypatch.setattr(torch.Tensor, "cumsum", None)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(running_sum(x, dim), expected, rtol=1e-14, atol=1e-14)
    finally:
        torch.use_deterministic_algorithms(False)
