"""What a checkpoint costs: how long training waits for one, and a resumed run for its state.

Two data-parallel ranks with ZeRO 1 write the state of the same model (master weights and both moments) in turn, in wall
time: Powernap's writer in the background and in line, and torch.distributed.checkpoint (DCP) alone, in the background
and in line, with the same fragments. Powernap's files have SHA-256, are flushed to the disk and are renamed when
complete; DCP's are flushed and have no checksum, so its reading checks nothing.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.common import table, verdicts, write
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import Writer
from powernap.parallel.topology import Topology, init_distributed
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from tests.helpers.processes import in_processes

RANKS = 2


def main(options: argparse.Namespace, command: str) -> None:
    width, rounds = (64, 2) if options.quick else (512, 7)
    with tempfile.TemporaryDirectory() as folder:
        per_rank = in_processes(measure, RANKS, Path(folder), width, rounds)
    nbytes, parameters = per_rank[0]["nbytes"], per_rank[0]["parameters"]
    # A round is over when the slowest rank is.
    seconds = {
        name: [max(times) for times in zip(*(rank["seconds"][name] for rank in per_rank), strict=True)]
        for name in per_rank[0]["seconds"]
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    judged, verdict = verdicts(
        [
            ("stall in the background / in line", ratio("stall, background", "stall, in line"), "<=", 0.25),
            (
                "stall in the background / DCP's async_save",
                ratio("stall, background", "stall, DCP async_save"),
                "<=",
                1,
            ),
        ]
    )
    rows = [[name, 1e3 * value, 1e3 * min(seconds[name]), 1e3 * max(seconds[name])] for name, value in medians.items()]
    report = [
        f"{parameters:,} parameters, {nbytes:,} bytes of master weights and moments, {RANKS} ranks, {rounds} rounds in turn;",
        "milliseconds of the slower rank on the clock, ratios are medians of paired rounds.",
        "",
        *table(["what", "median", "least", "most"], rows),
        "",
        f"In line over DCP's save: {ratio('stall, in line', 'stall, DCP save'):.2f}. Checked and loaded over DCP's load:",
        f"{ratio('resume, checked and loaded', 'resume, DCP load'):.2f}; every byte is read twice, once for the SHA-256.",
        "",
    ]
    numbers = {"parameters": parameters, "nbytes": nbytes, "seconds": seconds, "targets": judged}
    write("checkpoint", command, numbers, [*report, *verdict], clock="wall")


def measure(rank: int, store: dist.Store, folder: Path, width: int, rounds: int) -> dict:
    """This rank's seconds by operation, one entry per round."""
    topology = init_distributed(store=store, rank=rank, world_size=RANKS)
    model = ModelConfig(
        pattern="AGAGAGAG", window=64, vocab_size=8192, pad_token_id=0, hidden_size=width,
        mlp={"ffn_hidden_size": 3 * width}, attention={"heads": 8},
        gdn={"heads": 8, "key_dim": width // 8, "value_dim": width // 8},
    )  # fmt: skip
    stage = HybridStage(model, SleepConfig(), topology.groups)
    zero = ZeroOptimizer(
        stage, build_optimizer(stage, OptimizerConfig()), topology, precision="fp32", clip=1.0, micro_batch_size=1
    )
    with zero.accumulation():  # a step without gradients creates the moments
        pass
    zero.step()
    about = {"versions": {}, "config": {}}
    (folder / "ours").mkdir(exist_ok=True)
    writers = {name: Writer(folder / "ours", topology, about, keep_last=1, asynchronous=name == "background")
               for name in ("background", "in line")}  # fmt: skip
    own = {f"{rank}/{name}": value for name, value in writers["in line"]._collect(stage, zero, None)[0].items()}
    group = dist.new_group(backend="gloo")
    seconds: dict[str, list[float]] = {}
    step = 0

    def timed(name: str, call: Callable, *arguments, **options) -> object:
        dist.barrier()
        start = time.perf_counter()
        found = call(*arguments, **options)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found

    for number in range(rounds + 1):
        for name in ("background", "in line"):
            step += 1
            timed(f"stall, {name}", writers[name].save, step, stage, zero, {})
            outcome = writers[name].finish()
            if name == "background":
                seconds.setdefault("until it is there, background", []).append(outcome.seconds)
            assert outcome.error is None
        place = str(folder / "dcp" / str(number))
        timed("stall, DCP save", dcp.save, own, checkpoint_id=place, process_group=group)
        written = timed(
            "stall, DCP async_save", dcp.async_save, own, checkpoint_id=f"{place}-async", process_group=group
        )
        written.result()
        timed("resume, checked and loaded", resume, folder / "ours", stage, zero, topology)
        copies = {name: torch.empty_like(value) for name, value in own.items()}
        timed("resume, DCP load", dcp.load, copies, checkpoint_id=place, process_group=group)
        assert all(torch.equal(copies[name], value) for name, value in own.items())
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / "dcp")
        dist.barrier()
    nbytes = torch.tensor(sum(value.nbytes for value in own.values()))
    dist.all_reduce(nbytes)
    # The first round pays for files, buffers and imports.
    warm = {name: times[1:] for name, times in seconds.items()}
    return {"seconds": warm, "nbytes": int(nbytes), "parameters": sum(p.numel() for p in stage.parameters())}


def resume(folder: Path, stage: HybridStage, zero: ZeroOptimizer, topology: Topology) -> None:
    checkpoint, _ = Checkpoint.newest(folder, topology)
    checkpoint.load(stage, zero, topology)
