"""The gated delta rule on the CPU: our chunked form, Megatron-core's torch form and the token-by-token recurrence.

All three get the same inputs and initial state; their outputs and final states must agree before the clock starts.
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.common import interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from powernap.model.mixers.delta_rule import MAX_CHUNK, chunked_delta_rule, sequential_delta_rule

BATCH, HEADS, DIM = 8, 4, 64
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
CHUNKS = (8, 16, 32, 64)
LONGEST_SEQUENTIAL = 1024  # beyond it one backward pass takes many seconds


def main(options: argparse.Namespace, command: str) -> None:
    join_alone()
    numbers = {}
    for length in (64, 512) if options.quick else LENGTHS:
        print(f"delta_rule: {length} tokens", flush=True)
        rounds = max(3, min(20, 2048 // length)) // (2 if options.quick else 1)
        numbers[length] = {
            "forward": measure(length, rounds, backward=False),
            "forward_backward": measure(length, rounds, backward=True),
        }
    print("delta_rule: chunk lengths", flush=True)
    chunks = {length: by_chunk(length, 3 if options.quick else 12) for length in (64, 512)}
    at_512 = numbers[512]["forward_backward"]["times_faster_than"]
    judged, verdict = verdicts(
        [
            ("T=512, forward+backward: x Megatron's", at_512["megatron"], ">=", 1.5),
            ("T=512, forward+backward: x sequential", at_512["sequential"], ">=", 5.0),
        ]
    )
    report = [f"{BATCH} sequences, {HEADS} heads, d_k = d_v = {DIM}, float32, chunks of at most {MAX_CHUNK}.", ""]
    columns = ["T", "chunked", "Megatron", "sequential", "x Megatron", "x sequential"]
    for what, title in (("forward", "Forward"), ("forward_backward", "Forward and backward")):
        rows = []
        for length, both in numbers.items():
            of_form, gain = both[what]["ms"].get, both[what]["times_faster_than"].get
            ms = [of_form(form) for form in ("chunked", "megatron", "sequential")]
            rows.append([length, *ms, gain("megatron"), gain("sequential")])
        report += [f"{title}, ms:", "", *table(columns, rows), ""]
    report += [
        f"x: how many times faster chunked is. -: not run, too slow above {LONGEST_SEQUENTIAL} tokens.",
        "",
        "Forward and backward of the chunked form by longest chunk, ms:",
        "",
        *table(["T", *map(str, CHUNKS)], [[length, *ms.values()] for length, ms in chunks.items()]),
        "",
        *verdict,
    ]
    size = {"batch": BATCH, "heads": HEADS, "dim": DIM, "max_chunk": MAX_CHUNK}
    write("delta_rule", command, {"size": size, "lengths": numbers, "by_chunk_ms": chunks, "targets": judged}, report)


def measure(length: int, rounds: int, backward: bool) -> dict:
    values = inputs(length)
    forms = {"chunked": chunked_delta_rule, "megatron": megatron_delta_rule}
    if length <= LONGEST_SEQUENTIAL:
        forms["sequential"] = sequential_delta_rule
    with torch.no_grad():
        expected = chunked_delta_rule(*values)
        for name, form in forms.items():
            for one, other in zip(form(*values), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-3, msg=f"{name} disagrees at T={length}")
    weights = [torch.randn_like(x) for x in expected]

    def timed(form):
        if backward:
            return lambda: torch.autograd.grad(form(*values), values, weights)
        return torch.no_grad()(lambda: form(*values))

    times = interleave({name: timed(form) for name, form in forms.items()}, rounds)
    return {
        "rounds": rounds,
        "ms": {name: milliseconds(seconds) for name, seconds in times.items()},
        "times_faster_than": {n: paired_ratio(times[n], times["chunked"]) for n in times if n != "chunked"},
    }


def by_chunk(length: int, rounds: int) -> dict[int, float]:
    values = inputs(length)
    weights = [torch.randn_like(x) for x in chunked_delta_rule(*values)]

    def timed(chunk):
        return lambda: torch.autograd.grad(chunked_delta_rule(*values, max_chunk=chunk), values, weights)

    return {chunk: milliseconds(t) for chunk, t in interleave({c: timed(c) for c in CHUNKS}, rounds).items()}


def megatron_delta_rule(q, k, v, g, beta, state):
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    scaled = q * q.shape[-1] ** 0.5  # it divides q by sqrt(d_k)
    return torch_chunk_gated_delta_rule(scaled, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = (BATCH, length, HEADS)
    q, k = (F.normalize(normal(*tokens, DIM), dim=-1) for _ in range(2))
    g, beta = -0.1 * F.softplus(normal(*tokens)), normal(*tokens).sigmoid()
    values = [q, k, normal(*tokens, DIM), g, beta, normal(BATCH, HEADS, DIM, DIM)]
    return [x.requires_grad_() for x in values]
