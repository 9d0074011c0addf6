"""A step that is not finite on one rank changes nothing on any, in every kind of layout and optimizer, bit for bit.

All cases share one set of processes.
"""

from math import isfinite

import pytest

from tests.helpers import not_finite
from tests.helpers.cases import asked_for, names
from tests.helpers.not_finite import PARAMETER, Case
from tests.helpers.processes import run_cases

pytestmark = pytest.mark.faults

CASES = {
    "stage 1, TP2+SP": Case(tensor=2, sequence=True),
    "stage 1, PP2, tied": Case(pipeline=2, tied=True),
    "stage 1, DP2, bf16": Case(data=2, precision="bf16"),
    "stage 1, PP2, muon, finite but too large": Case(pipeline=2, optimizer="muon", large=True),
    "stage 2, DP2, bf16": Case(zero_stage=2, data=2, precision="bf16"),
    "stage 3, DP2": Case(zero_stage=3, data=2),
    "stage 3, DP2, bf16, offload": Case(zero_stage=3, data=2, precision="bf16", offload=True),
}
WIDE = {
    "stage 1, DP2, bf16, muon": Case(data=2, precision="bf16", optimizer="muon"),
    "stage 1, DP2": Case(data=2),
    "stage 1, one process": Case(),
    "stage 1, DP2, offload": Case(data=2, offload=True),
    "stage 1, PP2, bf16": Case(pipeline=2, precision="bf16"),
    "stage 1, DP2, muon": Case(data=2, optimizer="muon"),
    "stage 2, DP2": Case(zero_stage=2, data=2),
    "stage 2, TP2": Case(zero_stage=2, tensor=2),
    "stage 2, DP2, offload": Case(zero_stage=2, data=2, offload=True),
    "stage 3, TP2": Case(zero_stage=3, tensor=2),
    "stage 3, DP2, offload": Case(zero_stage=3, data=2, offload=True),
    "stage 3, DP2, bf16": Case(zero_stage=3, data=2, precision="bf16"),
}
CONTROL = {"control": Case(data=2, control=True)}  # alone, the look is ours


@pytest.fixture(scope="module")
def results(request):
    return run_cases(not_finite.compare, asked_for(request, CASES | WIDE | CONTROL, *CONTROL))


@pytest.mark.parametrize("name", names(CASES, WIDE))
def test_a_bad_step_changes_nothing(results, name):
    assert_nothing_changed((CASES | WIDE)[name], results[name])


def test_without_the_look_at_the_norm_the_weights_are_lost(results):
    for result in results["control"]:
        assert not any(result["unchanged"].values()) and not result["finite"] and not result["as_undisturbed"]


def assert_nothing_changed(case: Case, results: list[dict]) -> None:
    for result in results:
        assert not any(isfinite(norm) for norm in result["norms"].values())
        assert all(result["unchanged"].values()) and result["states"] >= 2
        assert result["as_undisturbed"] and result["finite"]
    # The rank that made it, and no other, names the parameter; after a bad loss all gradients are finite.
    *others, last = (result["named"] for result in results)
    assert [name.split(".", 3)[3] for name in last["gradient"]] == [PARAMETER]
    assert not any(found["gradient"] for found in others)
    assert not last["loss"]
