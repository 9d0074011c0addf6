"""A rank that stops answering: the others leave within the time-out and say who waits for what."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import runs

pytestmark = pytest.mark.faults

TIMEOUT = 10


@pytest.fixture
def pipeline_run(tmp_path):
    """Four processes of a long run, at their work: (process, {rank: pid})."""
    runs.prepare(tmp_path, model={"vocab_size": 16}, parallel={"pipeline": 2, "tensor": 2, "timeout_seconds": TIMEOUT})
    command = [sys.executable, "-m", "powernap.launch.cli", "train", "tiny.yaml", "train.steps=100000", "data.lanes=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=errors, start_new_session=True)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "errors").read_text()
        time.sleep(0.1)
    ranks = ranks_in(tmp_path)
    yield process, ranks
    for pid in (process.pid, *ranks.values()):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def ranks_in(folder: Path) -> dict[int, int]:
    """The ranks of the run that works in `folder`, read from their environment: rank -> pid."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            rank = re.search(rb"\0RANK=(\d+)\0", (process / "environ").read_bytes())
            if rank and (process / "cwd").resolve() == folder.resolve():
                found[int(rank[1])] = int(process.name)
        except OSError:  # ended meanwhile
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_rank_is_named_by_every_other(tmp_path, pipeline_run):
    _, ranks = pipeline_run
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[3], signal.SIGSTOP)
    start = time.monotonic()
    while any(is_alive(ranks[rank]) for rank in (0, 1, 2)) and time.monotonic() < start + 2 * TIMEOUT:
        time.sleep(0.1)
    took = time.monotonic() - start
    errors = (tmp_path / "errors").read_text()
    assert not any(is_alive(ranks[rank]) for rank in (0, 1, 2)), errors
    assert took < TIMEOUT + 5, errors  # the machine may be busy with other things
    lines = [line for line in errors.splitlines() if line.startswith("powernap: error: ")]
    assert len(lines) == 3, errors
    for rank, place in enumerate(("stage 0, tensor 0", "stage 0, tensor 1", "stage 1, tensor 0")):
        line = next(line for line in lines if line.startswith(f"powernap: error: rank {rank} (data 0, {place})"))
        assert re.search(r"waited 10 s and gives up: step \d+, ", line)
        assert "no word from rank 3 (data 0, stage 1, tensor 1): stopped, or dead" in line
    assert any(re.search(r"window \d pass \d, micro-batch \d", line) for line in lines), errors
    # Rank 2 waits for its tensor rank, or for a message from rank 0, which then waits for its own: gloo's recorder has the groups'
    # collectives, and no messages between stages.
    in_group = r"it waits for all_?\w+ number \d+ of the tensor ranks of data 0, stage [01] .*, enqueued in step \d+, \w+ of window"
    assert any(re.search(in_group, line) for line in lines), errors
    assert "Traceback" not in errors
