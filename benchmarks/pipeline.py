"""What the parallel layouts cost in time: the pipeline's bubble, and two processes against one.

Bubble. The fraction of a step that P stages wait, if every segment takes the same time on all of them. Sleep in one
circular pipeline, where pass n+1 follows pass n without a flush, waits (P-1) / (M C + P-1) with C segments and M
micro-batches. A pipeline that is flushed after each segment waits (P-1) / (M + P-1), however many there are. Both by
formula, by parallel/planning/timeline.py `simulate`, and on the clock with stages that only wait
(tests/helpers/fixed_cost.py). A flush here runs its micro-batches forward and backward; running all segments forward first
and then all backward takes as long.

Two processes. Forward and backward pass of a step of a real hybrid in a layout of two one-threaded processes, against
the same global batch and micro-batches in one process with one thread and with two, on as many cores. Data parallelism
includes the all-reduce of the gradients, in one message.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks import sleep
from benchmarks.common import Times, milliseconds, paired_ratio, table, verdicts, write
from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.stage import HybridStage
from powernap.parallel.planning import timeline
from powernap.parallel.planning.layout import split_layers
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology, init_distributed, shutdown_distributed
from tests.helpers import fixed_cost
from tests.helpers.processes import in_processes, single_rank_groups

STAGES, MICRO_BATCHES = 4, 8  # of the bubble
FORWARD_SECONDS = 0.03  # of a segment; recomputation and backward take three times as long
SLEEPS = {  # name: N of each window
    "1 window, N=1": (1,),
    "1 window, N=2": (2,),
    "1 window, N=4": (4,),
    "1 window, N=8": (8,),
    "4 windows, N=4, answer": (4, 4, 4, 4, 1),
}
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}  # name: tensor, pipeline
PASSES = 2  # of the layouts
GLOBAL_BATCH, MICRO_BATCH_SIZE = 8, 2  # of layouts, and of stage_memory.py


def main(options: argparse.Namespace, command: str) -> None:
    bubble_numbers, bubble_report, bubble_targets = bubbles(options.quick)
    layout_numbers, layout_report = layouts(rounds=2 if options.quick else 9)
    judged, verdict = verdicts(bubble_targets)
    numbers = {"bubble": bubble_numbers, "layouts": layout_numbers, "targets": judged}
    write("pipeline", command, numbers, [*bubble_report, *layout_report, *verdict], clock="wall time")


def bubbles(quick: bool):
    print("pipeline: bubble", flush=True)
    sleeps = {name: SLEEPS[name] for name in ("1 window, N=1", "1 window, N=4")} if quick else SLEEPS
    cases = {}
    for name, passes in sleeps.items():
        even = dict(micro_batches=MICRO_BATCHES, stages=STAGES, forward=FORWARD_SECONDS)
        cases[name, "circular"] = fixed_cost.even(passes, **even)
        cases[name, "flushes"] = fixed_cost.even((1,), **even, flushes=sum(passes))
    by_rank = in_processes(fixed_cost.time_steps, STAGES, list(cases.values()), 2 if quick else 3)
    slowest = [[max(step) for step in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]
    seconds = {key: statistics.median(steps) for key, steps in zip(cases, slowest, strict=True)}

    rows, numbers = [], {}
    for name, passes in sleeps.items():
        numbers[name] = {}
        for form in ("circular", "flushes"):
            case, measured = cases[name, form], seconds[name, form]
            planned, segments = case.flushes * case.plan().total, sum(case.passes)
            busy = (1 - case.plan().bubble) * planned
            numbers[name][form] = {
                "bubble_formula": timeline.bubble(STAGES, MICRO_BATCHES, segments),
                "bubble_simulated": case.plan().bubble,
                "bubble_measured": 1 - busy / measured,
                "step_ms": 1e3 * measured,
                "step_over_plan": measured / planned,
                "overhead_ms_per_segment": 1e3 * (measured - planned) / (case.flushes * MICRO_BATCHES * segments),
            }
            rows.append([name, form, sum(passes), *numbers[name][form].values()])
        numbers[name]["circular_over_flushes"] = seconds[name, "circular"] / seconds[name, "flushes"]
    columns = [
        "sleep",
        "pipeline",
        "segments",
        "formula",
        "simulated",
        "measured",
        "step ms",
        "step/plan",
        "ms/segment",
    ]
    ratios = [[name, numbers[name]["circular_over_flushes"], planned_ratio(sum(sleeps[name]))] for name in sleeps]
    report = [
        "## Bubble",
        "",
        f"{STAGES} stages, {MICRO_BATCHES} micro-batches, every segment {1e3 * FORWARD_SECONDS:g} ms forward and "
        f"{3e3 * FORWARD_SECONDS:g} ms recomputed and backward.",
        "ms/segment: what a forward and a backward pass take over the plan.",
        "",
        *table(columns, rows),
        "",
        "Step time in one circular pipeline over that with a flush for each segment:",
        "",
        *table(["sleep", "measured", "formula"], ratios),
        "",
    ]
    forms = [numbers[name][form] for name in sleeps for form in ("circular", "flushes")]
    targets = [
        ("step over plan, worst", max(form["step_over_plan"] for form in forms), "<=", 1.05),
        ("circular over flushes, N=4", numbers["1 window, N=4"]["circular_over_flushes"], "<=", 0.85),
    ]
    return numbers, report, targets


def planned_ratio(segments: int) -> float:
    return (MICRO_BATCHES * segments + STAGES - 1) / (segments * (MICRO_BATCHES + STAGES - 1))


def layouts(rounds: int):
    rows, numbers = [], {}
    for name, (tensor, pipeline) in LAYOUTS.items():
        print(f"pipeline: {name}", flush=True)
        times = in_processes(time_layout, 2, tensor, pipeline, rounds)[0]
        numbers[name] = {
            "ms": {form: milliseconds(times[form]) for form in times},
            "over_one_thread": paired_ratio(times["layout"], times["1 thread"]),
            "over_two_threads": paired_ratio(times["layout"], times["2 threads"]),
        }
        n = numbers[name]
        rows.append([name, *n["ms"].values(), n["over_one_thread"], n["over_two_threads"]])
    model = sleep.MODEL
    report = [
        "## Two processes against one",
        "",
        f"Hybrid {model.pattern}, d={model.hidden_size}, float32, {GLOBAL_BATCH} sequences in micro-batches of "
        f"{MICRO_BATCH_SIZE}, {sleep.CONSOLIDATION_WINDOWS} windows of {model.window} tokens",
        f"slept on with N={PASSES}, one answered. Milliseconds a step, ratios of paired rounds; 0.5 of one thread is ideal.",
        "",
        *table(["layout", "ms", "1 process", "its 2 threads", "over 1 thread", "over 2 threads"], rows),
        "",
    ]
    return numbers, report


def time_layout(rank: int, store: dist.Store, tensor: int, pipeline: int, rounds: int) -> Times:
    """Seconds of a step in the layout and, while the other rank waits, in this process alone; in turns."""
    topology = init_distributed(tensor, pipeline, store=store, rank=rank, world_size=2)
    groups = single_rank_groups()
    alone = dataclasses.replace(
        topology, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1, groups=groups
    )
    own_step, step_alone = (layout_step(where, PASSES) for where in (topology, alone))

    def by_first(threads: int):
        torch.set_num_threads(threads)
        if rank == 0:
            step_alone()
        torch.set_num_threads(1)

    forms = {"layout": own_step, "1 thread": lambda: by_first(1), "2 threads": lambda: by_first(2)}
    times: Times = {name: [] for name in forms}
    for number in range(1 + rounds):
        for name in reversed(forms) if number % 2 else forms:
            topology.barrier()
            start = time.perf_counter()
            forms[name]()
            topology.barrier()
            if number > 0:
                times[name].append(time.perf_counter() - start)
    shutdown_distributed()
    return times


def layout_step(topology: Topology, passes: int) -> Callable[[], None]:
    """The forward and backward part of a training step on this rank, gradients summed over data parallelism."""
    stage, batches = build(topology, passes)

    def run():
        stage.zero_grad(set_to_none=True)
        forward_backward(stage, batches, 1e-3, topology, recompute="segment")
        if topology.dp_size > 1:
            topology.all_reduce_over_data(torch.cat([parameter.grad.flatten() for parameter in stage.parameters()]))

    return run


def build(topology: Topology, passes: int) -> tuple[HybridStage, list[MicroBatch]]:
    torch.manual_seed(0)
    model = sleep.MODEL
    stage = HybridStage(
        model, SleepConfig(), topology.groups, blocks=split_layers(model.pattern, topology.pp_size)[topology.pp_rank]
    )
    tokens, loss_mask = (
        part.split(MICRO_BATCH_SIZE)[topology.dp_rank :: topology.dp_size] for part in sleep.batch(GLOBAL_BATCH)
    )
    return stage, [
        MicroBatch(plan_segments(*pair, model, SleepConfig(), passes), *pair)
        for pair in zip(tokens, loss_mask, strict=True)
    ]
