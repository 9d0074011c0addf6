"""Speed and memory of real training steps on one CUDA device: 100M, 350M and 1B hybrids in bf16, N = 1 and N = 4.

Each size runs in a process of its own through train.trainer.train_step, with synthetic batches. `--tiny` runs a tiny
model on the CPU, to try this script itself.

FLOPs of a step, forward times three (the backward pass costs twice the forward):

    per token and pass, attention block      2 (4 d^2 + 3 d f)  +  2 L d
    per token and pass, gated delta net      2 (in_proj + out_proj + 3 d f)  +  6 H K V
    per token of an answer window            2 d vocabulary

A matrix product counts two FLOPs a weight. Causal attention over a window of L tokens sees L / 2 keys on average, in
two products of 2 d each. The delta rule counts as its recurrence, three products of 2 K V per head (recall, write,
read); the kernel's chunked form does more. Every pass counts, and nothing that is skipped: in a window's last pass the
last block only writes. Recomputation does not count, so MFU (model FLOPs utilization) is bounded by 75 %, not 100 %.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.common import join_alone, table, write
from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig
from powernap.model.segments import Segment
from powernap.train import trainer
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch

PASSES = (1, 4)
WINDOW = 1024
WINDOWS = 4  # three are slept on, the last one is answered
HEAD = 128
SIZES = {  # name: blocks, width, MLP width, sequences of a step
    "100M": (12, 768, 2048, 16),
    "350M": (24, 1024, 2816, 16),
    "1B": (24, 1792, 4864, 8),
}
# Dense bf16 TFLOP/s by the data sheets, by a part of the device's name; the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}


def main(options: argparse.Namespace, command: str) -> None:
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("benchmarks device: no CUDA device here (torch.cuda.is_available() is False)")
    sizes = ["tiny"] if options.tiny else list(SIZES)
    numbers = {}
    for size in sizes:
        print(f"device: {size}", flush=True)
        # A process for each size: whatever DeepSpeed and the allocator keep goes with it. Spawned, for CUDA's sake.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            numbers[size] = pool.submit(measure, size, 2 if options.quick or options.tiny else 10).result()
    rows = []
    for size, result in numbers.items():
        for passes, n in result["by_passes"].items():
            keys = ("seconds", "tokens_per_second", "mfu", "peak_gib", "error")
            rows.append([size, passes, *(n.get(key) for key in keys)])
    report = [
        f"{WINDOWS} windows of {WINDOW} tokens, three slept on, bf16, recomputation, AdamW in ZeRO-1 on one device."
        if not options.tiny
        else "A tiny model on the CPU: only says that this script runs.",
        "",
        *table(["model", "N", "s/step", "tokens/s", "MFU", "peak GiB", "error"], rows),
        "",
        "tokens/s counts every token of the batch once, however often it is read.",
    ]
    if options.tiny:
        print("\n".join(report))
    else:
        write("device", command, {"sizes": numbers}, report)


def measure(size: str, steps: int) -> dict:
    """Timed steps of one size at every N, in a fresh process."""
    topology = join_alone()
    recipe = build_recipe(size)
    stage, zero = trainer.build(recipe, topology)
    batch = synthetic_batch(recipe)
    peak_flops = device_peak_flops()
    result = {
        "model": recipe.model.model_dump(),
        "parameters": sum(p.numel() for p in stage.parameters()),
        "sequences": recipe.train.global_batch_size,
        "peak_flops": peak_flops,
        "by_passes": {},
    }
    for passes in PASSES:
        own = recipe.model_copy(update={"sleep": recipe.sleep.model_copy(update={"passes": passes})})
        segments = plan_segments(batch.tokens, batch.loss_mask, recipe.model, own.sleep, passes)
        flops = step_flops(recipe.model, segments, len(batch.tokens))
        on_cuda = topology.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = [timed_step(own, stage, zero, batch, topology, on_cuda) for _ in range(3 + steps)][3:]
        except torch.OutOfMemoryError:  # a result, too; the larger N will not fit either
            result["by_passes"][passes] = {"flops": flops, "error": "out of memory"}
            break
        median = statistics.median(seconds)
        result["by_passes"][passes] = {
            "flops": flops,
            "seconds": median,
            "tokens_per_second": batch.tokens[:, 1:].numel() / median,
            "mfu": flops / median / peak_flops if peak_flops else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        }
    return result


def timed_step(recipe, stage, zero, batch, topology, on_cuda: bool) -> float:
    """Wall seconds of one step; the first three of a measurement compile and tune kernels."""
    start = time.perf_counter()
    trainer.train_step(recipe, stage, zero, batch, 2, topology)  # step 2 does not watch the fast weights
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build_recipe(size: str) -> Recipe:
    if size == "tiny":
        blocks, width, mlp, sequences, window, head, vocabulary = 4, 32, 64, 4, 16, 16, 64
    else:
        blocks, width, mlp, sequences = SIZES[size]
        window, head, vocabulary = WINDOW, HEAD, 32768
    return Recipe(
        run={"name": "benchmark"},
        model=dict(
            pattern="AG" * (blocks // 2),
            window=window,
            vocab_size=vocabulary,
            hidden_size=width,
            mlp={"ffn_hidden_size": mlp},
            attention={"heads": width // head},
            gdn={"heads": width // head, "key_dim": head, "value_dim": head},
            tie_embeddings=True,
        ),
        data={"train": "-", "sequence_length": WINDOWS * window + 1},
        train={
            "steps": 1000,
            "global_batch_size": sequences,
            "micro_batch_size": sequences // 2,
            "precision": "bf16",
        },
    )


def synthetic_batch(recipe: Recipe) -> Batch:
    """Random tokens, every token of the last window a target."""
    shape = (recipe.train.global_batch_size, recipe.data.sequence_length)
    tokens = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask[:, -recipe.model.window :] = True
    return Batch(tokens, loss_mask, is_document_start=torch.ones(len(tokens), dtype=torch.bool), answers=[])


def step_flops(model: ModelConfig, segments: list[Segment], sequences: int) -> float:
    """Model FLOPs of a step, forward and backward; the formula is at the top of this file."""
    return 3.0 * sequences * sum(sum(segment_flops(model, segment)) for segment in segments)


def segment_flops(model: ModelConfig, segment: Segment) -> tuple[float, float]:
    """Forward FLOPs of one sequence: (products with weights, attention and delta rule)."""
    d, (heads, k, v) = model.hidden_size, model.gdn.state_shape
    length = len(segment.tokens)
    kinds = model.pattern[segment.blocks.start : segment.blocks.stop]
    mlp, in_proj, out_proj = 3 * d * model.mlp.ffn_hidden_size, d * heads * (2 * k + 2 * v + 2), heads * v * d
    weights = mixing = 0
    for kind in kinds:
        weights += mlp + (4 * d * d if kind == "A" else in_proj + out_proj)
        mixing += 2 * length * d if kind == "A" else 6 * heads * k * v
    if segment.state_only:  # ends inside its last G block, by construction its last one
        weights -= mlp + out_proj
        mixing -= 2 * heads * k * v
    if segment.predicts:
        weights += d * model.vocab_size
    return 2.0 * weights * length, float(mixing * length)


def device_peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
