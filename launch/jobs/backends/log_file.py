"""A job's log as a growing file."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_SECONDS = 0.5


def read_log(path: Path, follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """The log in pieces, "" while there is nothing new; with `follow` until `is_over`. The file need not exist yet."""
    position = 0
    while True:
        over = not follow or is_over()  # before reading: the job's last lines come through
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                while piece := file.read(2**16):
                    position += len(piece)
                    yield piece.decode(errors="replace")
        if over:
            return
        yield ""
        time.sleep(POLL_SECONDS)
