"""Processes that must not outlive the one that started them: ranks their launcher, commands the demo, a job its supervisor.

A killed process notifies nobody, and its children would keep training unseen and hold the run's lock. So each child
polls whether its parent is still there. Linux's signal for this (PR_SET_PDEATHSIG) comes when a *thread* of the parent
ends, and not at all if that was before it was requested.

A process started by a shell or a terminal may outlive it: that is what nohup and disown are for.
"""

import logging
import os
import signal
import threading
import time

PARENT = "POWERNAP_PARENT"  # environment: PID of the process not to outlive
EVERY = 0.5  # seconds

gone = threading.Event()  # set when the parent is: ranks that are still joining cannot agree to stop

logger = logging.getLogger("powernap")


def not_to_outlive_this() -> dict[str, str]:
    """Environment for processes that call `follow_parent` when they start."""
    return {PARENT: str(os.getpid())}


def follow_parent() -> None:
    """Send this process SIGUSR1, a request to stop, when the process that it must not outlive is gone.

    That is the one in PARENT, or the user's own torchrun.
    """
    number: str | int | None = os.environ.pop(PARENT, None)  # this process's children have another parent
    if number is None and "TORCHELASTIC_RUN_ID" in os.environ:
        number = os.getppid()
    if number is not None:
        threading.Thread(target=_follow, args=(int(number),), name="powernap-parent", daemon=True).start()


def _follow(number: int) -> None:
    import psutil  # late: most commands follow no parent

    try:
        parent = psutil.Process(number)
        # A dead parent that has not been reaped yet is a zombie.
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(EVERY)
    except psutil.NoSuchProcess:
        pass
    who = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    logger.warning("%sprocess %d, which started this one, is gone: stopping", who, number)
    gone.set()
    os.kill(os.getpid(), signal.SIGUSR1)
