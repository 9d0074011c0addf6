"""What an awake token costs: against N, against the tokens read before, and against attention with a growing cache.

Latency. A token is fed to a window that has room for it: one pass, no sleep. Decoders with different N, and states of one
stream saved at different positions, take turns.

Sleep. The first token after a full window is fed again and again from the same saved state: N passes over the window,
and the token.

Memory. A small model reads a long stream token by token. All tensors that Python can reach are counted, each storage
once, and the process's resident memory is read.
"""

import argparse
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import Times, interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from benchmarks.sleep import MODEL, PASSES
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology

SMALL = MODEL.model_copy(
    update={
        "pattern": "AG", "hidden_size": 32, "mlp": MODEL.mlp.model_copy(update={"ffn_hidden_size": 64}),
        "attention": MODEL.attention.model_copy(update={"heads": 2}),
        "gdn": MODEL.gdn.model_copy(update={"heads": 2, "key_dim": 16, "value_dim": 16}),
    }
)  # fmt: skip
PLACES = (1_000, 10_000, 100_000)
CACHED = (1_000, 4_000, 16_000)  # tokens in the cache of the full-attention model


def main(options: argparse.Namespace, command: str) -> None:
    topology = join_alone()
    quick = options.quick
    torch.manual_seed(0)
    stage = HybridStage(MODEL, SleepConfig(), topology.groups)
    windows = 1 if quick else 6
    places = tuple(place // 100 for place in PLACES) if quick else PLACES
    # First, while the process holds no freed memory, in which growth would not show.
    memory, memory_report, memory_targets = memory_of_a_stream(topology, places)
    by_passes, passes_report, passes_targets = latency_by_passes(stage, windows)
    by_place, place_report, place_targets = latency_by_place(stage, places, windows)
    slept, sleep_report = cost_of_sleep(stage, rounds=3 if quick else 30)
    attended, attention_report = beside_full_attention(
        stage, topology, tuple(length // 20 for length in CACHED) if quick else CACHED, windows
    )
    judged, verdict = verdicts(passes_targets + place_targets + memory_targets)
    size = (
        f"Hybrid {MODEL.pattern}, d={MODEL.hidden_size}, windows of {MODEL.window}, float32, one stream, hard eviction.\n"
        "Ratios are medians of paired rounds."
    )
    numbers = {
        "model": MODEL.model_dump(),
        "by_passes": by_passes,
        "by_place": by_place,
        "sleep": slept,
        "full_attention": attended,
        "memory": memory,
        "targets": judged,
    }
    report = [*passes_report, *place_report, *sleep_report, *attention_report, *memory_report]
    write("generate", command, numbers, [size, "", *report, *verdict])


def next_tokens(seed: int = 0) -> Callable[[], list[list[int]]]:
    """Returns a source of random tokens for one stream, in the form that `Decoder.feed` takes."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(MODEL.vocab_size, (1, 1), generator=generator).tolist()


def read(decoder: Decoder, tokens: int, at_once: int = 4096) -> Decoder:
    """`decoder` after reading `tokens` more random tokens."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, tokens, at_once):
        count = min(at_once, tokens - start)
        decoder.feed(torch.randint(MODEL.vocab_size, (1, count), generator=generator).tolist())
    return decoder


def awake(decoders: dict[object, Decoder], windows: int) -> Times:
    """Seconds of every awake token of some windows; no window of `decoders` sleeps in what is timed."""
    token = next_tokens()
    times: Times = {name: [] for name in decoders}
    for _ in range(windows):
        for decoder in decoders.values():  # all to the start of a window: the same work
            read(decoder, -decoder.lengths[0] % MODEL.window + 1)
        forms = {name: lambda decoder=decoder: decoder.feed(token()) for name, decoder in decoders.items()}
        for name, seconds in interleave(forms, rounds=MODEL.window - 2).items():
            times[name] += seconds
    return times


def latency_by_passes(stage: HybridStage, windows: int):
    print("generate: latency over N", flush=True)
    times = awake({n: read(Decoder(stage, n, 1), 4 * MODEL.window) for n in PASSES}, windows)
    numbers = {n: {"ms": milliseconds(times[n]), "over_one_pass": paired_ratio(times[n], times[1])} for n in PASSES}
    report = [
        "An awake token after windows that slept N passes:",
        "",
        *table(["N", "ms", "over N=1"], [[n, *numbers[n].values()] for n in PASSES]),
        "",
    ]
    return numbers, report, [("awake token, N=8 over N=1", numbers[8]["over_one_pass"], "<=", 1.05)]


def latency_by_place(stage: HybridStage, places: tuple[int, ...], windows: int):
    """One stream, saved at each position and resumed from there."""
    print("generate: latency over the place in a stream", flush=True)
    stream, decoders = Decoder(stage, 1, 1), {}
    for place in places:
        read(stream, place - stream.lengths[0])
        decoders[place] = Decoder(stage, 1, 1)
        decoders[place].load_state(stream.state())
    times = awake(decoders, windows)
    first, last = places[0], places[-1]
    numbers = {p: {"ms": milliseconds(times[p]), "over_first": paired_ratio(times[p], times[first])} for p in places}
    report = [
        "An awake token at places of one stream:",
        "",
        *table(["tokens read", "ms", f"over {first:,}"], [[f"{p:,}", *numbers[p].values()] for p in places]),
        "",
    ]
    return numbers, report, [(f"awake token, at {last:,} over {first:,}", numbers[last]["over_first"], "<=", 1.05)]


def cost_of_sleep(stage: HybridStage, rounds: int):
    print("generate: sleep", flush=True)
    forms: dict[object, Callable[[], object]] = {}

    def after(decoder: Decoder) -> Callable[[], object]:
        state = decoder.state()

        def run():
            decoder.load_state(state)
            decoder.feed([[1]])

        return run

    for n in PASSES:
        forms[n] = after(read(Decoder(stage, n, 1), 2 * MODEL.window))
    forms["awake"] = after(read(Decoder(stage, 1, 1), 2 * MODEL.window - 1))
    times = interleave(forms, rounds)
    numbers = {}
    for n in PASSES:
        asleep = [both - token for both, token in zip(times[n], times["awake"], strict=True)]
        numbers[n] = {"ms": milliseconds(asleep), "ms_per_token": milliseconds(asleep) / MODEL.window}
    report = [
        f"A sleep of N passes, once in {MODEL.window} tokens, and its share for each of them; an awake token takes "
        f"{milliseconds(times['awake']):.3g} ms:",
        "",
        *table(["N", "sleep ms", "ms a token"], [[n, *numbers[n].values()] for n in PASSES]),
        "",
    ]
    return {"awake_ms": milliseconds(times["awake"]), "by_passes": numbers}, report


def beside_full_attention(stage: HybridStage, topology: Topology, lengths: tuple[int, ...], windows: int):
    """The same width and depth with attention only, and one window that holds everything: a cache that grows."""
    print("generate: full attention", flush=True)
    longest = lengths[-1] + windows * 2 * MODEL.window
    model: ModelConfig = MODEL.model_copy(update={"pattern": "A" * MODEL.num_layers, "window": longest})
    torch.manual_seed(0)
    full = HybridStage(model, SleepConfig(), topology.groups)
    decoders = {"hybrid": read(Decoder(stage, 1, 1), lengths[-1])}
    # Small chunks: the mask of a chunk has a column for every earlier token.
    decoders |= {n: read(Decoder(full, 1, 1), n, at_once=256) for n in lengths}
    times = awake(decoders, windows)
    token_bytes = MODEL.num_layers * 2 * MODEL.hidden_size * full.dtype.itemsize
    mib = 2**20
    rows = [[f"hybrid, {lengths[-1]:,} read", milliseconds(times["hybrid"]), 1.0, decoders["hybrid"].nbytes() / mib]]
    for n in lengths:
        ratio = paired_ratio(times[n], times["hybrid"])
        rows.append([f"attention over {n:,}", milliseconds(times[n]), ratio, n * token_bytes / mib])
    numbers = [dict(zip(("what", "ms", "over_hybrid", "state_mib"), row, strict=True)) for row in rows]
    report = [
        f"A token of the hybrid beside one of {model.num_layers} attention blocks of the same width that keep all keys "
        "and values:",
        "",
        *table(["", "ms", "over hybrid", "state MiB"], rows),
        "",
    ]
    return numbers, report


def memory_of_a_stream(topology: Topology, places: tuple[int, ...]):
    print("generate: memory over a stream", flush=True)
    torch.manual_seed(0)
    decoder = Decoder(HybridStage(SMALL, SleepConfig(), topology.groups), 4, 1)
    token = next_tokens()
    numbers = {}
    places = (2 * SMALL.window, *(place for place in places if place > 2 * SMALL.window))
    for place in places:
        while decoder.lengths[0] < place:
            decoder.feed(token())
        numbers[place] = {
            "decoder_bytes": decoder.nbytes(),
            "live_tensor_bytes": live_tensor_bytes(),
            "resident_bytes": resident_bytes(),
        }
    first, last = numbers[places[0]], numbers[places[-1]]
    mib = 2**20
    rows = [
        [f"{n:,}", x["decoder_bytes"], x["live_tensor_bytes"], f"{x['resident_bytes'] / mib:.2f}"]
        for n, x in numbers.items()
    ]
    report = [
        f"Memory while a small model ({SMALL.pattern}, d={SMALL.hidden_size}, N=4) reads a stream token by token:",
        "",
        *table(["tokens read", "decoder, bytes", "all live tensors, bytes", "process, MiB"], rows),
        "",
    ]
    what = f"from {places[0]:,} to {places[-1]:,} tokens"
    targets = [
        (f"growth of live tensors in bytes, {what}", last["live_tensor_bytes"] - first["live_tensor_bytes"], "<=", 0),
        (f"growth of the process in MiB, {what}", (last["resident_bytes"] - first["resident_bytes"]) / mib, "<=", 2.0),
    ]
    return numbers, report, targets


def live_tensor_bytes() -> int:
    """Bytes of every tensor that Python can reach, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are inspected
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
