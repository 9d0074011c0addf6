"""A step that is not finite on one rank changes nothing on any, in every kind of layout and optimizer, bit for bit.

All cases share one set of processes.
"""

import dataclasses

import pytest

import not_finite
from not_finite import PARAMETER, Case
from processes import run_cases

CASES = {
    "stage 1, one process": Case(),
    "stage 1, DP2": Case(data=2),
    "stage 1, TP2+SP": Case(tensor=2, sequence=True),
    "stage 1, PP2, tied": Case(pipeline=2, tied=True),
    "stage 1, DP2, bf16": Case(data=2, precision="bf16"),
    "stage 1, PP2, bf16": Case(pipeline=2, precision="bf16"),
    "stage 1, DP2, muon": Case(data=2, optimizer="muon"),
    "stage 1, PP2, muon": Case(pipeline=2, optimizer="muon"),
    "stage 1, DP2, bf16, muon": Case(data=2, precision="bf16", optimizer="muon"),
    "stage 2, DP2": Case(level=2, data=2),
    "stage 2, TP2": Case(level=2, tensor=2),
    "stage 2, DP2, bf16": Case(level=2, data=2, precision="bf16"),
    "stage 1, DP2, offload": Case(data=2, offload=True),
    "stage 2, DP2, offload": Case(level=2, data=2, offload=True),
    "stage 3, DP2": Case(level=3, data=2),
    "stage 3, TP2": Case(level=3, tensor=2),
    "stage 3, DP2, bf16": Case(level=3, data=2, precision="bf16"),
    "stage 3, DP2, offload": Case(level=3, data=2, offload=True),
}
CONTROL = {"control": dataclasses.replace(CASES["stage 1, DP2"], control=True)}


@pytest.fixture(scope="module")
def results():
    return run_cases(not_finite.compare, CASES | CONTROL)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_changes_nothing(results, name):
    for rank, result in enumerate(results[name]):
        print(rank, result)
        assert not any(abs(norm) < float("inf") for norm in result["norms"].values())
        assert all(result["unchanged"].values())
        assert result["as_undisturbed"] and result["finite"] and result["states"]


@pytest.mark.parametrize("name", CASES)
def test_the_rank_that_made_it_names_the_parameter(results, name):
    *others, last = (result["named"] for result in results[name])
    assert [found.split(".", 3)[3] for found in last["gradient"]] == [PARAMETER]
    assert not any(found["gradient"] for found in others)
    assert not last["loss"]


def test_without_it_the_loss_alone_would_not_stop_the_step(results):
    assert not any(result["unchanged"]["loss"] for result in results["control"])
