"""Norms whose weights are differences from one: the same model, weights and gradients, from other numbers."""

import pytest
import torch

from tests.helpers import tiny

QK_NORM = {"attention": {"qk_norm": True}}


def both(topology, dtype=torch.float64):
    """A model with plain norms, and the same one with zero-centred norms."""
    plain = tiny.build_stage(topology, tiny.model_config(**QK_NORM), dtype=dtype)
    centred = tiny.build_stage(topology, tiny.model_config(**QK_NORM, zero_centred_norms=True), dtype=dtype)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in centred.named_parameters():
            parameter.copy_(weights[name] - differs(name))
    return plain, centred


def differs(name: str) -> int:
    """1 for the norms of the model, 0 for those of a recurrence's output and all that is no norm."""
    return int("norm" in name and not name.endswith("self_attention.norm.weight"))


def test_they_are_the_same_model(topology):
    plain, centred = both(topology)
    assert sum(differs(name) for name, _ in plain.named_parameters()) == 2 * 4 + 2 * 2 + 1
    tokens, loss_mask = tiny.batch()
    one, other = (tiny.run(stage, tokens, loss_mask, 2) for stage in (plain, centred))
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-13)
    assert tiny.largest_difference(tiny.gradients(plain, one.loss), tiny.gradients(centred, other.loss)) < 1e-12


def test_they_begin_at_one(topology):
    stage = tiny.HybridStage(tiny.model_config(**QK_NORM, zero_centred_norms=True), tiny.SleepConfig(), topology.groups)
    for name, parameter in stage.named_parameters():
        if "norm" in name:
            assert (parameter == 1 - differs(name)).all(), name


def test_bfloat16_keeps_small_weights(topology):
    """1 + 0.001 is 1 in bfloat16."""
    plain, centred = both(topology, torch.bfloat16)
    norm = centred.decoder.final_layernorm
    with torch.no_grad():
        norm.weight.fill_(0.001)
        plain.decoder.final_layernorm.weight.fill_(1)
    x = torch.randn(5, 3, 16).bfloat16() * 100
    found = norm(x)
    assert found.dtype == torch.bfloat16
    exact = torch.nn.functional.rms_norm(x.float(), (16,), eps=norm.eps) * 1.001
    assert (found.float() / exact - 1).abs().mean() < 0.9 * (
        plain.decoder.final_layernorm(x).float() / exact - 1
    ).abs().mean()
