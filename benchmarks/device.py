"""What one CUDA device shows in a quarter of an hour: right, how fast, how much memory. Each part in a process of its own.

A part that fails, or takes longer than its seconds, costs itself alone. What a part found is a line of device.jsonl as soon as it
is done; the page is written from those lines. The same command again measures what is missing at this commit. `--tiny` runs the
same parts with tiny models on the CPU, the kernels of `kernels` and `blocks of 1B` interpreted (make .venv/kernels), to try this
script itself: its lines are in device_tiny.jsonl, it writes no page.

FLOPs of a step are the recipe's without recomputation (parallel/planning), so MFU, model FLOPs utilization, is bounded by 75 %
where segments are recomputed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from benchmarks import common
from benchmarks.common import ROOT, table, write
from powernap.model.batch import find_loss_tokens
from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.mixers import fla
from powernap.model.segments import Segment
from powernap.model.stage import HybridStage
from powernap.parallel import schedule
from powernap.parallel.checkpoint.writer import Writer
from powernap.parallel.planning.memory import stage_memory
from powernap.parallel.planning.peak import peak_flops
from powernap.parallel.planning.plan import plan
from powernap.parallel.planning.work import segments_of
from powernap.parallel.topology import init_distributed
from powernap.train import trainer
from powernap.train.batches import cut_batch
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch
from powernap.train.numerics import deterministic as switch
from powernap.train.numerics.doctor import examine
from powernap.train.run import provenance

WINDOW, WINDOWS, HEAD = 1024, 4, 128  # three windows are slept on, the last one is answered
SIZES = {  # name: blocks, width, MLP width, sequences of a step
    "tiny": (4, 32, 64, 4),
    "350M": (24, 1024, 2816, 16),
    "1B": (24, 1792, 4864, 8),
}
Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    name: str
    seconds: int  # at most
    measure: Callable[[bool], Found]  # tiny -> what it found


def main(options: argparse.Namespace, command: str) -> None:
    tiny = options.tiny
    if not torch.cuda.is_available() and not tiny:
        sys.exit("benchmarks device: no CUDA device here (torch.cuda.is_available() is False)")
    lines, commit = common.RESULTS / f"device{'_tiny' * tiny}.jsonl", provenance.commit(common.MEASURED)["commit"]
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, environment(Path(cache), tiny)):
        for part in PARTS:
            if part.name in done(lines, commit):
                continue
            print(f"device: {part.name}, at most {part.seconds} s", flush=True)
            found = alone(part, tiny)
            with lines.open("a") as file:
                file.write(json.dumps(common.rounded({"part": part.name, "commit": commit, **found})) + "\n")
            print(f"  {found.get('error', 'done')} in {found['seconds']:.0f} s", flush=True)
    parts = list(done(lines, commit, with_errors=True).values())
    report = describe(parts)
    if tiny:
        print("\n".join(report))
    else:
        write("device", command, {"parts": parts}, report)


def done(lines: Path, commit: str, with_errors: bool = False) -> dict[str, Found]:
    """Part -> what it found last at this commit."""
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return {one["part"]: one for one in found if one["commit"] == commit and (with_errors or "error" not in one)}


def environment(cache: Path, tiny: bool) -> dict[str, str]:
    """One cache of compiled and tuned kernels for all parts: no kernel is tuned twice."""
    chosen = {"TRITON_CACHE_DIR": str(cache), "TRITON_CACHE_AUTOTUNING": "1"}
    return chosen | ({"TRITON_INTERPRET": "1"} if tiny else {})


def alone(part: Part, tiny: bool) -> Found:
    """Run a part in a fresh process, spawned for CUDA's sake; an error or too long a time is what it found."""
    context, start = multiprocessing.get_context("spawn"), time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(part.measure, tiny, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(part.seconds) else {"error": f"took more than {part.seconds} s"}
    except EOFError:
        process.join()
        found = {"error": f"ended with exit code {process.exitcode}"}
    finally:
        _kill(process)
    return {**found, "seconds": time.perf_counter() - start}


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """With the ranks that it started: they would keep the device's memory."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet in a group of its own, or gone
        process.kill()
    process.join()


def _measure(measure: Callable[[bool], Found], tiny: bool, answer) -> None:
    os.setpgid(0, 0)
    try:
        if measure is not doctor:  # which shows what the guard does
            lift_guard()
        found = measure(tiny)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    answer.send(found)


# ------------------------------------------------------------------------------------------------ right


def doctor(tiny: bool) -> Found:
    """Versions; a step of a tiny model with each mixer against float64, first with what the guard of Triton lets through."""
    topology = common.join_alone()
    found: Found = {"versions": provenance.versions(), "machine": provenance.machine(), "guarded": {}, "lifted": {}}
    for guard in ("guarded", "lifted"):
        if guard == "lifted":
            lift_guard()
        for one in examine(topology):
            found[guard][f"{one.letter}, {str(one.dtype).removeprefix('torch.')}"] = one.problem or one.error
    return found


def lift_guard() -> None:
    """Time kernels that FLA and we refuse, where Triton computes some of their gradients wrong: as fast, not as right."""
    fla.TRITON_WRONG_ON_HOPPER = ("0", "0")
    try:
        from fla.ops.common import chunk_o
    except ImportError:
        return
    chunk_o.TRITON_ABOVE_3_7_1 = True


def deterministic(tiny: bool) -> Found:
    """Two steps of the same weights under train.deterministic, in both precisions: the same bits?"""
    found: Found = {}
    for precision in ("fp32", "bf16"):
        with switch.deterministic(True):
            try:
                losses = [one_step("tiny", precision=precision) for _ in range(2)]
                found[precision] = "same bits" if torch.equal(*losses) else "other bits"
            except RuntimeError as error:
                found[precision] = " ".join(str(error).split())[:200]
    return found


def one_step(size: str, precision: str) -> torch.Tensor:
    """All gradients of a step, as one tensor."""
    topology, recipe = common.join_alone(), build_recipe(size, precision=precision)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups).to(topology.device, dtype)
    batches = cut_batch(recipe, synthetic_batch(recipe), 2, topology, None)
    schedule.forward_backward(stage, batches, 1e-3, topology, recompute="segment")
    return torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])


def kernels(tiny: bool) -> Found:
    """Worst of outputs and gradients against float64: FLA's gated delta rule token by token; whole mixers, heads taken apart and
    rotated, and SwiGLU in kernels; the state after passes."""
    if tiny:
        interpret()
    from tests.helpers import interpreted
    from tests.model.mixers.test_kernels_interpreted import GATED, MIXERS_IN_KERNELS, ROTATIONS, Case

    if tiny:
        lengths, sizes, device = (24,), {"heads": 1, "d_k": 16, "d_v": 16}, "cpu"
    else:
        lengths, sizes, device = (24, 64, 300, 1024), {"heads": 14, "d_k": HEAD, "d_v": HEAD}, "cuda"
    found: Found = {}
    for dtype, length, decay in itertools.product((torch.bfloat16, torch.float32), lengths, (1.0, 0.004)):
        case = Case("G", length, decay=decay, dtype=dtype, **sizes)
        errors = interpreted.errors(case.rule(), case, device)
        worst = max(errors, key=lambda name: errors[name])
        found[f"{str(dtype).removeprefix('torch.')}, T={length}, decay {decay:g}"] = [worst, errors[worst]]
    forms = (
        (MIXERS_IN_KERNELS, partial(interpreted.mixer_errors, topology=common.join_alone())),
        (ROTATIONS, interpreted.rotation_errors),
        (GATED, interpreted.swiglu_errors),
    )
    for cases, errors_of in forms:
        for name, case in list(cases.items())[: 1 if tiny else None]:
            errors = errors_of(case, device=device)
            worst = max(errors, key=lambda name: errors[name])
            found[name] = [worst, errors[worst]]
    passes, length = (2, 24) if tiny else (12, WINDOW)
    return {"worst": found, "state": interpreted.state_errors(passes, length, device)}


def interpret() -> None:
    """From now on this process interprets kernels, Powernap's and FLA's."""
    sys.path.insert(0, str(ROOT / ".venv" / "kernels"))
    from tests.helpers import interpreted

    interpreted.repair_triton()
    interpreted.repair_fla()


def ranks_on_one_device(tiny: bool) -> Found:
    """Two ranks that share the device talk by gloo: the loss of the first step is one rank's."""
    found, layouts = {}, {"one": {}, "DP2": {"data": 2}, "TP2": {"tensor": 2}}
    for name, layout in layouts.items():
        store, ranks = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 2 if layout else 1
        with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
            losses = pool.map(_loss_of_a_step, range(ranks), [store.port] * ranks, [layout] * ranks)
            found[name] = list(losses)[0]
    return found


def _loss_of_a_step(rank: int, port: int, layout: dict[str, int]) -> float:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2" if layout else "1"}
    world_size = 2 if layout else 1
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    topology = init_distributed(
        layout.get("tensor", 1), timeout_seconds=40, store=store, rank=rank, world_size=world_size
    )
    recipe = build_recipe("tiny", parallel=layout, precision="fp32")
    stage, zero = trainer.build(recipe, topology)
    batch = synthetic_batch(recipe)
    own = slice(topology.dp_rank, None, topology.dp_size)
    batch = replace(
        batch, tokens=batch.tokens[own], loss_mask=batch.loss_mask[own], is_document_start=batch.is_document_start[own]
    )
    return trainer.train_step(recipe, stage, zero, batch, 2, topology)[0]["loss"]


# ------------------------------------------------------------------------------------------------ fast


def steps(
    tiny: bool, size: str, passes: int = 1, count: int = 5, profiled: bool = False, changes: Found | None = None
) -> Found:
    """Steps of a size; changes: see `build_recipe`."""
    return measure_steps("tiny" if tiny else size, passes, 2 if tiny else count, profiled, changes or {})


def measure_steps(size: str, passes: int, count: int, profiled: bool, changes: Found) -> Found:
    topology = common.join_alone()
    on_cuda = topology.device.type == "cuda"
    recipe = build_recipe(size, passes=passes, **changes)
    stage, zero = trainer.build(recipe, topology)
    batch = synthetic_batch(recipe)

    def step() -> float:
        start = time.perf_counter()
        trainer.train_step(recipe, stage, zero, batch, 2, topology)  # step 2 does not watch the fast weights
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    warm_up = [step() for _ in range(2)]
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(count)]
    median = statistics.median(seconds)
    kept = recipe.model_copy(update={"train": recipe.train.model_copy(update={"recompute": "none"})})
    flops = plan(kept).flops_per_step
    peak, planned = device_peak_flops(), stage_memory(recipe, segments_of(recipe), 0, topology.device.type)
    found: Found = {
        "parameters": sum(p.numel() for p in stage.parameters()), "first_step": first, "warm_up": warm_up,
        "step": median, "tokens_per_second": batch.tokens[:, 1:].numel() / median,
        "mfu": flops / median / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "planned_gib": planned.total / 2**30,
    }  # fmt: skip
    return found | (profile(step) if profiled and on_cuda else {})


