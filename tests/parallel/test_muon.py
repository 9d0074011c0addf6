"""Muon in every layout against Muon on whole matrices in one process: six steps; what takes a slice for a matrix is seen."""

import pytest
import torch

from powernap.parallel import muon
from tests.helpers import tiny, zero_layouts
from tests.helpers.cases import asked_for, names
from tests.helpers.plain_muon import orthogonalise, rows_of
from tests.helpers.processes import run_cases
from tests.helpers.zero_layouts import MUON, SPLIT_MUON, Case, Problem
from tests.parallel.test_zero_layouts import check_task

PLAIN, SPLIT = Problem(optimizer=MUON), Problem(optimizer=SPLIT_MUON)
BF16 = Problem(optimizer=MUON, precision="bf16")
SP = dict(tensor=2, sequence=True)
CASES = {
    "one process": Case(problem=PLAIN),
    "one process, projections apart": Case(problem=SPLIT),
    "DP2": Case(data=2, problem=PLAIN),
    "DP2, ZeRO 2": Case(zero_stage=2, data=2, problem=PLAIN),
    "TP2": Case(tensor=2, problem=PLAIN),
    "PP2": Case(pipeline=2, problem=PLAIN),
    "TP2xPP2+SP, projections apart": Case(**SP, pipeline=2, problem=SPLIT),
    "DP2xTP2, ZeRO 2": Case(zero_stage=2, data=2, tensor=2, problem=PLAIN),
}
WIDE = {
    "DP4": Case(data=4, problem=PLAIN),
    "DP2, offload": Case(data=2, offload=True, problem=PLAIN),
    "TP2, projections apart": Case(tensor=2, problem=SPLIT),
}
ROUNDED = {
    "PP2, bf16": Case(pipeline=2, problem=BF16),
}
WIDE_ROUNDED = {
    "DP2xTP2, bf16": Case(data=2, tensor=2, problem=BF16),
    "DP2, ZeRO 2, bf16": Case(zero_stage=2, data=2, problem=BF16),
}
BROKEN = {"a slice orthogonalised as if whole, TP2": Case(tensor=2, problem=PLAIN, broken="slices of matrices joined")}


@pytest.fixture(scope="module")
def results(request):
    return run_cases(zero_layouts.compare, asked_for(request, CASES | WIDE | ROUNDED | WIDE_ROUNDED | BROKEN))


@pytest.mark.parametrize("name", names(["TP2"], CASES | WIDE))
def test_six_steps_equal_muon_on_whole_matrices(results, name):
    check_task((CASES | WIDE)[name], results[name])
    for result in results[name]:
        assert result["loss"] < 1e-4 and result["norm"] < 1e-3
        assert result["weight"]["error"] < 1e-4, result["weight"]["name"]


@pytest.mark.parametrize("name", names([], ROUNDED | WIDE_ROUNDED))
def test_six_steps_come_near_in_bf16(results, name):
    check_task((ROUNDED | WIDE_ROUNDED)[name], results[name])
    for result in results[name]:
        assert result["first_norm"] < max(1e-2, result["rounding"]) and result["loss"] < 3e-2


@pytest.mark.parametrize("name", BROKEN)
def test_the_comparison_sees_what_is_broken(results, name):
    assert max(result["weight"]["error"] for result in results[name]) > 1e-3


def test_projections_apart_are_matrices_of_their_own(topology, monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.zero.muon.original_muon.ns_compute_dtype", lambda *_: torch.float32)
    stage = tiny.build_stage(topology, dtype=torch.float32)
    from powernap.train.optimizer import build_optimizer

    build_optimizer(stage, SPLIT_MUON)
    for name, parameter in stage.named_parameters():
        if not name.startswith("decoder.") or parameter.ndim != 2:
            continue
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        found = muon.orthogonalised(gradient.clone(), torch.zeros_like(gradient), 0.0, parameter, topology)
        for rows in rows_of(name, len(gradient)):
            torch.testing.assert_close(found[rows], orthogonalise(gradient[rows]), rtol=1e-4, atol=1e-4)
