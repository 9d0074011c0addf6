"""Decoding token by token equals the training-time forward pass, in float64; batches, saved states, memory."""

import random

import pytest
import torch

from powernap.model.config import SleepConfig
from powernap.model.decoder import Decoder
from tests.helpers import plain, tiny
from tests.helpers.cases import names
from tests.helpers.mixers import training_logits

WINDOWS = 3
SLEEPS = {
    "hard": {},
    "every_window": {"every_window": True},
    "sliding": {"eviction": "sliding"},
    "sliding, every_window": {"eviction": "sliding", "every_window": True},
    "pass_norm, reinject": {"pass_norm": True, "reinject_embeddings": True},
    "loop_range": {"loop_range": (1, 3)},
    "pass_input": {"pass_input": "embeddings"},
    "write last": {"write": "last"},
    "write last, every_window": {"write": "last", "every_window": True},
    "sliding, loop_range": {"eviction": "sliding", "loop_range": (1, 2)},
}


def stream(sequences=3, tokens=WINDOWS * tiny.WINDOW - 2, pads=False):
    found = torch.randint(1, 17, (sequences, tokens), generator=torch.Generator().manual_seed(5))
    if pads:
        found[1, [0, 1, 4, 11, 12, 13]] = 0
    return found


def heard(decoder, tokens, sizes):
    """The logits after every token of a batch that is fed in pieces, [B, T, vocabulary]."""
    parts, start = [], 0
    while start < tokens.shape[1]:
        piece = tokens[:, start : start + next(sizes)]
        parts.append(torch.stack(decoder.feed_with_logits(piece.tolist())))
        start += piece.shape[1]
    return torch.cat(parts, dim=1)


def one_by_one():
    while True:
        yield 1


def of_random_size(seed, most=2 * tiny.WINDOW + 1):
    source = random.Random(seed)
    while True:
        yield source.randint(1, most)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("passes", "pads"), [pytest.param(1, False, marks=pytest.mark.wide), (3, False), (3, True)])
@pytest.mark.parametrize("name", SLEEPS)
def test_every_distribution_is_that_of_the_training_forward(topology, name, passes, pads):
    stage = tiny.build_stage(topology, sleep=SleepConfig(**SLEEPS[name]))
    tokens = stream(pads=pads)
    expected = training_logits(stage, tokens, passes)
    for sizes in (one_by_one(), of_random_size(passes)):
        assert_close(heard(Decoder(stage, passes, len(tokens)), tokens, sizes), expected)
    # `feed` need not compute what nobody hears.
    quiet, sizes, start = Decoder(stage, passes, len(tokens)), of_random_size(3), 0
    while start < tokens.shape[1]:
        piece = tokens[:, start : start + next(sizes)]
        start += piece.shape[1]
        assert_close(quiet.feed(piece.tolist()), expected[:, start - 1])


def test_against_the_model_written_down_a_second_time(topology):
    """plain.sleep shares no code with the model's forward pass."""
    stage = tiny.build_stage(topology, sleep=SleepConfig(eviction="sliding"))
    tokens = stream()
    with topology.device:
        extended = torch.cat([tokens, tokens[:, :1]], dim=1).to(topology.device)
        expected = plain.sleep(stage, extended, (WINDOWS - 1,), 3)[0]
    found = heard(Decoder(stage, 3, len(tokens)), tokens, one_by_one())
    assert_close(found[:, (WINDOWS - 1) * tiny.WINDOW :], expected)


@pytest.mark.parametrize("pattern", ["GA", "GG", "AA"])
@pytest.mark.parametrize("window", names([7], [1]))
def test_other_models(topology, pattern, window):
    for eviction in ("hard", "sliding"):
        stage = tiny.build_stage(
            topology,
            tiny.model_config(
                pattern=pattern, window=window, gdn=dict(conv_kernel=1 + window % 3), tie_embeddings=True
            ),
            SleepConfig(eviction=eviction),
        )
        tokens = stream(tokens=17)
        assert_close(heard(Decoder(stage, 2, 3), tokens, of_random_size(4)), training_logits(stage, tokens, 2))


def test_the_comparison_notices_another_number_of_passes(topology):
    stage = tiny.build_stage(topology)
    tokens = stream()
    expected = training_logits(stage, tokens, 3)
    found = heard(Decoder(stage, 2, len(tokens)), tokens, one_by_one())
    assert_close(found[:, : tiny.WINDOW], expected[:, : tiny.WINDOW])
    assert (found - expected)[:, tiny.WINDOW :].abs().amax(-1).min() > 1e-6


def test_the_comparison_notices_a_sleep_that_starts_from_what_reading_wrote(topology):
    stage = tiny.build_stage(topology)
    tokens = stream()
    decoder = Decoder(stage, 3, len(tokens))
    decoder._at_start = {}
    found = heard(decoder, tokens, one_by_one())
    difference = (found - training_logits(stage, tokens, 3)).abs().amax(-1)
    assert difference[:, : tiny.WINDOW].max() < 1e-10 and difference[:, tiny.WINDOW :].min() > 1e-6


