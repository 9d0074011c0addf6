"""Spikes: what is one, and what is said about it."""

import torch

from powernap.train.numerics.spikes import LEAST, WINDOW, History, Spikes
from tests.helpers import tiny


def test_a_spike_is_judged_by_the_median_of_the_last_values():
    history = History()
    for value in [1.0] * (LEAST - 1) + [1000.0]:  # too early to say, and it does not move the median
        assert history.median_if_spike("a", value, 10.0) is None
    assert history.median_if_spike("a", 9.9, 10.0) is None
    assert history.median_if_spike("a", 10.1, 10.0) == 1.0
    assert history.median_if_spike("b", 1e9, 10.0) is None  # each name has a past of its own


def test_what_lasts_is_no_spike_any_more():
    history = History()
    for _ in range(WINDOW):
        history.median_if_spike("a", 1.0, 10.0)
    found = [history.median_if_spike("a", 100.0, 10.0) for _ in range(WINDOW)]
    assert found[0] == 1.0 and found[-1] is None


def test_a_norm_of_zero_is_no_trouble():
    history = History()
    assert [history.median_if_spike("a", 0.0, 10.0) for _ in range(20)] == [None] * 20
    assert history.median_if_spike("a", 1.0, 10.0) == 0.0


def spikes(topology, factor=10.0):
    stage = tiny.build_stage(topology)
    names = [name for name, _ in stage.named_parameters()]
    return Spikes(factor, stage, topology), names


def test_the_parameters_that_grew_most_are_named_and_not_the_largest(topology):
    watch, names = spikes(topology)
    usual = torch.rand(len(names)) + 1.0
    usual[0] = 1e6
    for step in range(1, 21):
        metrics = {"grad_norm": 1.0}
        assert watch.check(step, metrics, usual) == [] and "gradient_spike" not in metrics
    spiking = usual.clone()
    spiking[5], spiking[7] = 40 * usual[5], 30 * usual[7]
    metrics = {"grad_norm": 35.0}
    (line,) = watch.check(21, metrics, spiking)
    assert metrics["gradient_spike"]
    assert line.startswith("step 21: gradient norm 35, 35.0 times the median of the last 20 steps (1); grown most: ")
    grown = line.split("grown most: ")[1].split(", ")
    assert grown[0] == f"{names[5]} 40.0 times" and grown[1] == f"{names[7]} 30.0 times"


def test_a_median_of_zero_does_not_divide(topology):
    watch, names = spikes(topology)
    for step in range(1, 21):
        watch.check(step, {"grad_norm": 0.0}, torch.zeros(len(names)))
    (line,) = watch.check(21, {"grad_norm": 1.0}, torch.ones(len(names)))
    assert "gradient norm 1" in line


def test_fast_weights_are_named_by_block_and_pass(topology):
    watch, names = spikes(topology)
    name, other = "fast_weights/block_3/pass_2/norm", "fast_weights/block_1/pass_2/norm"
    for step in range(1, 21):
        watch.check(step, {"grad_norm": 1.0, name: 2.0, other: 2.0}, torch.ones(len(names)))
    metrics = {"grad_norm": 1.0, name: 8.0, other: 3.0, "fast_weights/block_3/pass_2/alpha": 1e9}
    assert watch.check(21, metrics, torch.ones(len(names))) == [
        "step 21: fast weights of block 3 after pass 2 have norm 8, 4.0 times their recent median (2)"
    ]


def test_null_switches_it_off(topology):
    watch, names = spikes(topology, None)
    for step in range(1, 31):
        assert watch.check(step, {"grad_norm": 10.0**step}, torch.ones(len(names))) == []
