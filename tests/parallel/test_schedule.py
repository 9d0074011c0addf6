"""What a schedule cannot run is said before anything is sent. Gradients: test_layouts.py; times: test_schedule_timing.py."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.segments import SegmentError
from powernap.parallel import schedule
from powernap.parallel.schedule import MicroBatch
from powernap.train.batches import check_same_segments
from tests.helpers import tiny


def micro_batch(predicting):
    tokens, loss_mask = tiny.batch(predicting=predicting)
    return MicroBatch(plan_segments(tokens, loss_mask, tiny.model_config(), SleepConfig(), 2), tokens, loss_mask)


def test_a_pipeline_wants_the_same_segments_in_all_micro_batches(topology):
    stage = tiny.build_stage(topology)
    with pytest.raises(SegmentError, match="micro-batches 0 and 1 .* different windows.*parallel.pipeline=1"):
        schedule.forward_backward(
            stage, [micro_batch((2,)), micro_batch((1, 2))], 1.0, replace(topology, pp_size=2), recompute="segment"
        )


def test_zero_3_wants_the_same_segments_on_all_data_ranks(topology, monkeypatch):
    own, other = [micro_batch((2,))], [micro_batch((1, 2))]
    check_same_segments(own, topology)
    gather = type(topology).all_gather_over_data
    monkeypatch.setattr(
        type(topology), "all_gather_over_data", lambda self, value: [*gather(self, value), segments_of(other)]
    )
    with pytest.raises(SegmentError, match="different windows.*zero.stage=1"):
        check_same_segments(own, topology)


def segments_of(micro_batches):
    return [[(segment.window, segment.pass_number) for segment in batch.segments] for batch in micro_batches]


def test_batches_go_to_a_gpu_from_pinned_memory():
    tensor, gpu = mock.Mock(is_cuda=False), torch.device("cuda", 0)
    assert schedule._moved(tensor, gpu) is tensor.pin_memory.return_value.to.return_value
    tensor.pin_memory.return_value.to.assert_called_once_with(gpu, non_blocking=True)
    there = torch.zeros(2)
    assert schedule._moved(there, there.device) is there
