"""What a process does when the one that started it is killed."""

import os
import subprocess
import sys

import psutil
import pytest

from powernap.parallel.liveness.parent import PARENT
from tests.helpers import runs

# Leaves when asked to stop.
CHILD = """
import time
from powernap.parallel.liveness.parent import follow_parent
from powernap.train.run.signals import signal_handlers
with signal_handlers() as signals:
    follow_parent()
    print("ready", flush=True)
    while not signals.stop:
        time.sleep(0.01)
"""
# Starts one and waits. It is told by what the environment of its child has.
STARTING = """
import os, subprocess, sys
from powernap.parallel.liveness.parent import not_to_outlive_this
environment = {"ours": not_to_outlive_this(), "torchrun's": {"TORCHELASTIC_RUN_ID": "1"}, "a shell's": {}}[sys.argv[1]]
child = subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=os.environ | environment, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
child.wait()
"""


@pytest.mark.faults
@pytest.mark.parametrize(("whose", "leaves"), [("ours", True), ("torchrun's", True), ("a shell's", False)])
def test_a_child_stops_when_its_parent_was_killed_unless_a_shell_started_it(whose, leaves):
    command = [sys.executable, "-c", STARTING, whose, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        number, ready = parent.stdout.readline().split()
        child = psutil.Process(int(number))
        assert ready == "ready"
        parent.kill()
        _, left = psutil.wait_procs([child], 5 if leaves else 1)
        for process in left:
            process.kill()
    assert bool(left) != leaves


def test_a_parent_that_is_gone_before_its_child_looks_counts_too():
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {PARENT: str(gone.pid)},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 0 and f"process {gone.pid}, which started this one, is gone: stopping" in done.stderr


POOL = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from powernap.train.data.build import _belong_to_the_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_belong_to_the_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.faults
def test_workers_of_a_build_of_shards_that_was_killed_end(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    done = subprocess.run([sys.executable, "pool.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60)
    runs.wait_for(lambda: not psutil.pid_exists(int(done.stdout)), 5)


# Waits for a rank that never comes.
JOINING = """
from powernap.parallel.topology import distributed_session
from powernap.parallel.liveness.parent import follow_parent
from powernap.train.run.signals import signal_handlers
with signal_handlers():
    follow_parent()
    with distributed_session():
        pass
"""


@pytest.mark.faults  # imports take seconds
def test_a_rank_that_still_waits_for_others_leaves_at_once_when_its_launcher_is_gone():
    gone = subprocess.Popen(["true"])
    gone.wait()
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "POWERNAP_RENDEZVOUS": "alone",
    }
    done = subprocess.run(
        [sys.executable, "-c", JOINING],
        env=os.environ | world | {PARENT: str(gone.pid)},
        capture_output=True,
        text=True,
        timeout=50,  # the watchdog gives up after 60 s
    )
    assert done.returncode == 75 and "is gone: stopping" in done.stderr, done.stderr
