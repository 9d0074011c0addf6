"""Saved in one layout, loaded in every other: bit for bit the same, and the same losses afterwards."""

from dataclasses import replace

import pytest

import checkpoint_layouts
from checkpoint_layouts import MUON, Loading, Saving
from processes import run_cases
from zero_layouts import Case, Problem

SP = dict(tensor=2, sequence=True)
SAVED = {
    "TP2xPP2": Case(tensor=2, pipeline=2),
    "DP2, ZeRO 1": Case(data=2),
    "DP2, ZeRO 3": Case(level=3, data=2),
    "PP2xDP2": Case(pipeline=2, data=2),
}
LAYOUTS = {
    "one process": Case(),
    **SAVED,
    "DP2, ZeRO 2": Case(level=2, data=2),
    "DP4, ZeRO 1": Case(data=4),
    "DP4, ZeRO 3": Case(level=3, data=4),
    "DP2, offload": Case(data=2, offload=True),
    "TP2+SP": Case(**SP),
    "TP4": Case(tensor=4),
    "PP2": Case(pipeline=2),
    "PP4": Case(pipeline=4),
    "TP2xPP2+SP": Case(**SP, pipeline=2),
    "TP2xDP2, ZeRO 1": Case(tensor=2, data=2),
    "TP2+SPxDP2, ZeRO 2": Case(**SP, level=2, data=2),
    "TP2xDP2, ZeRO 3": Case(level=3, tensor=2, data=2),
}
GRID = [(saved, loaded) for saved in SAVED for loaded in LAYOUTS if saved != loaded]
# Every way of cutting a parameter, into every other.
SHORT = [
    ("TP2xPP2", "one process"),
    ("TP2xPP2", "DP4, ZeRO 3"),
    ("DP2, ZeRO 1", "TP2xPP2+SP"),
    ("DP2, ZeRO 3", "PP2xDP2"),
    ("PP2xDP2", "TP2+SPxDP2, ZeRO 2"),
    ("PP2xDP2", "DP2, offload"),
]
OTHERS = {  # name -> saved, loaded, further fields
    "tied embeddings": (Case(tensor=2, pipeline=2), Case(level=3, data=2), {"tied": True}),
    "Muon, DP2": (Case(data=2), Case(pipeline=2), {"optimizer": MUON}),
}
WIDE_OTHERS = {
    "tied embeddings, apart": (Case(), Case(pipeline=2), {"tied": True}),
    "Muon, one process": (Case(), Case(data=2), {"optimizer": MUON}),
}
BF16 = Problem(precision="bf16")
ROUNDED = {"bf16, ZeRO 3": (Case(tensor=2, problem=BF16), Case(level=3, data=2, problem=BF16), {})}
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
    pairs["broken"] = (SAVED["DP2, ZeRO 1"], LAYOUTS["one process"], {"broken": "moments"})
    return compare(pairs, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("pair", SHORT, ids=" into ".join)
def test_any_layout_goes_on_from_any_other(results, pair):
    check(*results[pair])


@pytest.mark.parametrize("name", OTHERS)
def test_and_so_with(results, name):
    check(*results[name], bound=1e-4 if "Muon" in name else 1e-6)  # Muon orthogonalises in bfloat16


@pytest.mark.parametrize("name", ROUNDED)
def test_and_in_bf16(results, name):
    check(*results[name], bound=2e-2)


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
    check(*wide_results[pair])


@pytest.mark.wide
@pytest.mark.parametrize("name", WIDE_OTHERS | WIDE_ROUNDED)
def test_and_the_others(wide_results, name):
    check(*wide_results[name], bound=2e-2 if "bf16" in name else 1e-4 if "Muon" in name else 1e-6)


def check(unbroken, found, differences, bound=1e-6):
    assert len(differences) > 50 and max(differences.values()) == 0.0
    assert len({result["losses"][0] for result in found}) == 1  # every rank reports the loss of all
    assert found[0]["losses"] == pytest.approx(unbroken, rel=bound)
