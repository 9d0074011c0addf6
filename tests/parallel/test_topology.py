"""Ranks and their GPUs; what cannot work is refused before anything is built."""

import os

import pytest
import torch

from powernap.parallel.topology import TopologyError, init_distributed


def test_a_pipeline_of_ranks_that_share_a_gpu_is_refused(monkeypatch):
    """SLURM's --gpus-per-task shows each rank a single GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", "")
    monkeypatch.delenv("TRITON_CACHE_AUTOTUNING")
    with pytest.raises(TopologyError, match="parallel.pipeline=2: 2 ranks see 1 of this machine's GPUs"):
        init_distributed(pipeline=2)
    assert os.environ["TRITON_CACHE_AUTOTUNING"] == "1"  # set with the device, so that restarts tune nothing again
