"""A heartbeat of each rank, for the health check of a container (docker/powernap-health).

The watchdog ends a rank that waits too long for others; it cannot act if no thread of its process runs. Heartbeats show
just that: they continue however slow a step is, and stop with the process.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from powernap.parallel.liveness.watchdog import Progress

FOLDER = "POWERNAP_HEARTBEATS"  # environment: their folder; unset: no heartbeats
EVERY = 5.0  # seconds


@contextmanager
def beating(progress: Progress, rank: int) -> Iterator[None]:
    """Inside, a thread writes this rank's step into FOLDER/PID every few seconds; the file is deleted at the end."""
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    file, stopped = Path(folder) / str(os.getpid()), threading.Event()

    def beat() -> None:
        while True:
            with suppress(
                OSError
            ):  # such as a full disk: no reason to disturb a run, and the file's time still changes
                _overwrite(file, f"rank {rank}: {'starting' if progress.step is None else f'step {progress.step}'}\n")
            if stopped.wait(EVERY):
                return

    thread = threading.Thread(target=beat, name="powernap-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        with suppress(OSError):
            file.unlink()


def _overwrite(file: Path, line: str) -> None:
    """In place: emptied first, it could be read so."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(number, line.encode(), 0)
        os.truncate(number, len(line))
    finally:
        os.close(number)
