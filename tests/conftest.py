"""What all tests share: one process group for this process, and tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

# Files that take longest, longest first: begun last, one of them would keep a single core busy at the end.
FIRST = (
    "test_trainer", "test_text_run", "test_layouts", "test_demo", "test_zero_layouts", "test_plan_measured",
    "test_stopping", "test_checkpoint", "test_chaos", "test_tracking_away",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


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


@pytest.fixture(scope="session")
def whole_database(tmp_path_factory):
    """An empty MLflow database to copy: making one takes seconds."""
    from powernap.train.tracking.delivery import prepare_mlflow, store_uri

    prepare_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("database")
    SqlAlchemyStore(store_uri(folder), "file:///nowhere").engine.dispose()
    return folder / "mlflow.db"
