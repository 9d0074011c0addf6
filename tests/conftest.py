"""What all tests share: one process group for this process, and tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch


@pytest.fixture(scope="session")
def here():
    """This process as a world of one."""
    import torch.distributed as dist

    from powernap.parallel import topology

    yield topology.initialize(store=dist.HashStore(), rank=0, world_size=1)
    topology.shutdown()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
