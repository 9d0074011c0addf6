"""When each pipeline stage runs which segment: Megatron-core's interleaved 1F1B, computed without any process.

Every segment (window, pass) is one virtual pipeline chunk, and all chunks of a stage share the stage's weights. Nothing
here imports torch or Megatron; the tests compare the order with Megatron-core 0.16.1's own functions.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from powernap.model.errors import PowernapError

FORWARD: Final = "F"
BACKWARD: Final = "B"


class ScheduleError(PowernapError):
    """A number of micro-batches the schedule cannot run: one line that says what to write instead."""


class Step(NamedTuple):
    """One stage's forward or backward pass of one segment of one micro-batch."""

    kind: Literal["F", "B"]
    micro_batch: int
    chunk: int  # index of the segment in its sequence


@dataclass(frozen=True)
class Timeline:
    """A schedule with times: step i of a stage runs from starts[stage][i] to ends[stage][i]."""

    order: list[list[Step]]
    starts: list[list[float]]
    ends: list[list[float]]

    @property
    def total(self) -> float:
        """When the last stage is done."""
        return max(ends[-1] for ends in self.ends)

    @property
    def bubble(self) -> float:
        """The fraction of the stages' time that they wait."""
        busy = sum(
            end - start
            for starts, ends in zip(self.starts, self.ends, strict=True)
            for start, end in zip(starts, ends, strict=True)
        )
        return 1 - busy / (len(self.order) * self.total)


def schedule(stages: int, micro_batches: int, chunks: int, group: int | None = None) -> list[list[Step]]:
    """Every stage's steps in execution order.

    As forward_backward_pipelining_with_interleaving of megatron/core/pipeline_parallel/schedules.py with get_schedule_table
    and get_pp_rank_microbatches: groups of micro-batches, in each all chunks; forward steps of `warmup`, then one forward
    and one backward in turn, then the remaining backward steps. A single stage runs the plain loop: all segments of a
    micro-batch forward, then backward.

    Args:
        group: micro-batches that run a chunk before the next chunk's turn, Megatron's
            microbatch_group_size_per_vp_stage; None: as many as stages.

    Raises:
        ScheduleError: if Megatron-core would refuse.
    """
    if stages == 1:
        return [[step for micro_batch in range(micro_batches) for step in _loop(micro_batch, chunks)]]
    group = stages if group is None else group
    check_micro_batches(stages, micro_batches, group)
    forward = [
        Step(FORWARD, micro_batch, chunk)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]
    backward = [Step(BACKWARD, step.micro_batch, chunks - 1 - step.chunk) for step in forward]
    return [
        _one_forward_one_backward(forward, backward, warmup(stages, stage, chunks, group)) for stage in range(stages)
    ]


def check_micro_batches(stages: int, micro_batches: int, group: int | None = None) -> None:
    """Raise ScheduleError unless the interleaved schedule can run this many micro-batches."""
    group = stages if group is None else group
    if stages == 1:
        return
    if not stages <= group <= micro_batches:
        raise ScheduleError(
            f"{micro_batches} micro-batches in groups of {group} on {stages} pipeline stages: there must be at least as "
            f"many as stages: write a smaller train.micro_batch_size, a larger train.global_batch_size or fewer stages"
        )
    if 0 < micro_batches % group < stages:
        raise ScheduleError(
            f"{micro_batches} micro-batches in groups of {group} leave {micro_batches % group} over, fewer than the "
            f"{stages} pipeline stages: make train.global_batch_size / parallel.data / train.micro_batch_size a multiple "
            f"of {group}"
        )


def warmup(stages: int, stage: int, chunks: int, group: int) -> int:
    """Forward steps of a stage before forward and backward alternate, if it has that many.

    A single chunk runs in Megatron-core's plain 1F1B.
    """
    if chunks == 1:
        return stages - 1 - stage
    return (chunks - 1) * group + 2 * (stages - 1 - stage)


def simulate(
    order: list[list[Step]], forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]]
) -> Timeline:
    """Start every step as soon as its stage is free and its inputs are there; sending takes no time.

    Args:
        order: from `schedule`.
        forward, backward: time of a step, [stages][chunks].
    """
    stages, chunks = len(order), 1 + max(step.chunk for step in order[0])
    done: dict[tuple[int, Step], float] = {}  # ends by (stage, step)
    starts: list[list[float]] = [[] for _ in order]
    ends: list[list[float]] = [[] for _ in order]
    total = sum(map(len, order))
    while len(done) < total:
        before = len(done)
        for stage, steps in enumerate(order):
            while len(ends[stage]) < len(steps):
                step = steps[len(ends[stage])]
                needed = list(needs(stage, step, stages, chunks))
                if any(need not in done for need in needed):
                    break
                start = max([*(done[need] for need in needed), ends[stage][-1] if ends[stage] else 0.0])
                times = forward if step.kind == FORWARD else backward
                starts[stage].append(start)
                ends[stage].append(start + times[stage][step.chunk])
                done[stage, step] = ends[stage][-1]
        assert len(done) > before, "deadlock: every stage waits for another"
    return Timeline(order, starts, ends)


