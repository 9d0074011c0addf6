"""Probe windows: read, answered and forgotten. In float64, against the ordinary code on sequences that end with the probe."""

from itertools import pairwise

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from powernap.model.mixers import MIXERS
from powernap.model.segments import SegmentError, windows_of
from tests.helpers import tiny
from tests.helpers.cases import names

SLEEPS = {
    "N=1": (1, {}),
    "N=3": (3, {}),
    "sliding, N=1": (1, {"eviction": "sliding"}),
    "sliding, N=2": (2, {"eviction": "sliding"}),
    "embeddings again": (2, {"pass_input": "embeddings"}),
    "last write": (2, {"write": "last"}),
    "part of the blocks, truncated": (3, {"loop_range": (1, 3), "backprop_passes": 1}),
}
OTHERS = [letter for letter, mixer in MIXERS.items() if mixer.has_fast_weights and letter != "G"]


def copies(stage, tokens, loss_mask, probes, passes, sleep, pads=0):
    """The loss of each probe from a sequence of its own: the windows before it without the other probes, then the probe."""
    keep = torch.ones(tokens.shape[1], dtype=torch.bool)
    for start, stop in probes:
        keep[start:stop] = False
    losses = []
    for start, stop in probes:
        before = keep & (torch.arange(len(keep)) < start)
        own = torch.arange(start, stop)
        places = torch.cat([before.nonzero()[:, 0], own])
        alone = torch.zeros_like(loss_mask)
        alone[:, own] = loss_mask[:, own]
        losses.append(tiny.run(stage, tokens[:, places], alone[:, places], passes, sleep).loss)
    return torch.stack(losses)


def assert_equals_copies(stage, tokens, loss_mask, probes, passes, sleep, **options):
    loss = tiny.run(stage, tokens, loss_mask, passes, sleep, probes=probes, **options).loss
    expected = copies(stage, tokens, loss_mask, probes, passes, sleep).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, loss), tiny.gradients(stage, expected)) < 1e-12


@pytest.mark.parametrize("pads", names([True], [False]))
@pytest.mark.parametrize("name", names(["N=3", "sliding, N=2", "last write"], SLEEPS))
def test_equals_reading_a_copy(topology, name, pads):
    passes, changes = SLEEPS[name]
    sleep = SleepConfig(**changes)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask, probes = tiny.batch_with_probes()
    if pads:
        tokens[1, :8] = 0  # the first window and part of its probe
        tokens[2, 10] = 0
    assert_equals_copies(stage, tokens, loss_mask, probes, passes, sleep, recompute="none" if pads else "segment")


@pytest.mark.parametrize("letter", OTHERS)
def test_equals_reading_a_copy_with_other_mixers(topology, letter):
    stage = tiny.build_stage(topology, tiny.model_config(pattern=f"A{letter}{letter}"))
    assert_equals_copies(stage, *tiny.batch_with_probes(), 2, SleepConfig())


def test_with_the_whole_cache_a_probe_may_lie_anywhere(topology):
    """Attention alone at N=1, in one window longer than the sequence: the transformer that keeps its cache."""
    sleep = SleepConfig(eviction="sliding")
    stage = tiny.build_stage(topology, tiny.model_config(pattern="AA", window=40), sleep)
    tokens, loss_mask, _ = tiny.batch_with_probes()
    probes = [(4, 7), (7, 9), (16, 19), (27, 30)]
    loss_mask[:] = False
    loss_mask[:, [6, 8, 18, 29]] = True
    assert_equals_copies(stage, tokens, loss_mask, probes, 1, sleep)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_nothing_of_a_probe_reaches_what_follows(topology, eviction):
    sleep = SleepConfig(eviction=eviction)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask, probes = tiny.batch_with_probes(windows=4)
    others = tokens.clone()
    for start, stop in probes[:-1]:
        others[:, start:stop] = tokens[:, start:stop] % 16 + 1
    last = torch.zeros_like(loss_mask)
    last[:, probes[-1][0] :] = loss_mask[:, probes[-1][0] :]
    one, other = (tiny.run(stage, batch, last, 2, sleep, probes=probes, predict=True) for batch in (tokens, others))
    assert one.loss == other.loss
    assert all(map(torch.equal, one.layer_states, other.layer_states))
    assert torch.equal(one.predictions[:, probes[-1][0] :], other.predictions[:, probes[-1][0] :])
    asked = (probes[-1][0], probes[-1][1] - 1)
    silent = [place for start, stop in probes[:-1] for place in range(start, stop)]
    embedded = stage.embedding(tokens).detach()
    heard = gradient_of_inputs(stage, tokens, last, probes, sleep, embedded)
    assert heard[:, silent].abs().max() == 0 and heard[:, slice(*asked)].abs().min() > 0


