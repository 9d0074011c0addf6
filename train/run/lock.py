"""A lock that one process at a time holds, released when the process ends."""

from pathlib import Path

from filelock import FileLock, Timeout

RUN_LOCK = "lock"  # in a run's folder: held by the main rank of the processes that train it


class ProcessLock:
    """A lock on a file. Acquire and release it in the same thread."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)
        self._held = False

    def acquire(self, timeout: float = 0.0) -> bool:
        """Whether it is held now; waits at most `timeout` seconds for the process that holds it."""
        if not self._held:
            try:
                self._lock.acquire(timeout=timeout, blocking=timeout > 0)
            except Timeout:
                return False
            except (OSError, NotImplementedError):
                pass  # a file system without locks, as on some clusters: go without one
            self._held = True
        return True

    def release(self) -> None:
        self._lock.release()
        self._held = False
