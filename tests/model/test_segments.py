"""What a batch has to run: windows, passes, dead compute, loop ranges, truncated back-propagation."""

import pytest
import torch

from powernap.model.batch import pad_end, plan_segments
from powernap.model.config import SleepConfig
from powernap.model.segments import Segment
from powernap.model.window import sliding_mask
from tests.helpers import tiny


def plan(passes=3, sleep=None, model=None, **batch):
    tokens, loss_mask = tiny.batch(**batch)
    return plan_segments(tokens, loss_mask, model or tiny.model_config(), sleep or SleepConfig(), passes)


def test_consolidation_windows_sleep_and_prediction_windows_are_read_once():
    segments = plan(passes=3, windows=3, predicting=(2,))
    assert [(s.window, s.pass_number) for s in segments] == [(w, n) for w in (0, 1) for n in (1, 2, 3)] + [(2, 1)]
    assert [s.predicts for s in segments] == [False] * 6 + [True]
    assert [s.tokens for s in segments[::3]] == [range(0, 6), range(6, 12), range(12, 18)]


def test_a_prediction_window_in_the_middle():
    segments = plan(passes=2, windows=4, predicting=(1, 3))
    assert [(s.window, s.pass_number) for s in segments] == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2), (3, 1)]


def test_every_window_is_read_and_then_slept_on_but_for_the_last():
    segments = plan(passes=2, windows=3, predicting=(0, 1, 2), sleep=SleepConfig(every_window=True))
    assert [(s.window, s.pass_number) for s in segments] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1)]
    assert [s.predicts for s in segments] == [True, False, False, True, False, False, True]
    assert [s.final_blocks for s in segments[:3]] == [range(0), range(0), range(4)]
    mixed = plan(passes=2, windows=3, predicting=(1, 2), sleep=SleepConfig(every_window=True))
    assert [(s.window, s.pass_number) for s in mixed] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1)]


def test_a_sequence_whose_loss_is_behind_it_goes_along():
    tokens, loss_mask = tiny.batch(windows=3)
    loss_mask[1] = False
    segments = plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 1)
    assert [s.predicts for s in segments] == [False, False, True]
    text = SleepConfig(every_window=True)
    tokens, loss_mask = tiny.batch(windows=3, predicting=(0, 1, 2))
    whole = plan_segments(tokens, loss_mask, tiny.model_config(), text, 2)
    loss_mask[0, 8:] = False  # a document that ends in the second window
    assert plan_segments(tokens, loss_mask, tiny.model_config(), text, 2) == whole
    assert plan_segments(tokens[:1], loss_mask[:1], tiny.model_config(), text, 2) == whole


def test_last_window_may_be_short():
    tokens, loss_mask = tiny.batch(windows=3)
    segments = plan_segments(tokens[:, :-4], loss_mask[:, :-4], tiny.model_config(), SleepConfig(), 1)
    assert segments[-1].tokens == range(12, 14)


def test_the_last_pass_ends_with_the_last_write():
    segments = plan(passes=2, model=tiny.model_config(pattern="GAGA"))
    assert segments[0].blocks == range(4) and not segments[0].state_only
    assert segments[1].blocks == range(3) and segments[1].state_only


def test_loop_range_runs_outer_blocks_once():
    segments = plan(passes=3, sleep=SleepConfig(loop_range=(1, 3)), model=tiny.model_config(pattern="AGGG"))
    assert [s.blocks for s in segments[:3]] == [range(3), range(1, 3), range(1, 4)]


def test_truncation_keeps_gradients_for_the_last_passes_only():
    segments = plan(passes=3, sleep=SleepConfig(backprop_passes=2))
    assert [s.with_grad for s in segments] == [False, True, True] * 2 + [True]


def test_pads_are_noticed_per_window():
    tokens, loss_mask = tiny.batch()
    tokens[1, :2] = 0
    segments = plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 1)
    assert [s.padded for s in segments] == [True, False, False]


def test_sequences_that_disagree_about_a_window_are_refused():
    tokens, loss_mask = tiny.batch()
    loss_mask[0, 3] = True
    with pytest.raises(ValueError, match=r"window 0 .* in 1 of 3 sequences"):
        plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 1)


def test_what_a_sequence_is_lengthened_by_bears_no_loss():
    tokens, loss_mask = torch.full((2, 12), 5), torch.ones(2, 12, dtype=torch.bool)
    longer, longer_mask = pad_end(tokens, loss_mask, 4, pad_token_id=3)  # 11 inputs become 12
    assert longer.tolist() == [[5] * 12 + [3]] * 2 and longer_mask.tolist() == [[True] * 12 + [False]] * 2
    assert pad_end(tokens, loss_mask, 11, pad_token_id=3)[0].shape == (2, 12)


def test_a_loss_on_the_first_token_of_a_window_belongs_to_the_window_before():
    tokens, loss_mask = tiny.batch(predicting=())
    loss_mask[:, tiny.WINDOW] = True  # predicted from the last token of window 0
    segments = plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 1)
    assert [s.predicts for s in segments] == [True, False, False]
    assert torch.equal(tokens[:, 1:][:, segments[0].tokens[-1]], tokens[:, tiny.WINDOW])


@pytest.mark.parametrize(
    ("cached", "length", "window"), [(0, 6, 6), (0, 4, 6), (5, 6, 6), (3, 6, 6), (5, 1, 6), (0, 1, 1)]
)
def test_the_keys_that_a_token_sees(cached, length, window):
    segment = Segment(0, 1, range(length), range(1), range(1), cached=(range(cached),))
    mask = sliding_mask(length, cached, window, torch.device("cpu"))
    assert segment.mean_keys(window) == pytest.approx(mask.sum().item() / length)