def gradient_of_inputs(stage, tokens, loss_mask, probes, sleep, embedded):
    """The gradient of the loss by every input's embedding, [B, T, D]."""
    leaf = embedded.clone().requires_grad_()
    embed = stage._embed
    places = {id(segment): segment for segment in plan_segments(tokens, loss_mask, stage.model, sleep, 2, probes)}
    forward = stage.forward

    def of_segment(segment, inputs, hidden_states, layer_states, document_starts, run_part):
        stage._embed = lambda _: leaf[:, segment.where].transpose(0, 1)
        return forward(segment, inputs, hidden_states, layer_states, document_starts, run_part)

    stage.forward = of_segment
    try:
        loss = tiny.sleep_and_predict(stage, list(places.values()), tokens, loss_mask, recompute="none").loss
        return torch.autograd.grad(loss, leaf)[0]
    finally:
        stage.forward, stage._embed = forward, embed


def test_a_probe_reads_all_but_its_last_token():
    tokens, loss_mask, probes = tiny.batch_with_probes(windows=2)
    segments = plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 1, probes)
    assert [(s.tokens, s.position, s.probe) for s in segments] == [
        (range(0, 6), 0, False),
        (range(6, 8), 6, True),
        (range(9, 15), 6, False),
        (range(15, 17), 12, True),
        (range(18, 20), 12, True),
    ]
    even = windows_of(19, tiny.model_config(), SleepConfig(), [(6, 8), (14, 18)], 2)
    assert [len(window.tokens) for window in even if window.probe] == [2, 4]


def test_windows_between_probes_are_those_without_them():
    tokens, loss_mask, probes = tiny.batch_with_probes(windows=3)
    with_probes = plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 2, probes)
    plain, answers = tiny.batch(windows=4, predicting=(3,))
    without = plan_segments(plain, answers, tiny.model_config(), SleepConfig(), 2)
    slept = [segment for segment in with_probes if not segment.probe]
    assert [(s.pass_number, s.blocks, s.position, len(s.tokens)) for s in slept] == [
        (s.pass_number, s.blocks, s.position, len(s.tokens)) for s in without if not s.predicts
    ]
    assert all(one.tokens.stop <= other.tokens.start or one.window == other.window for one, other in pairwise(slept))


@pytest.mark.parametrize(
    ("probes", "sleep", "multiple", "words"),
    [
        ([(4, 7)], {}, 1, "at token 4 comes after 4 tokens, within a window of model.window=6: write probes between"),
        ([(6, 14)], {}, 1, "at token 6 reads 7 tokens, a window has model.window=6"),
        (
            [(6, 7 + 3)],
            {"eviction": "sliding"},
            8,
            "reads 4 tokens, which parallel.tensor=8 ranks cannot split: pad it",
        ),
    ],
)
def test_a_probe_that_cannot_be_read_is_refused(probes, sleep, multiple, words):
    tokens, loss_mask, _ = tiny.batch_with_probes()
    with pytest.raises(SegmentError, match=words):
        plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(**sleep), 1, probes, multiple)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_the_decoder_answers_as_in_training_and_goes_on_as_if_it_had_not(topology, eviction):
    sleep = SleepConfig(eviction=eviction)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask, probes = tiny.batch_with_probes()
    with torch.no_grad():
        logits = training_logits(stage, tokens, loss_mask, probes, sleep)
    asked, silent = Decoder(stage, 2, len(tokens)), Decoder(stage, 2, len(tokens))
    end = 0
    for start, stop in probes:
        if end < start:
            for decoder in (asked, silent):
                decoder.feed(tokens[:, end:start].tolist())
        before = asked.logits.clone()
        with asked.forgetting():
            found = torch.stack(asked.feed_with_logits(tokens[:, start : stop - 1].tolist()))
        torch.testing.assert_close(found, logits[start], rtol=0, atol=1e-12)
        assert torch.equal(asked.logits, before)
        end = stop
    more = tokens[:, :4].tolist()
    torch.testing.assert_close(asked.feed(more), silent.feed(more), rtol=0, atol=1e-13)
    assert asked.lengths == silent.lengths


def training_logits(stage, tokens, loss_mask, probes, sleep):
    """First token of a probe -> logits [B, tokens read, vocabulary]."""
    segments = plan_segments(tokens, loss_mask, stage.model, sleep, 2, probes)
    states, hidden_states, logits = stage.empty_layer_states(len(tokens)), None, {}
    for segment in segments:
        hidden_states, states = stage(segment, tokens[:, :-1], hidden_states, states)
        if segment.predicts:
            logits[segment.tokens.start] = stage.logits(hidden_states).transpose(0, 1)
    return logits
