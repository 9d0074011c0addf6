"""Processes that must not outlive the one that started them: ranks their launcher, commands the demo, a job its supervisor.

Who is killed tells nobody, and what it started would train on unseen with the run's lock. So each of these processes looks
whether that one is still there. The signal that Linux offers for it (PR_SET_PDEATHSIG) comes when a *thread* of the parent
ends, and not at all if that was before it was asked for.

A process that a shell or a terminal started may outlive it: nohup and disown are there for that.
"""

import logging
import os
import signal
import threading
import time

PARENT = "POWERNAP_PARENT"  # environment: the number of the process not to outlive
EVERY = 0.5  # seconds

gone = threading.Event()  # set when it is: ranks that still wait for each other to join cannot agree to stop

logger = logging.getLogger("powernap")


def not_to_outlive_this() -> dict[str, str]:
    """The environment of processes that `follow_parent` as soon as they run."""
    return {PARENT: str(os.getpid())}


def follow_parent() -> None:
    """Have this process asked to stop, by SIGUSR1, when the one that it must not outlive is gone.

    That is the one that PARENT names, or a torchrun of the user's own.
    """
    number: str | int | None = os.environ.pop(PARENT, None)  # what this process starts has another parent
    if number is None and "TORCHELASTIC_RUN_ID" in os.environ:
        number = os.getppid()
    if number is not None:
        threading.Thread(target=_follow, args=(int(number),), name="powernap-parent", daemon=True).start()


def _follow(number: int) -> None:
    import psutil  # late: most commands follow nobody

    try:
        parent = psutil.Process(number)
        # One that nobody has waited for yet is a zombie.
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(EVERY)
    except psutil.NoSuchProcess:
        pass
    who = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    logger.warning("%sprocess %d, which started this one, is gone: stopping", who, number)
    gone.set()
    os.kill(os.getpid(), signal.SIGUSR1)