@pytest.mark.parametrize("forgotten", ["conv_state", "keys_values"])
def test_the_comparison_notices_a_piece_that_does_not_see_the_one_before(topology, forgotten):
    stage = tiny.build_stage(topology)
    tokens = stream(tokens=tiny.WINDOW)
    decoder = Decoder(stage, 1, len(tokens))
    expected = training_logits(stage, tokens, 1)
    decoder.feed(tokens[:, :3].tolist())
    for cache in decoder._caches:
        if forgotten in cache:
            cache[forgotten].zero_()
    found = decoder.feed(tokens[:, 3:4].tolist())
    assert (found - expected[:, 3]).abs().max() > 1e-6


@pytest.mark.parametrize("name", names(["hard", "sliding"], SLEEPS))
def test_a_batch_equals_its_members_one_by_one(topology, name):
    """Prompts of different lengths, then turns in which some get nothing: the windows fill at different times."""
    stage = tiny.build_stage(topology, sleep=SleepConfig(**SLEEPS[name]))
    source = random.Random(0)
    tokens = stream(sequences=4, tokens=40, pads=True).tolist()
    turns, taken, slept = [], [0] * 4, set()
    for most in (15, *[1] * 10, 3, 3, 9, *[1] * 5):
        sizes = [source.randint(0, most) for _ in range(4)]
        turns.append([tokens[row][taken[row] : taken[row] + size] for row, size in enumerate(sizes)])
        taken = [min(40, before + size) for before, size in zip(taken, sizes, strict=True)]
        slept.add(tuple(count // tiny.WINDOW for count in taken))
    assert len(set(taken)) > 1 and sum(len(set(windows)) > 1 for windows in slept) > 5
    batch, alone = Decoder(stage, 2, 4), [Decoder(stage, 2, 1) for _ in range(4)]
    for turn in turns:
        together = batch.feed(turn)
        for row, decoder in enumerate(alone):
            before = batch.lengths[row]
            assert_close(together[row], decoder.feed([turn[row]])[0])
            assert decoder.lengths == [before]


@pytest.mark.parametrize("read", [2, tiny.WINDOW, tiny.WINDOW + 2])
@pytest.mark.parametrize("name", ["hard", "every_window", "sliding"])
def test_a_stream_is_taken_up_again_to_the_last_bit(topology, name, read):
    stage = tiny.build_stage(topology, sleep=SleepConfig(**SLEEPS[name]))
    tokens = stream(sequences=2)
    whole, later = Decoder(stage, 3, 2), Decoder(stage, 3, 2)
    whole.feed([tokens[0, :read].tolist(), tokens[1, : max(0, read - 1)].tolist()])
    state = whole.state()
    later.load_state(state)
    rest = tokens[:, read:].tolist()
    expected, found = whole.feed_with_logits(rest), later.feed_with_logits(rest)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    again = Decoder(stage, 3, 2)  # what was handed out did not change as the stream went on
    again.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(again.feed_with_logits(rest), expected, strict=True))


@pytest.mark.parametrize("name", names(["hard", "sliding"], SLEEPS))
def test_nothing_in_a_state_is_superfluous(topology, name):
    """The control: whatever is lost of it in the middle of a window is missed. What is left of tokens is only numbers."""
    stage = tiny.build_stage(topology, sleep=SleepConfig(**SLEEPS[name]))
    tokens = stream(sequences=1)
    decoder = Decoder(stage, 2, 1)
    decoder.feed(tokens[:, : tiny.WINDOW + 2].tolist())
    state, rest = decoder.state(), tokens[:, tiny.WINDOW + 2 :].tolist()
    expected = decoder.feed_with_logits(rest)[0]
    for lost in state.keys() - {"logits"}:
        other = Decoder(stage, 2, 1)
        # Under hard eviction positions begin anew in every window: where a stream stands is for its user only.
        other.load_state(
            state | {lost: state[lost].clamp(max=1) if lost == "tokens" else torch.zeros_like(state[lost])}
        )
        same = torch.equal(other.feed_with_logits(rest)[0], expected)
        assert same == (lost == "start" and stage.sleep.eviction == "hard"), lost


@pytest.mark.parametrize("name", ["hard", "sliding, every_window"])
def test_memory_does_not_grow(topology, name):
    stage = tiny.build_stage(topology, tiny.model_config(pattern="AG"), SleepConfig(**SLEEPS[name]), torch.float32)
    decoder = Decoder(stage, 1, 1)
    source = random.Random(0)

    def held_after(length):
        while decoder.lengths[0] < length:
            decoder.feed([[source.randrange(1, 17) for _ in range(source.randint(1, 15))]])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in decoder._named().values()}
        tables = len(stage._masks)  # the stage keeps its own, by the place of a window it is given
        return decoder.nbytes(), sum(storages.values()), tables

    held = held_after(2 * tiny.WINDOW)
    assert held[1] <= held[0]
    assert held_after(500) == held


def test_bfloat16_stays_close(topology):
    tokens = stream()
    logits = {}
    for dtype in (torch.float64, torch.bfloat16):
        decoder = Decoder(tiny.build_stage(topology, sleep=SleepConfig(eviction="sliding"), dtype=dtype), 2, 3)
        logits[dtype] = heard(decoder, tokens, of_random_size(6))
        assert {t.dtype for n, t in decoder.state().items() if n.endswith("keys_values")} == {dtype}
    assert logits[torch.bfloat16].isfinite().all()
    assert (logits[torch.bfloat16].double() - logits[torch.float64]).abs().max() < 0.3
