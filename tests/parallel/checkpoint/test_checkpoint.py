"""Saved in one layout, loaded in every other: bit for bit the same, and the same losses afterwards."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.helpers import checkpoint_layouts
from tests.helpers.checkpoint_layouts import MUON, Loading, Saving
from tests.helpers.processes import run_cases
from tests.helpers.tiny import WINDOW
from tests.helpers.zero_layouts import Case, Problem

pytestmark = pytest.mark.faults

SP = dict(tensor=2, sequence=True)
SAVED = {
    "TP2xPP2": Case(tensor=2, pipeline=2),
    "DP2, ZeRO 1": Case(data=2),
    "DP2, ZeRO 3": Case(zero_stage=3, data=2),
    "PP2xDP2": Case(pipeline=2, data=2),
}
# Every legal layout of up to four ranks: micro-batches come in groups of the stages, so three stages do not fit, and four
# tensor ranks do not share the six tokens of a window.
LAYOUTS = {
    f"TP{tensor}{'+SP' * sequence}xPP{pipeline}xDP{data}, ZeRO {zero_stage}": Case(
        zero_stage=zero_stage, tensor=tensor, pipeline=pipeline, data=data, sequence=sequence
    )
    for data, tensor, pipeline, sequence, zero_stage in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4), (False, True), (1, 2, 3)
    )
    if data * tensor * pipeline <= 4
    and (not sequence or (tensor > 1 and WINDOW % tensor == 0))
    and (pipeline == 1 or zero_stage == 1)
} | {"DP2, offload": Case(data=2, offload=True)}
GRID = [(saved, loaded) for saved in SAVED for loaded in LAYOUTS if SAVED[saved] != LAYOUTS[loaded]]
# Every way of cutting a parameter, into every other.
SHORT = [
    ("TP2xPP2", "TP1xPP1xDP4, ZeRO 3"),
    ("DP2, ZeRO 1", "TP2+SPxPP2xDP1, ZeRO 1"),
    ("DP2, ZeRO 3", "TP1xPP2xDP2, ZeRO 1"),
    ("PP2xDP2", "TP2+SPxPP1xDP2, ZeRO 2"),
]
OTHERS = {  # name -> saved, loaded, further fields
    "tied embeddings, vocabulary padded": (
        Case(tensor=2, pipeline=2),
        Case(zero_stage=3, data=2),
        {"tied": True, "vocab_size": 19},
    ),
    "vocabulary padded": (Case(zero_stage=3, data=2), Case(tensor=4), {"vocab_size": 17}),
    "Muon, DP2": (Case(data=2), Case(pipeline=2), {"optimizer": MUON}),
}
WIDE_OTHERS = {
    "tied embeddings, apart": (Case(), Case(pipeline=2), {"tied": True}),
    "Muon, one process": (Case(), Case(data=2), {"optimizer": MUON}),
}
BF16 = Problem(precision="bf16")
ROUNDED = {"bf16, ZeRO 3": (Case(tensor=2, problem=BF16), Case(zero_stage=3, data=2, problem=BF16), {})}
WIDE_ROUNDED = {"bf16": (Case(data=2, problem=BF16), Case(problem=BF16), {})}


def compare(pairs, folder):
    """key -> (saved, loaded, further fields) as key -> (losses of the unbroken run, what the other found, differences)."""
    savings, loadings = {}, {}
    for number, (key, (saved, loaded, fields)) in enumerate(pairs.items()):
        unbroken = Saving(saved, "", **{name: value for name, value in fields.items() if name != "broken"})
        place = str(folder / f"saved-{len(savings)}")
        place = savings.setdefault(repr(unbroken), replace(unbroken, folder=place)).folder
        loadings[key] = Loading(loaded, str(folder / f"loaded-{number}"), saved=place, **fields)
    unbroken = run_cases(checkpoint_layouts.run, {case.folder: case for case in savings.values()})
    found = run_cases(checkpoint_layouts.run, loadings)
    return {
        key: (unbroken[case.saved][0]["losses"], found[key], checkpoint_layouts.differences(case.saved, case.folder))
        for key, case in loadings.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pairs = {pair: (SAVED[pair[0]], LAYOUTS[pair[1]], {}) for pair in SHORT} | OTHERS | ROUNDED
    pairs["broken"] = (SAVED["DP2, ZeRO 1"], Case(), {"broken": "moments"})
    return compare(pairs, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("pair", SHORT, ids=" into ".join)
def test_any_layout_goes_on_from_any_other(results, pair):
    assert_goes_on(*results[pair])


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_other_optimizers_and_tied_weights(results, name):
    assert_goes_on(*results[name], bound=1e-4 if "Muon" in name else 1e-6)  # Muon orthogonalises in bfloat16


@pytest.mark.parametrize("name", ROUNDED)
def test_so_do_master_weights_of_bf16(results, name):
    assert_goes_on(*results[name], bound=2e-2)


def test_the_comparison_sees_moments_that_were_lost(results):
    losses, found, differences = results["broken"]
    assert any(name.startswith("exp_avg") and value > 0 for name, value in differences.items())
    assert max(abs(a / b - 1) for a, b in zip(found[0]["losses"], losses, strict=True)) > 1e-5


@pytest.fixture(scope="module")
def wide_results(tmp_path_factory):
    pairs = {pair: (SAVED[pair[0]], LAYOUTS[pair[1]], {}) for pair in GRID} | WIDE_OTHERS | WIDE_ROUNDED
    return compare(pairs, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.wide
@pytest.mark.parametrize("pair", GRID, ids=" into ".join)
def test_the_whole_grid(wide_results, pair):
    assert_goes_on(*wide_results[pair])


@pytest.mark.wide
@pytest.mark.parametrize("name", WIDE_OTHERS | WIDE_ROUNDED)
def test_so_does_everything_else(wide_results, name):
    assert_goes_on(*wide_results[name], bound=2e-2 if "bf16" in name else 1e-4 if "Muon" in name else 1e-6)


def assert_goes_on(unbroken, found, differences, bound=1e-6):
    assert len(differences) > 50 and max(differences.values()) == 0.0
    assert len({result["losses"][0] for result in found}) == 1  # every rank reports the loss of all
    for rank in found:  # a stage may have no block with fast weights
        assert all(torch.equal(a, b) for a, b in zip(rank["memory"], rank["expected"], strict=True))
    assert sum(state.abs().sum() for rank in found for state in rank["memory"]) > 0
    assert found[0]["losses"] == pytest.approx(unbroken, rel=bound)
