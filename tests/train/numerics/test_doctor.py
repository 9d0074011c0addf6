"""The doctor's table, and that it sees a rule that is wrong, a kernel that is missing, numbers that are not finite."""

import os
from unittest import mock

import pytest
import torch

from powernap.launch import cli
from powernap.model.mixers import gated_delta_net, kimi_delta_attention
from powernap.model.mixers.fla import KernelError
from powernap.train.numerics import doctor


def verdicts(topology):
    return {(f.letter, str(f.dtype).removeprefix("torch.")): f for f in doctor.examine(topology)}


def test_everything_is_right_here(topology):
    found = verdicts(topology)
    assert {letter for letter, _ in found} >= {"G", "M", "K", "J"} and all(f.is_right for f in found.values())
    assert all(f.error < 1e-4 for (_, dtype), f in found.items() if dtype == "float32")


def test_a_wrong_gradient_is_seen(topology, monkeypatch):
    """In float64 the rule is right; beside it one that forgets a tenth of what it should keep."""
    right = kimi_delta_attention.chunked_kimi_delta_rule

    def wrong(q, k, v, g, beta, state, *options):
        return right(q, k, v, g if g.dtype == torch.float64 else g - 0.1, beta, state, *options)

    monkeypatch.setattr(kimi_delta_attention, "chunked_kimi_delta_rule", wrong)
    found = verdicts(topology)
    assert not found["K", "float32"].is_right and found["G", "float32"].is_right


def test_what_cannot_be_computed_is_a_line(topology, monkeypatch, capsys):
    def refuse(self, dtype, device):
        if dtype == torch.bfloat16:
            raise KernelError("bf16 on CUDA needs FLA's kernels: pip install 'powernap[cuda]'")

    monkeypatch.setattr(gated_delta_net.GatedDeltaNet, "check_kernels", refuse)
    found = verdicts(topology)
    assert found["G", "bfloat16"].error is None and "pip install" in found["G", "bfloat16"].problem
    assert found["G", "float32"].is_right


@pytest.mark.parametrize("error", [0.0, float("nan")])
def test_the_command(monkeypatch, capsys, error):
    finding = doctor.Finding("G", torch.float32, "torch, in chunks", error, "")
    monkeypatch.setattr(doctor, "examine", lambda topology: iter([finding]))
    with mock.patch.dict(os.environ):  # a command on a single process records that there
        assert cli.main(["doctor"]) == (1 if error else 0)
    said = capsys.readouterr().out
    assert ("all is well" in said) != bool(error) and ("WRONG" in said) == bool(error)
    assert "torch " in said and "deepspeed" in said and max(map(len, said.splitlines())) <= 80