def needs(stage: int, step: Step, stages: int, chunks: int) -> Iterator[tuple[int, Step]]:
    """The (stage, step) pairs that must be done before: hidden states along the ring, fast weights on the same stage.

    The ring also leads from one window to the next: Megatron's first stage waits for the last one's tensor even if it
    ignores it.
    """
    kind, micro_batch, chunk = step
    if kind == FORWARD:
        if chunk > 0:
            yield stage, Step(FORWARD, micro_batch, chunk - 1)
        if stage > 0:
            yield stage - 1, step
        elif chunk > 0:
            yield stages - 1, Step(FORWARD, micro_batch, chunk - 1)
        return
    yield stage, Step(FORWARD, micro_batch, chunk)
    if chunk < chunks - 1:
        yield stage, Step(BACKWARD, micro_batch, chunk + 1)
    if stage < stages - 1:
        yield stage + 1, step
    elif chunk < chunks - 1:
        yield 0, Step(BACKWARD, micro_batch, chunk + 1)


def bubble(stages: int, micro_batches: int, chunks: int) -> float:
    """The bubble if all stages and segments take the same time: (P - 1) / (M C + P - 1), whatever the groups."""
    return (stages - 1) / (micro_batches * chunks + stages - 1)


def peak_live(stages: int, stage: int, micro_batches: int, chunks: int, group: int | None = None) -> int:
    """The most segments `stage` holds at once, by formula: min(M C, (C - 1) G + 2 (P - 1 - stage) + 1).

    With one segment a sequence, in the plain 1F1B: min(M, P - stage).
    """
    if stages == 1:
        return chunks
    group = stages if group is None else group
    return min(micro_batches * chunks, warmup(stages, stage, chunks, group) + 1)


def draw(timeline: Timeline, labels: Sequence[str], width: int = 80, colours: Sequence[str] | None = None) -> list[str]:
    """The schedule as text: stages down, time across, in cells of two characters, each an average forward step long.

    A step shows its label (capitals: backward), then dashes for as long as it lasts; dots are waiting. A schedule too
    long for the width shows its beginning and its end.

    Args:
        labels: two characters for each chunk, such as "a1".
        colours: for each chunk, the escape sequence to write before it; None: no colour.
    """
    forward = [
        end - start
        for steps, starts, ends in zip(timeline.order, timeline.starts, timeline.ends, strict=True)
        for step, start, end in zip(steps, starts, ends, strict=True)
        if step.kind == FORWARD
    ]
    cell = sum(forward) / len(forward)
    cells = round(timeline.total / cell)
    room = (width - len("stage 00 ")) // 2
    shown: list[int | None] = list(range(cells))
    if cells > room:
        half = (room - 2) // 2
        shown = [*range(half), None, *range(cells - half, cells)]
    return [
        f"stage {stage:<3}" + "".join(_cells(timeline, stage, cell, shown, labels, colours))
        for stage in range(len(timeline.order))
    ]


def _cells(timeline, stage, cell, shown, labels, colours) -> Iterator[str]:
    """The text of each cell of a stage's row: the step that runs at its middle."""
    steps, starts, ends = timeline.order[stage], timeline.starts[stage], timeline.ends[stage]
    before = None
    for number in shown:
        if number is None:
            before = None
            yield " .. "
            continue
        middle = (number + 0.5) * cell
        index = bisect_right(starts, middle) - 1
        if index < 0 or middle >= ends[index]:
            yield " ."
            continue
        label = labels[steps[index].chunk] if steps[index].kind == FORWARD else labels[steps[index].chunk].upper()
        text = "--" if index == before else label
        before = index
        yield text if colours is None else f"{colours[steps[index].chunk]}{text}\033[0m"


def _loop(micro_batch: int, chunks: int) -> Iterator[Step]:
    yield from (Step(FORWARD, micro_batch, chunk) for chunk in range(chunks))
    yield from (Step(BACKWARD, micro_batch, chunk) for chunk in reversed(range(chunks)))


def _one_forward_one_backward(forward: list[Step], backward: list[Step], warmup: int) -> list[Step]:
    """`warmup` forward steps, then forward and backward in turn, then the remaining backward steps."""
    warmup = min(warmup, len(forward))
    pairs = zip(forward[warmup:], backward, strict=False)  # backward is longer: its end follows
    return [*forward[:warmup], *(step for pair in pairs for step in pair), *backward[len(forward) - warmup :]]
