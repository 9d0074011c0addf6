"""What sleep costs: step time, memory and the latency of an answer against the number of passes N.

Step time. A step with W consolidation windows runs W (N-1) whole passes more than with N = 1, so

    ideal(N) = step(1) + W (N-1) pass

where `pass` is timed by itself: one segment forward, recomputed, backward, as the schedule runs it.

Memory. Checkpointing keeps the inputs of each segment: hidden states [L, B, D] and fast weights. Live tensor bytes are
counted at every operation, so the peak is exact and the same on every machine. A step is at its peak in the backward pass
of one segment: saved inputs of the segments still to come, gradients of the parameters once there are any, and that
segment recomputed. What is recomputed is largest in a whole pass. With one micro-batch and one answer window, N = 1 has no
whole pass with gradients beside it: the answer is back-propagated first, before there are any, and the other segments
only write, so they stop within the last block. Every N > 1 has one. So the step from N = 1 to 2 also shows the part of a
pass that only writing leaves out; from 2 on only saved inputs grow. With two micro-batches, or two answer windows, a whole
pass meets gradients for every N, and what grows is what sleep needs. In bf16 training that holds for one of each as well:
DeepSpeed's float32 gradients are there from the start. That is measured in whole steps, with the optimizer's.

Wake latency. One prediction window answered from fast weights that N passes have written.
"""

import argparse
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.common import interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from powernap.model import fast_weights as fw
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.segments import Segment, plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.topology import Topology
from powernap.parallel.zero import ZeroOptimizer
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer

PASSES = (1, 2, 4, 8)
CONSOLIDATION_WINDOWS = 4
BATCH = 4
MODEL = ModelConfig(
    pattern="AGAG",
    window=64,
    vocab_size=256,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=4,
    gdn_heads=4,
    gdn_key_dim=64,
    gdn_value_dim=64,
)


def main(options: argparse.Namespace, command: str) -> None:
    here = join_alone()
    torch.manual_seed(0)
    stage = HybridStage(MODEL, SleepConfig(), here.groups)
    tokens, loss_mask = batch(BATCH)
    time_numbers, time_report, time_targets = step_time(
        stage, here, tokens, loss_mask, rounds=3 if options.quick else 9
    )
    memory_numbers, memory_report, memory_targets = memory(stage, here)
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


def step_time(stage: HybridStage, here: Topology, tokens: torch.Tensor, loss_mask: torch.Tensor, rounds: int):
    print("sleep: step time", flush=True)
    forms = {f"step({n})": step(stage, here, tokens, loss_mask, n) for n in PASSES}
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


def step(
    stage: HybridStage,
    here: Topology,
    tokens: torch.Tensor,
    loss_mask: torch.Tensor,
    passes: int,
    micro_batches: int = 1,
):
    """The forward and backward part of a training step, the same batch in every micro-batch."""
    segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), passes)
    scale = 1.0 / (micro_batches * int(loss_mask.sum()))

    def run():
        stage.zero_grad(set_to_none=True)
        forward_backward(stage, [MicroBatch(segments, tokens, loss_mask)] * micro_batches, scale, here, recompute=True)

    return run


