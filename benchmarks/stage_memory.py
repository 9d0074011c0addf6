"""Memory of a pipeline's stages over N.

Peak live tensor bytes on each of two stages, without parameters. By parallel/planning/timeline.py a stage holds
peak_live segments at once, each with its inputs, hidden states and fast weights; nothing else should grow with N.
"""

import argparse

import torch.distributed as dist

from benchmarks import sleep
from benchmarks.common import table, verdicts, write
from benchmarks.pipeline import GLOBAL_BATCH, MICRO_BATCH_SIZE, build
from powernap.model.stage import HybridStage
from powernap.parallel.planning import timeline
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology, init_distributed, shutdown_distributed
from tests.helpers.processes import in_processes
from tests.helpers.training_step import peak_bytes


def main(options: argparse.Namespace, command: str) -> None:
    passes = (1, 2) if options.quick else sleep.PASSES
    stages = in_processes(stage_memory, 2, passes)
    mib = 2**20
    numbers, rows, ratios = {}, [], []
    for number, stage in enumerate(stages):
        before = None
        for n in passes:
            live = timeline.peak_live(2, number, GLOBAL_BATCH // MICRO_BATCH_SIZE, sleep.CONSOLIDATION_WINDOWS * n + 1)
            inputs = live * (stage["hidden_bytes"] + stage["fast_weight_bytes"])
            now = {"inputs": inputs, "peak": stage["peak_bytes"][n]}
            row = [number, n, live, inputs / mib, now["peak"] / mib, None, None]
            if before:
                grown = {key: now[key] - before[key] for key in now}
                ratios.append(grown["peak"] / grown["inputs"])
                row[5:] = grown["peak"] / mib, ratios[-1]
            rows.append(row)
            stage[n] = {"live_segments": live, **now}
            before = now
        numbers[number] = stage
    model = sleep.MODEL
    report = [
        f"Hybrid {model.pattern}, d={model.hidden_size}, float32, {GLOBAL_BATCH} sequences in micro-batches of "
        f"{MICRO_BATCH_SIZE}, {sleep.CONSOLIDATION_WINDOWS} windows of {model.window} tokens",
        "slept on, one answered. In two stages; peak of live tensors in MiB, its growth from the row above, and that over",
        "the growth of the saved inputs.",
        "",
        *table(["stage", "N", "live segments", "saved inputs", "peak", "growth", "over inputs"], rows),
        "",
    ]
    last = max(ratios[len(passes) - 2 :: len(passes) - 1])
    judged, verdict = verdicts([(f"memory growth N={passes[-2]} to {passes[-1]} over inputs", last, "<=", 1.001)])
    write("stage_memory", command, {"stages": numbers, "targets": judged}, [*report, *verdict])


def stage_memory(rank: int, store: dist.Store, passes: tuple[int, ...]) -> dict:
    topology = init_distributed(pipeline=2, store=store, rank=rank, world_size=2)
    peaks = {}
    for n in passes:
        stage, batches = build(topology, n)
        peaks[n] = peak_bytes(lambda: step(stage, batches, topology), lambda: stage.parameters())  # noqa: B023
    states = sum(state.nbytes for state in stage.empty_layer_states(MICRO_BATCH_SIZE))
    hidden = sleep.MODEL.window * MICRO_BATCH_SIZE * sleep.MODEL.hidden_size * stage.dtype.itemsize
    shutdown_distributed()
    return {"hidden_bytes": hidden, "fast_weight_bytes": states, "peak_bytes": peaks}


def step(stage: HybridStage, batches: list[MicroBatch], topology: Topology) -> None:
    stage.zero_grad(set_to_none=False)  # gradients stay in their buffers, as in parallel/zero/gradients.py
    forward_backward(stage, batches, 1e-3, topology, recompute="segment")
