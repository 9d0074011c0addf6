"""Checks that every mixer must pass: test_every_mixer.py runs them on each one of the registry, and on broken ones.

A mixer that is registered, by Powernap or by another package, is tested by its letter alone.
"""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.mixers import MIXERS
from powernap.model.parameters import parameters
from powernap.parallel.checkpoint.shards import split_of
from powernap.parallel.planning import memory
from powernap.parallel.planning.layout import consolidation_flops, prediction_flops
from powernap.parallel.planning.work import segments_of
from tests.helpers import tiny

aten = torch.ops.aten
# What torch's counter leaves out: the delta rule's triangular solve, and our convolution, a product for each tap.
UNCOUNTED = {
    aten.linalg_solve_triangular: lambda a, b, *_, out_shape=None, **__: a[-1] * torch.Size(b).numel(),
    aten.addcmul_: lambda x, *_, out_shape=None, **__: 2 * torch.Size(x).numel(),
}
HARD, SLIDING = SleepConfig(), SleepConfig(eviction="sliding")


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, weights, atol: float) -> None:
    """Of two scalars that are the same, by every weight."""
    for one, other in zip(*(torch.autograd.grad(total, weights) for total in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


FURTHER: dict[str, dict] = {}  # letter -> fields of its section, for a mixer that has choices


def model_of(letter: str, **changes):
    section = MIXERS[letter.upper()].section
    changes[section] = {**changes.get(section, {}), **FURTHER.get(letter, {})}
    return tiny.model_config(pattern=letter, vocab_size=18, **changes)


def parameters_are_those_of_the_list(topology, letter: str) -> None:
    """Names, shapes and splits; each has a gradient: none is unused."""
    stage = tiny.build_stage(topology, model_of(letter))
    found = {n: (tuple(p.shape), (split_of(p) or (None,))[0]) for n, p in stage.named_parameters()}
    listed = parameters(stage.model, stage.sleep, stage.blocks)
    assert found == {w.name: (w.shape, w.split) for w in listed} and len(found) == len(listed)
    tokens, loss_mask = tiny.batch()
    gradients = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask).loss)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def states_are_as_large_as_planned(topology, letter: str) -> None:
    """Its states, before and after windows; without a cache only fast weights are handed on."""
    for sleep in (HARD, SLIDING):
        stage = tiny.build_stage(topology, model_of(letter), sleep, dtype=torch.float32)
        mixer, stage_states = stage.model.mixers[0], stage.empty_layer_states(3)
        assert mixer.has_state(sleep) or not mixer.has_fast_weights
        assert len(stage_states) == mixer.has_state(sleep)
        tokens, loss_mask = tiny.batch()
        final_states = tiny.run(stage, tokens, loss_mask, sleep=sleep).layer_states
        for state, cached in [(stage_states, 0), (final_states, tiny.WINDOW - 1)]:
            planned = 3 * mixer.state_bytes(stage.model, 4, cached) if mixer.has_state(sleep) else 0
            assert sum(s.nbytes for s in state) == planned
        if mixer.has_fast_weights:
            assert final_states[0].any() and final_states[0].shape == (3, *mixer.state_shape)


def flops_are_those_computed(topology, letter: str) -> None:
    """Against torch's own count, within 2.5 %: it counts the keys that a causal mask leaves out."""
    large = {"heads": 4, "groups": 2}
    section = {
        name: large.get(name, 32)
        for name, f in MIXERS[letter.upper()].model_fields.items()
        if f.is_required() or name in large
    }
    model = model_of(
        letter, window=32, hidden_size=512, mlp=dict(ffn_hidden_size=64), **{MIXERS[letter.upper()].section: section}
    )
    stage = tiny.build_stage(topology, model, dtype=torch.float32)
    for predicts in (True, False):
        if not predicts and not model.mixers[0].has_fast_weights:
            continue  # without anything to write nothing runs
        tokens = torch.ones(1, 33, dtype=torch.long)
        segment = plan_segments(tokens, torch.full_like(tokens, predicts, dtype=torch.bool), model, HARD, 1)[0]
        counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            stage(segment, tokens[:, :-1], None, stage.empty_layer_states(1))
        planned = prediction_flops(model, HARD) if predicts else consolidation_flops(model, HARD, 1)[0]
        assert counter.get_total_flops() / 32 == pytest.approx(sum(planned), rel=0.025)


