"""The schedule: Megatron-core's own order, possible, every segment once, and the formulas for bubble and memory."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from powernap.parallel.planning import timeline
from powernap.parallel.planning.timeline import BACKWARD, FORWARD, ScheduleError, Step, schedule, simulate

# (stages, micro-batches, segments): windows slept on N times and one that predicts
GRID = [
    (stages, stages * multiple, windows * passes + 1)
    for stages in range(2, 9)
    for multiple in (1, 2, 3)
    for windows, passes in ((0, 1), (1, 1), (1, 4), (3, 2), (4, 3))
]
# ... and groups that are no multiple of the stages, or do not divide the micro-batches
GROUPS = [
    (stages, micro_batches, 5, group)
    for stages in (2, 3, 4)
    for group in range(stages, 2 * stages + 1)
    for micro_batches in range(group, 3 * stages + 1)
    if micro_batches % group == 0 or micro_batches % group >= stages
]
ALL = [(*case, None) for case in GRID] + GROUPS


def run(stages, micro_batches, chunks, group=None, forward=1.0, backward=3.0):
    order = schedule(stages, micro_batches, chunks, group)
    return simulate(order, [[forward] * chunks] * stages, [[backward] * chunks] * stages)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks", "group"), ALL)
def test_order_is_megatrons(stages, micro_batches, chunks, group):
    order = schedule(stages, micro_batches, chunks, group)
    table = get_schedule_table(micro_batches, chunks, group or stages)
    for stage, steps in enumerate(order):
        pipeline = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        virtual = chunks if chunks > 1 else None  # a single chunk: the plain 1F1B
        communicator = SimpleNamespace(pp_group=pipeline, virtual_pipeline_model_parallel_size=virtual)
        *_, warmup, _ = get_pp_rank_microbatches(micro_batches, chunks, group or stages, p2p_communicator=communicator)
        # their chunks count from 1, those of backward steps are negative
        theirs = convert_schedule_table_to_order(warmup, chunks, table)
        assert [s.chunk + 1 if s.kind == FORWARD else -s.chunk - 1 for s in steps] == theirs
        assert [(s.micro_batch, s.chunk) for s in steps if s.kind == FORWARD] == table


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [*GRID, (1, 1, 5), (1, 3, 4)])
def test_every_segment_once_forward_and_once_backward(stages, micro_batches, chunks):
    everything = sorted(Step(*step) for step in itertools.product("FB", range(micro_batches), range(chunks)))
    for steps in schedule(stages, micro_batches, chunks):
        assert sorted(steps) == everything


@pytest.mark.parametrize(("stages", "micro_batches", "chunks", "group"), ALL)
def test_dependencies_are_kept(stages, micro_batches, chunks, group):
    """Checked from the times alone; `simulate` itself fails on a deadlock."""
    result = run(stages, micro_batches, chunks, group)
    start, end = (
        {(stage, *step): t for stage, steps in enumerate(result.order) for step, t in zip(steps, times[stage])}  # noqa: B905
        for times in (result.starts, result.ends)
    )
    last = stages - 1
    for stage, m, c in itertools.product(range(stages), range(micro_batches), range(chunks)):
        if c > 0:  # fast weights
            assert end[stage, FORWARD, m, c - 1] <= start[stage, FORWARD, m, c]
            assert end[stage, BACKWARD, m, c] <= start[stage, BACKWARD, m, c - 1]
        if stage > 0:  # hidden states
            assert end[stage - 1, FORWARD, m, c] <= start[stage, FORWARD, m, c]
            assert end[stage, BACKWARD, m, c] <= start[stage - 1, BACKWARD, m, c]
        elif c > 0:  # the ring
            assert end[last, FORWARD, m, c - 1] <= start[0, FORWARD, m, c]
            assert end[0, BACKWARD, m, c] <= start[last, BACKWARD, m, c - 1]
        assert end[stage, FORWARD, m, c] <= start[stage, BACKWARD, m, c]
    for starts, ends in zip(result.starts, result.ends, strict=True):  # one thing at a time
        assert all(stop <= begin for stop, begin in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), GRID)
def test_the_last_stage_goes_back_at_once_from_the_last_segment(stages, micro_batches, chunks):
    """Which is why it keeps the head's logits: model/recompute.py."""
    steps = schedule(stages, micro_batches, chunks)[-1]
    for number in range(micro_batches):
        there = steps.index(Step(FORWARD, number, chunks - 1))
        assert steps[there + 1] == Step(BACKWARD, number, chunks - 1)


def count_live(steps: list[Step]) -> int:
    """The most segments a stage holds at once, each from its forward to the end of its backward pass."""
    live = peak = 0
    for step in steps:
        live += 1 if step.kind == FORWARD else -1
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("stages", "micro_batches", "chunks", "group"), ALL)
def test_formulas_are_the_simulation(stages, micro_batches, chunks, group):
    for backward in (1.0, 3.0):
        result = run(stages, micro_batches, chunks, group, backward=backward)
        assert result.bubble == pytest.approx(timeline.bubble(stages, micro_batches, chunks), abs=1e-12)
    for stage, steps in enumerate(result.order):
        assert count_live(steps) == timeline.peak_live(stages, stage, micro_batches, chunks, group)


def test_one_stage_is_the_plain_loop():
    steps = [Step(*step) for step in (("F", 0, 0), ("F", 0, 1), ("B", 0, 1), ("B", 0, 0))]
    assert schedule(1, 1, 2) == [steps]
    assert schedule(1, 2, 2)[0] == steps + [Step(kind, 1, chunk) for kind, _, chunk in steps]
    assert run(1, 2, 5).bubble == 0
    assert count_live(schedule(1, 3, 5)[0]) == timeline.peak_live(1, 0, 3, 5) == 5


def test_a_small_schedule_by_hand():
    """Two stages, two micro-batches, two segments, forward 1 and backward 2."""
    result = run(2, 2, 2, backward=2.0)
    assert ["".join(f"{kind}{m}{c} " for kind, m, c in steps).strip() for steps in result.order] == [
        "F00 F10 F01 F11 B01 B11 B00 B10",
        "F00 F10 F01 B01 F11 B11 B00 B10",
    ]
    assert result.starts == [[0, 1, 2, 3, 6, 9, 11, 13], [1, 2, 3, 4, 6, 7, 9, 11]]
    assert result.total == 15


def test_a_slow_stage_shows():
    """The time of every stage is that of the slowest, and the others wait."""
    chunks, micro_batches = 3, 8
    slow = simulate(
        schedule(2, micro_batches, chunks), [[1.0] * chunks, [2.0] * chunks], [[2.0] * chunks, [4.0] * chunks]
    )
    assert slow.total >= micro_batches * chunks * 6
    assert slow.bubble > 0.25 > run(2, micro_batches, chunks).bubble


@pytest.mark.parametrize(("stages", "micro_batches", "group"), [(4, 2, None), (2, 3, None), (4, 8, 3), (2, 4, 5)])
def test_what_megatron_refuses_is_refused(stages, micro_batches, group):
    with pytest.raises(ScheduleError) as caught:
        schedule(stages, micro_batches, 3, group)
    assert "train.micro_batch_size" in str(caught.value) and "\n" not in str(caught.value)


def test_no_torch():
    code = (
        "import sys; import powernap.model.segments, powernap.parallel.planning.suggest; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
