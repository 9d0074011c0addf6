"""What sleep costs: step time, memory and the latency of an answer against the number of passes N.

Step time. A step with W consolidation windows runs W (N-1) whole passes more than with N = 1, so

    ideal(N) = step(1) + W (N-1) pass

where `pass` is timed by itself: one segment forward, recomputed, backward, as the schedule runs it.

Memory. Checkpointing keeps the inputs of each segment: hidden states [L, B, D] and fast weights. Live tensor bytes are
counted at every operation of a whole training step, so the peak is exact and the same on every machine. It is in the
backward pass of one segment: gradients of all parameters, saved inputs of the segments still to come, and that segment
recomputed. Gradients stay in one buffer, so a peak is the same whether a segment is the first to be
back-propagated or the last, and only saved inputs grow with N.

Wake latency. One prediction window answered from fast weights that N passes have written.
"""

import argparse

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.common import interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.fast_weights import LayerStates
from powernap.model.segments import Segment
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology
from tests.helpers.training_step import peak_bytes, training_step

PASSES = (1, 2, 4, 8)
CONSOLIDATION_WINDOWS = 4
BATCH = 4
MODEL = ModelConfig(
    pattern="AGAG",
    window=64,
    vocab_size=256,
    hidden_size=256,
    mlp={"ffn_hidden_size": 768},
    attention={"heads": 4},
    gdn={"heads": 4, "key_dim": 64, "value_dim": 64},
)


def main(options: argparse.Namespace, command: str) -> None:
    topology = join_alone()
    torch.manual_seed(0)
    stage = HybridStage(MODEL, SleepConfig(), topology.groups)
    tokens, loss_mask = batch(BATCH)
    time_numbers, time_report, time_targets = step_time(
        stage, topology, tokens, loss_mask, rounds=3 if options.quick else 9
    )
    memory_numbers, memory_report, memory_targets = memory(topology)
    wake_numbers, wake_report, wake_targets = wake_latency(stage, rounds=30 if options.quick else 300)
    judged, verdict = verdicts(time_targets + memory_targets + wake_targets)
    size = (
        f"Hybrid {MODEL.pattern}, d={MODEL.hidden_size}, float32, {BATCH} sequences, "
        f"{CONSOLIDATION_WINDOWS} windows\nof {MODEL.window} tokens slept on, one answered."
    )
    numbers = {
        "model": MODEL.model_dump(),
        "batch": BATCH,
        "consolidation_windows": CONSOLIDATION_WINDOWS,
        "step_time": time_numbers,
        "memory": memory_numbers,
        "wake_latency": wake_numbers,
        "targets": judged,
    }
    write("sleep", command, numbers, [size, "", *time_report, *memory_report, *wake_report, *verdict])