def activations_are_about_those_kept(topology, letter: str) -> None:
    """Against the tensors that autograd saves on a CPU."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for predicts in (True, False):
            if not predicts and not MIXERS[letter.upper()].has_fast_weights:
                continue
            check_activations(topology, letter, precision, dtype, predicts)


def check_activations(topology, pattern: str, precision: str, dtype: torch.dtype, predicts: bool) -> None:
    sizes = {"heads": 4, "groups": 2}
    sections = {
        MIXERS[letter.upper()].section: {
            name: sizes.get(name, 16)
            for name, f in MIXERS[letter.upper()].model_fields.items()
            if f.is_required() or name in sizes
        }
        for letter in set(pattern)
    }
    for letter in set(pattern):
        sections[MIXERS[letter.upper()].section] |= FURTHER.get(letter, {})
    model = tiny.model_config(
        pattern=pattern, window=64, vocab_size=97, pad_token_id=None, hidden_size=64, mlp=dict(ffn_hidden_size=96),
        **sections,
    )  # fmt: skip
    stage = tiny.build_stage(topology, model, dtype=dtype)
    tokens = torch.ones(2, 65, dtype=torch.long)
    loss_mask = torch.full_like(tokens, predicts, dtype=torch.bool)
    segment = plan_segments(tokens, loss_mask, model, HARD, 1)[0]
    measured = kept_by_autograd(stage, tokens, loss_mask, segment)
    train = {"steps": 100, "global_batch_size": 2, "micro_batch_size": 2, "precision": precision, "recompute": "none"}
    planned = tiny.recipe(model, HARD, 1, 65, train=train)
    planned_of = planned, range(len(pattern)), segments_of(planned, [predicts])[0], "cpu"
    estimate = memory.segment_activations(*planned_of) + memory.head_bytes(*planned_of).kept
    assert estimate == pytest.approx(measured, rel=0.04), (precision, predicts, estimate, measured)


def kept_by_autograd(stage, tokens, loss_mask, segment) -> int:
    """Bytes that the forward pass of one segment saves, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # with x: a freed address would be used again
        return x

    fast_weights = tuple(s.requires_grad_() for s in stage.empty_layer_states(len(tokens)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_states, _ = stage(segment, tokens[:, :-1], None, fast_weights)
        if segment.predicts:
            where = segment.where
            stage.token_losses(hidden_states, tokens[:, 1:][:, where], loss_mask[:, 1:][:, where]).sum()
    return sum(size for size, _ in kept.values())


def gradients_are_right(topology, letter: str) -> None:
    """Of three passes over two windows, against finite differences: through the state, too."""
    passes = 3 if MIXERS[letter.upper()].has_fast_weights else 1
    tokens, loss_mask = tiny.batch()
    for sleep in (HARD, SLIDING):
        stage = tiny.build_stage(topology, model_of(letter), sleep)
        run = functools.partial(tiny.run, stage, tokens, loss_mask, passes, sleep)
        tiny.assert_finite_differences_agree(stage, lambda run=run: run().loss)


def a_chunk_at_a_time_is_the_whole(topology, letter: str) -> None:
    """Decoding token by token and in chunks, pads among them, gives training's distributions; windows sleep between."""
    for sleep in (HARD, SLIDING):
        stage = tiny.build_stage(topology, model_of(letter, tie_embeddings=True), sleep)
        tokens = torch.randint(1, 17, (2, 17), generator=torch.Generator().manual_seed(5))
        tokens[1, [0, 4, 8, 9]] = 0
        expected = training_logits(stage, tokens, 2)
        for size in (1, 4, 17):
            decoder = Decoder(stage, 2, 2)
            parts = [torch.stack(decoder.feed_with_logits(part.tolist())) for part in tokens.split(size, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)


def a_pad_leaves_no_trace(topology, letter: str) -> None:
    """Whatever a pad's embedding: losses, state and all other gradients are the same."""
    stage = tiny.build_stage(topology, model_of(letter))
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    tokens[:, 3] = tokens[0, 7] = 0
    loss_mask[0, 8] = False  # what a pad predicts is its own
    losses, states = [], []
    for _ in range(2):
        output = tiny.run(stage, tokens, loss_mask, 2 if MIXERS[letter.upper()].has_fast_weights else 1)
        losses.append(output.loss.item())
        states.append([state.clone() for state in output.layer_states])
        with torch.no_grad():
            stage.embedding.weight[0] += 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def writing_alone_writes_the_same(topology, letter: str) -> None:
    if not MIXERS[letter.upper()].has_fast_weights:
        return
    stage = tiny.build_stage(topology, model_of(letter))
    tokens, loss_mask = tiny.batch(windows=1, predicting=(0,))
    segment = plan_segments(tokens, loss_mask, stage.model, HARD, 1)[0]
    hidden_states = torch.randn(tiny.WINDOW, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer, window = stage.decoder.layers[0], stage._window(segment, tokens[:, :-1])
    (state,) = stage.empty_layer_states(3)
    _, whole = layer(hidden_states, state, window)
    torch.testing.assert_close(layer.write(hidden_states, state, window), whole, rtol=0, atol=0)


@torch.no_grad()
def training_logits(stage, tokens, passes):
    """After every token [B, T, vocabulary], by the segments of training: all windows before slept on, this one predicts."""
    length = tokens.shape[1]
    tokens = torch.cat([tokens, tokens[:, :1]], dim=1)  # the last target, which is unused
    # Where all windows predict one run is enough, else each window is the last of one.
    step = length if stage.sleep.every_window else stage.model.window
    logits = []
    for start in range(0, length, step):
        own = tokens[:, : start + step + 1]
        loss_mask = torch.zeros_like(own, dtype=torch.bool)
        loss_mask[:, start + 1 :] = True
        layer_states, hidden_states = stage.empty_layer_states(len(own)), None
        for segment in plan_segments(own, loss_mask, stage.model, stage.sleep, passes):
            hidden_states, layer_states = stage(segment, own[:, :-1].to(stage.device), hidden_states, layer_states)
            if segment.predicts:
                logits.append(stage.logits(hidden_states).transpose(0, 1))
    return torch.cat(logits, dim=1)


CHECKS = [
    parameters_are_those_of_the_list,
    states_are_as_large_as_planned,
    flops_are_those_computed,
    activations_are_about_those_kept,
    gradients_are_right,
    a_chunk_at_a_time_is_the_whole,
    a_pad_leaves_no_trace,
    writing_alone_writes_the_same,
]
