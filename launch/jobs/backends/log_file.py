"""A job's log as a file that grows."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

EVERY = 0.5  # seconds between looks


def read_log(path: Path, follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """A log's text in pieces, "" where there is nothing new; with `follow` until `is_over`, also if the file is not there yet."""
    position = 0
    while True:
        over = not follow or is_over()  # asked first: what it printed last is read after
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                while piece := file.read(2**16):
                    position += len(piece)
                    yield piece.decode(errors="replace")
        if over:
            return
        yield ""
        time.sleep(EVERY)
