"""Signal handlers: no signal is lost, and a request to stop waits for the end of the step.

Ctrl-C asks to stop while steps are run, which would be lost, and says so; before that, and the second time, it stops at once: Python
raises KeyboardInterrupt wherever it is, but drops it inside the callback of a weak reference, of which torch has many. The run would
continue, or fail a little later with an error that does not name the reason.

SIGTERM and SIGUSR1 come from schedulers, SIGHUP from a terminal that closes, to one rank or to all: the ranks agree on a
step to stop after.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAME = 1.0  # seconds in which copies count once: a scheduler or terminal signals launcher and ranks, and the launcher forwards
SAID = b"\npowernap: stopping after this step, with a checkpoint; Ctrl-C again stops at once\n"
# Schedulers signal again before the grace time is over (SLURM at a time limit and in a grace time), and then kill.
SCHEDULED = "SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST"


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started with a signal ignored: by nohup, or (Ctrl-C) by a script's &. It stays ignored.

    Signals that torchrun handles do not count: it takes over ignored ones too, and ends its ranks with them.
    """
    taken_over = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")
    return signal.getsignal(number) is signal.SIG_IGN and number.name not in taken_over


class Signals:
    """The signals received so far.

    Attributes:
        stop: the signal that asked to stop after the current step, such as "SIGTERM"; None: continue.
    """

    def __init__(self) -> None:
        self.stop: str | None = None
        self._asked = 0.0  # the time of `stop`, or of the first Ctrl-C
        self._interrupted = False
        self._running_steps = False
        self._scheduled = any(name in os.environ for name in SCHEDULED)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C came."""
        if self._interrupted:
            raise KeyboardInterrupt

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a first Ctrl-C asks to stop."""
        self._running_steps = True
        try:
            yield
        finally:
            self._running_steps = False

    def _interrupt(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if (self._interrupted or self.stop == "SIGINT") and now - self._asked < SAME:
            return
        if self._running_steps and not self.stop:
            self.stop, self._asked = "SIGINT", now
            if os.environ.get("RANK", "0") == "0":
                os.write(2, SAID)  # print is not safe here
            return
        self._interrupted, self._asked = True, now
        raise KeyboardInterrupt

    def _ask_to_stop(self, number: int, frame: object) -> None:
        now = time.monotonic()
        hurry = number == signal.SIGTERM and not self._scheduled
        if self.stop and now - self._asked > SAME and hurry:
            os._exit(128 + number)
        if not self.stop:
            self.stop, self._asked = signal.Signals(number).name, now


@contextmanager
def signal_handlers(then_exits: bool = False) -> Iterator[Signals]:
    """Inside, signals are remembered; leaving with another error after Ctrl-C raises KeyboardInterrupt instead.

    Afterwards the handlers are those of before, but for a process that `then_exits` on request: a late copy of the signal
    must not kill it before it has reported so.
    """
    signals = Signals()
    # A scheduler's signals are handled even if ignored at the start, as by a batch script that must outlive its ranks.
    handlers = {signal.SIGTERM: signals._ask_to_stop, signal.SIGUSR1: signals._ask_to_stop}
    if not is_ignored(signal.SIGHUP):
        handlers[signal.SIGHUP] = signals._ask_to_stop
    if not is_ignored(signal.SIGINT):
        handlers[signal.SIGINT] = signals._interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    except Exception:
        signals.check()
        raise
    finally:
        for number, handler in before.items():
            leaving = then_exits and signals.stop and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaving else handler)


def outlive_one_sigterm(_: int) -> None:
    """For reader processes: schedulers and terminals signal these too, while the trainer still needs a batch.

    The trainer ends them with a message, and those that do not react with further SIGTERMs.
    """
    received = 0

    def count(number: int, frame: object) -> None:
        nonlocal received
        received += 1
        if received > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, count)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
