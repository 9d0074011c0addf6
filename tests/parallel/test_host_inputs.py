"""Inputs in host memory: when they are copied back, how long they live. Gradients: test_layouts.py; bytes:
test_plan_measured.py."""

import gc
import weakref

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.parallel import host_inputs, schedule
from powernap.parallel.host_inputs import HostInputs, release
from powernap.parallel.schedule import MicroBatch
from tests.helpers import tiny

CPU = torch.device("cpu")


def test_the_next_backward_pass_finds_its_inputs_copied_back(topology, monkeypatch):
    """All but the first one of each micro-batch, while the one before runs, and no others."""
    log = []
    begin, fetch, load = HostInputs.begin_backward, host_inputs._Saved.fetch, host_inputs._Saved.load

    def begin_and_note(inputs, place):
        log.append(("begin", place[1]))
        begin(inputs, place)

    monkeypatch.setattr(HostInputs, "begin_backward", begin_and_note)
    monkeypatch.setattr(host_inputs._Saved, "fetch", lambda saved: (log.append(("fetch", id(saved))), fetch(saved)))
    monkeypatch.setattr(host_inputs._Saved, "load", lambda saved: (log.append(("load", id(saved))), load(saved))[1])
    one_step(topology, "segment", True, [])
    begins = [index for index, (what, _) in enumerate(log) if what == "begin"]
    assert [index for what, index in log if what == "begin"] == [4, 3, 2, 1, 0] * 2
    ahead: list[int] = []
    for number, (start, stop) in enumerate(zip(begins, [*begins[1:], len(log)], strict=True)):
        first = log[start + 1 : stop].index(next(entry for entry in log[start + 1 : stop] if entry[0] == "load"))
        before = [saved for what, saved in log[start + 1 : start + 1 + first] if what == "fetch"]
        loaded = [saved for what, saved in log[start + 1 : stop] if what == "load"]
        late = [saved for what, saved in log[start + 1 + first : stop] if what == "fetch"]
        assert len(loaded) == (
            3 if log[start][1] in (1, 3) else 2
        )  # fast weights, and from the second pass on hidden states
        assert (loaded == ahead and not late) if number % 5 else (late == loaded and not ahead)
        assert bool(before) == (log[start][1] > 0)
        ahead = before


def test_gradients_with_and_without(topology):
    kept, offloaded = (one_step(topology, "blocks", offload, []) for offload in (False, True))
    assert tiny.largest_difference(kept, offloaded) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own need a CUDA device")
@pytest.mark.parametrize("recompute", ["segment", "blocks", "nested"])
def test_gradients_with_and_without_on_cuda(topology, recompute):
    assert topology.device.type == "cuda"
    kept, offloaded = (one_step(topology, recompute, offload, []) for offload in (False, True))
    assert tiny.largest_difference(kept, offloaded) < 1e-12


def test_a_state_that_stays_is_copied_once(topology):
    """sleep.write=last: the passes over a window start from the same fast weights."""
    copies: list[torch.Tensor] = []
    one_step(topology, "segment", True, copies, SleepConfig(write="last"))
    states = [copy for copy in copies if copy.ndim == 4]
    assert len(states) == 2 * 2 * 3  # micro-batches, blocks; zeros, after the first and the second window


def test_a_copy_lives_as_long_as_what_needs_it():
    inputs = HostInputs(CPU, [(0, 1), (0, 0)])
    x, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    outputs = []
    for place in [(0, 0), (0, 1)]:
        with inputs.keeping(place):
            outputs.append((weight * x).sum())
    copy = next(copy for copies in inputs._copies.values() for copy in copies.values())
    watched = weakref.ref(copy.untyped_storage())
    del copy, x
    inputs.begin_backward((0, 1))
    outputs.pop().backward()
    assert watched() is not None
    inputs.begin_backward((0, 0))
    outputs.pop().backward()
    gc.collect()
    assert watched() is None and torch.equal(weight.grad, torch.full((3,), 2.0))


def test_a_released_leaf_still_gets_its_gradient():
    leaf = torch.ones(4, 5, requires_grad=True)
    output = (leaf[:2] * torch.arange(5.0)).sum() + 0 * leaf.detach().sum()
    storage = weakref.ref(leaf.untyped_storage())
    release(leaf, None)
    assert storage() is None and leaf.shape == (4, 5) and leaf.untyped_storage().nbytes() == 4
    output.backward()
    assert torch.equal(leaf.grad, torch.arange(5.0).expand(4, 5) * (torch.arange(4) < 2)[:, None])


def one_step(topology, recompute, offload_inputs, copies, sleep=None) -> dict[str, torch.Tensor]:
    """Gradients of two micro-batches of five segments; appends the copies to `copies`."""
    sleep = sleep or SleepConfig()
    stage = tiny.build_stage(topology, sleep=sleep)
    batches = []
    for seed in range(2):
        tokens, loss_mask = tiny.batch(seed=seed)
        segments = plan_segments(tokens, loss_mask, stage.model, sleep, 2)
        batches.append(MicroBatch.on(topology.device, segments, tokens, loss_mask, None))
    copied = HostInputs._copied

    def copied_and_noted(inputs, tensor):
        copies.append(copied(inputs, tensor))
        return copies[-1]

    HostInputs._copied = copied_and_noted
    try:
        schedule.forward_backward(stage, batches, 1.0, topology, recompute=recompute, offload_inputs=offload_inputs)
    finally:
        HostInputs._copied = copied
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.named_parameters()}
