"""Documents that share a sequence and know nothing of each other: each has the loss and gradients that it has alone."""

import pytest
import torch

from powernap.model import stage as stage_module
from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.mixers import MIXERS
from powernap.model.sleep import sleep_and_predict
from tests.helpers import tiny

OTHERS = "".join(letter for letter in MIXERS if letter not in "AG")


def packed_and_alone(topology, pattern="AGAG", passes=2, **sleep):
    """(loss, gradients) of rows of several documents, and of the documents each in a row of its own."""
    sleep = SleepConfig(**sleep)
    stage = tiny.build_stage(topology, tiny.model_config(pattern=pattern), sleep)
    tokens, loss_mask, starts = tiny.separate_batch()
    together = plan_segments(tokens, loss_mask, stage.model, sleep, passes, separate=True)
    found = []
    for segments, rows, mask, begins in (
        (together, tokens, loss_mask, starts),
        (None, *tiny.alone(tokens, loss_mask, starts), None),
    ):
        segments = segments or plan_segments(rows, mask, stage.model, sleep, passes)
        loss = sleep_and_predict(stage, segments, rows, mask, document_starts=begins).loss
        found.append((loss, tiny.gradients(stage, loss)))
    return found


def error(found):
    (loss, gradients), (alone, expected) = found
    errors = [
        ((gradients[name] - expected[name]).abs().max() / (expected[name].abs().max() + 1e-12)).item()
        for name in gradients
    ]
    return max(abs(loss.item() / alone.item() - 1), *errors)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("pattern", ["AGAG", f"A{OTHERS}", "GA"])
def test_packed_is_alone(topology, pattern, eviction):
    assert error(packed_and_alone(topology, pattern, every_window=True, eviction=eviction)) < 1e-12


@pytest.mark.parametrize(
    "sleep",
    [
        dict(every_window=True, write="last", passes=3),
        dict(every_window=True, pass_input="embeddings", eviction="sliding"),
        dict(every_window=True, pass_norm=True, reinject_embeddings=True, passes=4),
        dict(every_window=False, passes=1, eviction="sliding"),
    ],
    ids=str,
)
def test_packed_is_alone_however_it_sleeps(topology, sleep):
    assert error(packed_and_alone(topology, passes=sleep.pop("passes", 2), **sleep)) < 1e-12


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_what_is_not_kept_apart_is_seen(topology, monkeypatch, eviction):
    monkeypatch.setattr(stage_module, "begin_anew", lambda layer_states, begins: layer_states)
    assert error(packed_and_alone(topology, every_window=True, eviction=eviction)) > 1e-2


def test_every_window_is_read_and_all_but_the_last_are_slept_on(topology):
    """Also a window in which some row has no target: a document's last token alone, or pads behind the last document."""
    model, sleep = tiny.model_config(), SleepConfig(every_window=True)
    tokens, loss_mask, _ = tiny.separate_batch()
    segments = plan_segments(tokens, loss_mask, model, sleep, 2, separate=True)
    passes = [(segment.window, segment.pass_number, segment.predicts) for segment in segments]
    slept_on = [(window, number, number == 0) for window in range(3) for number in range(3)]
    assert passes == [*slept_on, (3, 1, True)]
    assert torch.equal(loss_mask[:2, 13:19].any(1), torch.tensor([False, True]))  # rows disagree