def profile(step: Callable[[], float]) -> Found:
    """Kernels of one step: their number, their share of its time, and the ten that take most."""
    with torch.profiler.profile() as profiler:
        seconds = step()
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e6
    most = sorted(events, key=lambda event: -event.self_device_time_total)[:10]
    return {
        "launches": sum(event.count for event in events), "busy": busy / seconds,
        "kernels": [[event.key[:80], event.count, event.self_device_time_total / 1e6] for event in most],
    }  # fmt: skip


def head(tiny: bool) -> Found:
    """Norm, head and loss of one window, forward and back, with a large vocabulary: seconds and peak by share of loss tokens."""
    topology = common.join_alone()
    vocabulary, width, length, batch = (512, 32, 16, 2) if tiny else (151_936, 2048, 2048, 4)
    model = build_recipe("tiny", vocabulary=vocabulary, width=width).model
    dtype = torch.float32 if tiny else torch.bfloat16
    stage = HybridStage(model, SleepConfig(), topology.groups).to(topology.device, dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(length, batch, width, generator=generator).to(topology.device, dtype).requires_grad_()
    targets = torch.randint(vocabulary, (batch, length), generator=generator).to(topology.device)
    found = {}
    for share in (0.1, 1.0):
        loss_mask = torch.rand(batch, length, generator=generator) < share
        loss_tokens = find_loss_tokens(loss_mask).to(topology.device)
        loss_mask = loss_mask.to(topology.device)
        seconds = []
        for _ in range(3):
            hidden.grad = None
            start = time.perf_counter()
            stage.token_losses(hidden, targets, loss_mask, loss_tokens, recompute=True).sum().backward()
            if not tiny:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = None if tiny else torch.cuda.max_memory_allocated() / 2**30
        found[f"{share:g} of tokens"] = {"seconds": min(seconds), "peak_gib": peak}
    return found


def blocks(tiny: bool) -> Found:
    """A block of each letter with kernels of Powernap's, over one window forward and back: milliseconds in kernels and in torch."""
    if tiny:
        interpret()
    topology, found = common.join_alone(), {}
    for letter in "AGK":
        recipe = build_recipe("tiny" if tiny else "1B", pattern=letter)
        stage = HybridStage(recipe.model, recipe.sleep, topology.groups).to(topology.device, torch.bfloat16)
        segment, tokens = segments_of(recipe)[-1], synthetic_batch(recipe).tokens[: recipe.train.micro_batch_size]
        run = partial(_milliseconds, stage, segment, tokens.to(topology.device), 1 if tiny else 3)
        with mock.patch.object(fla, "kernels_compute", lambda x: True):
            in_kernels = run()
        with mock.patch.object(fla, "kernels_compute", lambda x: False):
            in_torch = run()
        found[letter] = {"kernels_ms": in_kernels, "torch_ms": in_torch}
    return found


def _milliseconds(stage: HybridStage, segment: Segment, tokens: torch.Tensor, rounds: int) -> float:
    """The shortest of some rounds, after one in which kernels are compiled."""
    found = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        hidden_states, states = stage(segment, tokens, None, stage.empty_layer_states(len(tokens)))
        sum(part.float().sum() for part in (hidden_states, *states)).backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return min(found[1:])


def torch_form(tiny: bool) -> Found:
    """A step of the kernels' size without them: what chunks in torch cost on the device, in both precisions."""

    size, count = ("tiny", 1) if tiny else ("350M", 2)
    with mock.patch.object(fla, "kernels_compute", lambda x: False):
        found = measure_steps(size, 1, count, False, {})
    return {"bf16": found["step"], "fp32": measure_steps(size, 1, count, False, {"precision": "fp32"})["step"]}


def checkpoint(tiny: bool) -> Found:
    """Seconds that training waits for a save, the first and the second, and until the files are there."""
    topology, recipe = common.join_alone(), build_recipe("tiny" if tiny else "1B")
    stage, zero = trainer.build(recipe, topology)
    found: Found = {"stall": [], "written": []}
    with tempfile.TemporaryDirectory() as folder:
        about = {"versions": {}, "config": {}}
        writer = Writer(Path(folder), topology, about, keep_last=1, asynchronous=True)
        for number in (1, 2):
            start = time.perf_counter()
            writer.save(number, stage, zero, {})
            found["stall"].append(time.perf_counter() - start)
            writer.finish()
            found["written"].append(time.perf_counter() - start)
    return found


def generate(tiny: bool) -> Found:
    """One stream: milliseconds of an awake token and of a sleep of four passes."""
    topology, recipe = common.join_alone(), build_recipe("tiny" if tiny else "1B")
    stage, _ = trainer.build(recipe, topology)
    decoder = Decoder(stage, 4, 1)
    window = recipe.model.window
    with torch.no_grad():
        decoder.feed([[1] * (window - 1)])
        seconds = []
        for _ in range(window // 2 if tiny else 66):  # the first completes the window, the second begins with a sleep
            start = time.perf_counter()
            decoder.feed([[1]])
            decoder.logits.sum().item()
            seconds.append(1e3 * (time.perf_counter() - start))
    return {"awake_ms": statistics.median(seconds[2:]), "with_sleep_ms": max(seconds[:2])}


# ------------------------------------------------------------------------------------------------ sizes


def build_recipe(
    size: str, passes: int = 1, vocabulary: int = 32768, width: int | None = None, pattern: str | None = None, **changes
) -> Recipe:
    """changes: fields of train, or `parallel`."""
    number, hidden, mlp, sequences = SIZES[size]
    tiny = size == "tiny"
    window, head = (16, 16) if tiny else (WINDOW, HEAD)
    hidden = width or hidden
    vocabulary = 64 if tiny and vocabulary == 32768 else vocabulary
    heads = hidden // head
    delta_rule = {"heads": heads, "key_dim": head, "value_dim": head}
    parallel = changes.pop("parallel", {})
    train = {
        "steps": 1000, "global_batch_size": sequences, "micro_batch_size": sequences // 2 // parallel.get("data", 1),
        "precision": "bf16",
    }  # fmt: skip
    return Recipe(
        run={"name": "benchmark"},
        model=dict(
            pattern=pattern or "AG" * (number // 2), window=window, vocab_size=vocabulary, hidden_size=hidden,
            mlp={"ffn_hidden_size": mlp}, attention={"heads": heads}, gdn=delta_rule, kda=delta_rule,
            tie_embeddings=True,
        ),
        sleep={"passes": passes},
        data={"train": "-", "sequence_length": WINDOWS * window + 1},
        train={**train, **changes},
        parallel=parallel,
    )  # fmt: skip


def synthetic_batch(recipe: Recipe) -> Batch:
    """Random tokens, every token of the last window a target."""
    shape = (recipe.train.global_batch_size, recipe.data.sequence_length)
    tokens = torch.randint(recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask[:, -recipe.model.window :] = True
    return Batch(tokens, loss_mask, is_document_start=torch.ones(len(tokens), dtype=torch.bool), answers=[])


def device_peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    return peak_flops(torch.cuda.get_device_name())


WITHOUT_RECOMPUTE, ONE_SEQUENCE = {"recompute": "none"}, {"micro_batch_size": 1}
PARTS = (  # what every later part needs first; then the main numbers
    Part("doctor", 90, doctor),
    Part("kernels", 120, kernels),
    Part("1B, N=1", 120, partial(steps, size="1B", profiled=True)),
    Part("1B, N=4", 70, partial(steps, size="1B", passes=4, count=2)),
    Part("1B, N=1, no recompute", 50, partial(steps, size="1B", count=3, changes=WITHOUT_RECOMPUTE)),
    Part("350M, N=1, micro-batch 1", 50, partial(steps, size="350M", count=3, profiled=True, changes=ONE_SEQUENCE)),
    Part("head of 151,936 words", 30, head),
    Part("350M, torch form", 60, torch_form),
    Part("blocks of 1B", 90, blocks),
    Part("checkpoint of 1B", 50, checkpoint),
    Part("generate at 1B", 50, generate),
    Part("deterministic", 40, deterministic),
    Part("two ranks, one device", 60, ranks_on_one_device),
)


def describe(parts: list[Found]) -> list[str]:
    timed = [part for part in parts if "step" in part]
    keys = ("first_step", "step", "tokens_per_second", "mfu", "peak_gib", "planned_gib", "launches", "busy")
    lines = [
        f"{WINDOWS} windows of {WINDOW} tokens, three slept on, bf16, AdamW in ZeRO-1 on one device. A kernel that FLA refuses with "
        "the Triton there is timed all the same; `doctor` and `kernels` say what is right.",
        "",
        *table(
            ["part", "first s", "s/step", "tokens/s", "MFU", "peak GiB", "planned", "launches", "busy"],
            [[part["part"], *(part.get(key) for key in keys)] for part in timed], left=1,
        ),
        "",
    ]  # fmt: skip
    for part in parts:
        if part not in timed:
            shown = {name: value for name, value in part.items() if name not in ("part", "commit")}
            lines += [f"**{part['part']}**", "", "```", *_flat(shown), "```", ""]
        elif "kernels" in part:
            rows = [list(kernel) for kernel in part["kernels"]]
            lines += [
                f"**{part['part']}**, one step by kernel:",
                "",
                *table(["kernel", "calls", "s"], rows, left=1),
                "",
            ]
    return lines


def _flat(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield f"{name}: {value}"