def one_pass(stage: HybridStage, tokens: torch.Tensor, loss_mask: torch.Tensor):
    """One whole pass over a consolidation window, alone: forward, then recomputed and back-propagated."""
    segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 3)
    segment: Segment = segments[1]  # the middle pass: from hidden states to hidden states
    with torch.no_grad():
        hidden_states, states = stage(segments[0], tokens, None, stage.empty_memory(len(tokens)))
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive, and the most there ever were.

    Args:
        known: tensors from outside: a view of one, such as a transposed weight, would count it.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def memory(stage: HybridStage, here: Topology):
    print("sleep: memory", flush=True)
    hidden = MODEL.window * BATCH * MODEL.hidden_size * stage.embedding.weight.element_size()
    states = fw.nbytes(stage.empty_memory(BATCH))
    forms = {"1 micro-batch, 1 answer": (1, 1), "2 micro-batches, 1 answer": (2, 1), "1 micro-batch, 2 answers": (1, 2)}
    peaks = {
        name: {n: peak_bytes(stage, step(stage, here, *batch(BATCH, answers), n, micro_batches)) for n in PASSES}
        for name, (micro_batches, answers) in forms.items()
    }
    # Pass 1 starts from tokens, the others from hidden states; every pass starts from fast weights.
    saved = {n: CONSOLIDATION_WINDOWS * (n - 1) * (hidden + states) for n in PASSES}
    growth = {name: {n: peak[n] - peak[1] for n in PASSES} for name, peak in peaks.items()}
    numbers = {
        "hidden_bytes": hidden,
        "fast_weight_bytes": states,
        "gradient_bytes": sum(p.numel() * p.element_size() for p in stage.parameters()),
        "growth_of_saved_inputs": saved,
        "by_step": {name: {"peak_bytes": peaks[name], "growth": growth[name]} for name in forms},
    }
    mib = 2**20
    in_bf16 = {n: peak_bytes(*training_step(here, n)) for n in PASSES}
    saved_in_bf16 = {n: CONSOLIDATION_WINDOWS * (n - 1) * (hidden // 2 + states) for n in PASSES}
    growth_in_bf16 = {n: peak - in_bf16[1] for n, peak in in_bf16.items()}
    numbers["training_in_bf16"] = {"peak_bytes": in_bf16, "growth": growth_in_bf16, "saved": saved_in_bf16}
    bf16_rows = [[n, saved_in_bf16[n] / mib, in_bf16[n] / mib, growth_in_bf16[n] / mib] for n in PASSES]
    rows = [[n, saved[n] / mib, *(x[name][n] / mib for name in forms for x in (peaks, growth))] for n in PASSES]
    report = [
        "Peak memory of a step in MiB, parameters left out, and its growth from N=1.",
        f"A segment's saved inputs are hidden states ({hidden / mib:.3g}) and fast weights ({states / mib:.3g}); all "
        f"gradients are {numbers['gradient_bytes'] / mib:.3g}.",
        "One micro-batch with one answer: at N=1 no whole pass is recomputed with gradients beside it, from N=2 on one is.",
        "",
        *table(["N", "saved inputs", *(column for name in forms for column in (name, "growth"))], rows),
        "",
        "A training step in bf16 with ZeRO and AdamW, 1 micro-batch, 1 answer: float32 gradients are there all the time.",
        "",
        *table(["N", "saved inputs", "step", "growth"], bf16_rows),
        "",
    ]
    # Every segment also keeps a scalar of 4 bytes.
    targets = [(f"memory growth / saved, {name}", growth[name][8] / saved[8], "<=", 1.0) for name in forms]
    targets.append(("memory growth / saved, bf16 training step", growth_in_bf16[8] / saved_in_bf16[8], "<=", 1.0))
    return numbers, report, targets


def training_step(here: Topology, passes: int) -> tuple[HybridStage, Callable[[], object]]:
    """A model in bf16 under ZeRO, and a whole step of it with one micro-batch that has one answer window."""
    stage = HybridStage(MODEL, SleepConfig(), here.groups)
    optimizer = build_optimizer(stage, OptimizerConfig())
    zero = ZeroOptimizer(stage, optimizer, here, precision="bf16", clip=1.0, micro_batch_size=BATCH)
    tokens, loss_mask = batch(BATCH)
    segments = plan_segments(tokens, loss_mask, MODEL, SleepConfig(), passes)

    def run():
        with zero.accumulation():
            micro_batch = MicroBatch(segments, tokens, loss_mask)
            forward_backward(stage, [micro_batch], 1.0 / int(loss_mask.sum()), here, recompute=True)
        zero.step()

    return stage, run


def peak_bytes(stage: HybridStage, run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once in a step, parameters left out."""
    run()  # rotary tables are made outside the count
    stage.zero_grad(set_to_none=True)
    with LiveBytes(stage.parameters()) as live:
        run()
    return live.peak


def wake_latency(stage: HybridStage, rounds: int):
    print("sleep: wake latency", flush=True)
    tokens, loss_mask = batch(1)
    forms = {}
    for n in PASSES:
        segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(), n)
        with torch.no_grad():
            asleep = sleep_and_predict(stage, segments[:-1], tokens, loss_mask)
        forms[n] = answer(stage, segments[-1], tokens, asleep.memory)
    times = interleave(forms, rounds, warmup=3)
    numbers = {n: {"ms": milliseconds(times[n]), "over_one_pass": paired_ratio(times[n], times[1])} for n in PASSES}
    report = [
        "Wake latency: one window answered for one sequence, after N passes of sleep.",
        "",
        *table(["N", "ms", "over N=1"], [[n, *numbers[n].values()] for n in PASSES]),
        "",
    ]
    return numbers, report, [("wake latency N=8 over N=1", numbers[8]["over_one_pass"], "<=", 1.05)]


def answer(stage: HybridStage, segment: Segment, tokens: torch.Tensor, states: fw.Memory):
    def run():
        with torch.no_grad():
            hidden_states, _ = stage(segment, tokens, None, states)
            return stage.predictions(hidden_states)

    return run
