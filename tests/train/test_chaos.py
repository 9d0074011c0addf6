"""The short form of `make chaos`: a frozen rank, a kill while a checkpoint is written, a damaged file, SIGHUP, no launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each kind has a test of its own in make test-faults: a frozen rank in test_watchdog.py, SIGHUP, a killed launcher and a
# damaged file in test_stopping.py, a killed rank in test_local.py, a write cut short in test_writer.py.
pytestmark = pytest.mark.wide

ROOT = Path(__file__).parents[2]


def test_runs_that_something_happened_to_equal_those_that_nothing_happened_to():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Trials of seed 0 on two ranks, one of each kind; test_stopping.py asks runs to stop.
    command = [sys.executable, "-m", "tests.helpers.chaos", "--seed", "0", "--numbers", "44,31,26,48,9"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    lines = [line for line in done.stdout.splitlines() if " ok " in line]
    assert done.returncode == 0 and len(lines) == 5, done.stdout + done.stderr
    for word in ("SIGSTOP to", "SIGKILL during save", "a bit flipped", "SIGHUP to", "SIGKILL of the launcher"):
        assert any(word in line for line in lines)
    assert all("equal" in line for line in lines)
    assert "resumed after step" in done.stdout
