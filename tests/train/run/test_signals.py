"""Ctrl-C at the places where Python loses it."""

import os
import signal
import subprocess
import sys
import weakref

import pytest

from powernap.train.run.signals import signal_handlers


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
    with pytest.raises(KeyboardInterrupt), signal_handlers() as signals:
        lose_an_interrupt()
        for _ in range(3):
            signals.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_that_follows_from_it_does_not_hide_it():
    with pytest.raises(KeyboardInterrupt), signal_handlers():
        lose_an_interrupt()
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")


def test_while_steps_are_run_the_first_asks_to_stop_and_the_second_stops_at_once(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt), signal_handlers() as signals, signals.saving():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy of the same
        assert signals.stop == "SIGINT"
        signals._asked -= 2  # seconds
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
    with pytest.raises(KeyboardInterrupt), signal_handlers() as signals:  # nothing is lost yet
        os.kill(os.getpid(), signal.SIGINT)


def test_other_errors_stay_what_they_are():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="mine"), signal_handlers():
        raise RuntimeError("mine")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("launched_by_torchrun", [False, True])
def test_what_was_ignored_from_the_start_stays_so_unless_torchrun_passes_it_on(monkeypatch, launched_by_torchrun):
    if launched_by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    changed = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in changed]
    try:
        with signal_handlers() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.stop == ("SIGHUP" if launched_by_torchrun else None)
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) != launched_by_torchrun
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's
            assert signals.stop
    finally:
        for number, handler in zip(changed, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("then_exits", [False, True])
def test_only_a_process_that_then_exits_ignores_a_late_copy(then_exits):
    """A notebook's kernel must end by SIGTERM after a `powernap.fit` that was asked to stop."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        with signal_handlers(then_exits) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop == "SIGTERM"
        after = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert after == ([signal.SIG_IGN] * 3 if then_exits else before)


HEEDING = """
import sys, time
from powernap.train.run.signals import signal_handlers
with signal_handlers() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.faults
@pytest.mark.parametrize("scheduler", [None, "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"])
def test_a_second_signal_ends_it_at_once_unless_a_scheduler_sends_it(scheduler):
    environment = os.environ | ({scheduler: "1"} if scheduler else {})
    process = subprocess.Popen([sys.executable, "-c", HEEDING], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # within a second: the same request
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.2)
    process.send_signal(signal.SIGHUP)  # nobody closes a terminal twice to hurry a run
    process.send_signal(signal.SIGTERM)
    if scheduler:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.kill()
    assert process.wait(5) == (-signal.SIGKILL if scheduler else 128 + signal.SIGTERM)
    process.stdout.close()
