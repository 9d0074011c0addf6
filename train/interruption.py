"""Ctrl-C that is never lost.

Python raises KeyboardInterrupt wherever it stands, and drops it where it stands in the callback of a weak reference;
torch keeps many. The run would go on, or end a little later with an error that does not name the reason.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Remember Ctrl-C. What is yielded raises KeyboardInterrupt if one came; so does leaving with any other error."""
    came = False

    def remember(number, frame):
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
