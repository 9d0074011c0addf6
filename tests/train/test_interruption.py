"""Ctrl-C at the places where Python loses it."""

import os
import signal
import subprocess
import sys
import weakref

import pytest

from powernap.train.interruption import heeding_signals


class Kept:
    pass


def lose_an_interrupt():
    """A signal that arrives in the callback of a weak reference: Python prints the exception and goes on."""
    kept = Kept()
    watched = weakref.ref(kept, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del kept
    assert watched() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_lost_in_a_callback_still_ends_the_run():
    with pytest.raises(KeyboardInterrupt), heeding_signals() as signals:
        lose_an_interrupt()
        for _ in range(3):
            signals.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_that_follows_from_it_does_not_hide_it():
    with pytest.raises(KeyboardInterrupt), heeding_signals():
        lose_an_interrupt()
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")


def test_other_errors_stay_what_they_are():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="mine"), heeding_signals():
        raise RuntimeError("mine")
    assert signal.getsignal(signal.SIGINT) is before


HEEDING = """
import sys, time
from powernap.train.interruption import heeding_signals
with heeding_signals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("scheduler", [None, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"])
def test_a_second_signal_ends_it_at_once_unless_a_scheduler_sends_it(scheduler):
    environment = os.environ | ({scheduler: "1"} if scheduler else {})
    process = subprocess.Popen([sys.executable, "-c", HEEDING], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # within a second: the same request
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.2)
    process.send_signal(signal.SIGTERM)
    if scheduler:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.kill()
    assert process.wait(5) == (-signal.SIGKILL if scheduler else 128 + signal.SIGTERM)
    process.stdout.close()
