"""What all tests share: one process group for this process, and tiny models."""

import os
import re
import signal
import subprocess
from multiprocessing.process import BaseProcess
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

from tests.helpers import warm

# Files that take longest, longest first: begun last, one of them would keep a single core busy at the end.
FIRST = (
    "test_trainer", "test_text_run", "test_layouts", "test_demo", "test_zero_layouts", "test_plan_measured",
    "test_stopping", "test_checkpoint", "test_chaos", "test_tracking_away",
)  # fmt: skip


LONG = ("test_order", "test_cache")  # too long for --quick, which `make check` gives


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="files that import no large library, and no test that starts a process"
    )


def pytest_configure():
    warm.begin_session()


def pytest_ignore_collect(collection_path, config):
    """With --quick: test files that compute, track or fuzz, and others that take long."""
    if not config.getoption("--quick") or not collection_path.match("test_*.py"):
        return None
    imports = re.search(r"^ *(import|from) (torch|mlflow|hypothesis)\b", collection_path.read_text(), re.MULTILINE)
    return bool(imports) or collection_path.stem in (*FIRST, *LONG) or None


@pytest.fixture(scope="session", autouse=True)
def _no_processes(request):
    """With --quick a test is skipped where it starts a process."""
    if not request.config.getoption("--quick"):
        yield
        return

    def skip(*_, **__):
        pytest.skip("starts a process")

    with (
        mock.patch.object(subprocess.Popen, "__init__", skip),
        mock.patch.object(BaseProcess, "start", skip),
        mock.patch("os.fork", skip),
    ):
        yield


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def topology():
    """This process as a world of one."""
    import torch.distributed as dist

    from powernap.parallel.topology import init_distributed, shutdown_distributed

    yield init_distributed(store=dist.HashStore(), rank=0, world_size=1)
    shutdown_distributed()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_before():
    """What a test leaves ignored, the processes of later tests would ignore too."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before, "a test has changed a signal's handler"


@pytest.fixture(scope="session")
def whole_database():
    """An empty MLflow database to copy."""
    from tests.helpers.runs import empty_database

    return empty_database()