def batch(sequences: int, answers: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens; the last `answers` windows hold the loss tokens."""
    generator = torch.Generator().manual_seed(1)
    shape = (sequences, (CONSOLIDATION_WINDOWS + answers) * MODEL.window + 1)
    tokens = torch.randint(MODEL.vocab_size, shape, generator=generator)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask[:, -answers * MODEL.window :] = True
    return tokens, loss_mask


def step_time(stage: HybridStage, topology: Topology, tokens: torch.Tensor, loss_mask: torch.Tensor, rounds: int):
    print("sleep: step time", flush=True)
    forms = {f"step({n})": step(stage, topology, tokens, loss_mask, n) for n in PASSES}
    forms["pass"] = one_pass(stage, tokens, loss_mask)
    times = interleave(forms, rounds)
    rows, numbers = [], {"pass_ms": milliseconds(times["pass"]), "by_passes": {}}
    for n in PASSES:
        extra = CONSOLIDATION_WINDOWS * (n - 1)
        ideal = [one + extra * each for one, each in zip(times["step(1)"], times["pass"], strict=True)]
        ratio = paired_ratio(times[f"step({n})"], ideal)
        numbers["by_passes"][n] = {
            "step_ms": milliseconds(times[f"step({n})"]),
            "ideal_ms": milliseconds(ideal),
            "step_over_ideal": ratio,
            "step_over_one_pass": paired_ratio(times[f"step({n})"], times["step(1)"]),
        }
        rows.append([n, CONSOLIDATION_WINDOWS * n + 1, *numbers["by_passes"][n].values()])
    alone = numbers["pass_ms"]
    report = [
        "Step time, forward and backward with recomputation.",
        f"ideal(N) = step(1) + {CONSOLIDATION_WINDOWS} (N-1) pass; one pass by itself takes {alone:.3g} ms.",
        "Ratios are medians of paired rounds.",
        "",
        *table(["N", "segments", "step ms", "ideal ms", "step/ideal", "step/step(1)"], rows),
        "",
    ]
    worst = max((numbers["by_passes"][n]["step_over_ideal"] for n in PASSES[1:]), key=lambda ratio: abs(ratio - 1))
    return numbers, report, [("step time over ideal, worst N", worst, "<=", 1.1)]


def step(stage: HybridStage, topology: Topology, tokens: torch.Tensor, loss_mask: torch.Tensor, passes: int):
    """The forward and backward part of a training step."""
    segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), passes)
    scale = 1.0 / int(loss_mask.sum())

    def run():
        stage.zero_grad(set_to_none=True)
        forward_backward(stage, [MicroBatch(segments, tokens, loss_mask)], scale, topology, recompute="segment")

    return run


def one_pass(stage: HybridStage, tokens: torch.Tensor, loss_mask: torch.Tensor):
    """One whole pass over a consolidation window, alone: forward, then recomputed and back-propagated."""
    segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 3)
    segment: Segment = segments[1]  # the middle pass: from hidden states to hidden states
    with torch.no_grad():
        hidden_states, states = stage(segments[0], tokens, None, stage.empty_layer_states(len(tokens)))
    inputs = [x.requires_grad_() for x in (hidden_states, *states)]
    gradients = [torch.randn_like(x) for x in inputs]

    def run_segment(hidden_states, *states):
        hidden_states, states = stage(segment, tokens, hidden_states, states)
        return hidden_states, *states

    def run():
        for x in inputs:
            x.grad = None
        results = checkpoint(run_segment, *inputs, use_reentrant=False, preserve_rng_state=False)
        torch.autograd.backward(results, gradients)

    return run


def memory(topology: Topology):
    print("sleep: memory", flush=True)
    steps = {
        "fp32, 1 micro-batch, 1 answer": ("fp32", 1, 1),
        "fp32, 2 micro-batches, 1 answer": ("fp32", 2, 1),
        "fp32, 1 micro-batch, 2 answers": ("fp32", 1, 2),
        "bf16, 1 micro-batch, 1 answer": ("bf16", 1, 1),
    }
    mib, rows, targets, numbers = 2**20, [], [], {}
    for name, (precision, micro_batches, answers) in steps.items():
        found = {n: training_step(topology, MODEL, *batch(BATCH, answers), n, precision, micro_batches) for n in PASSES}
        peaks = {n: peak_bytes(each.run, each.weights_and_states) for n, each in found.items()}
        saved = {n: CONSOLIDATION_WINDOWS * (n - 1) * found[n].input_bytes for n in PASSES}
        growth = {n: peaks[n] - peaks[1] for n in PASSES}
        numbers[name] = {"peak_bytes": peaks, "growth": growth, "growth_of_saved_inputs": saved}
        rows += [[name, n, peaks[n] / mib, growth[n] / mib, saved[n] / mib] for n in PASSES]
        # Every segment also keeps a scalar of 4 bytes.
        targets.append((f"memory growth / saved, {name}", growth[8] / saved[8], "<=", 1.0))
    gradients = sum(4 * p.numel() for p in found[1].stage.parameters())
    numbers["gradient_bytes"] = gradients
    report = [
        "Peak memory of a training step with ZeRO and AdamW in MiB, weights and optimizer states left out, and its growth",
        "from N=1. A segment's saved inputs are hidden states and fast weights. Pass 1 starts from tokens, the others from",
        f"hidden states; every pass starts from fast weights. Gradients, {gradients / mib:.3g} MiB, are in every peak.",
        "",
        *table(["step", "N", "peak", "growth", "growth of saved inputs"], rows),
        "",
    ]
    return numbers, report, targets


def wake_latency(stage: HybridStage, rounds: int):
    print("sleep: wake latency", flush=True)
    tokens, loss_mask = batch(1)
    forms = {}
    for n in PASSES:
        segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), n)
        with torch.no_grad():
            asleep = sleep_and_predict(stage, segments[:-1], tokens, loss_mask)
        forms[n] = answer(stage, segments[-1], tokens, asleep.layer_states)
    times = interleave(forms, rounds, warmup=3)
    numbers = {n: {"ms": milliseconds(times[n]), "over_one_pass": paired_ratio(times[n], times[1])} for n in PASSES}
    report = [
        "Wake latency: one window answered for one sequence, after N passes of sleep.",
        "",
        *table(["N", "ms", "over N=1"], [[n, *numbers[n].values()] for n in PASSES]),
        "",
    ]
    return numbers, report, [("wake latency N=8 over N=1", numbers[8]["over_one_pass"], "<=", 1.05)]


def answer(stage: HybridStage, segment: Segment, tokens: torch.Tensor, states: LayerStates):
    def run():
        with torch.no_grad():
            hidden_states, _ = stage(segment, tokens, None, states)
            return stage.predictions(hidden_states)

    return run
