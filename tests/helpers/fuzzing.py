"""Shared by tests with arbitrary input."""

import signal
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings

# The same examples in every run, and no deadline: parallel tests would slow this one down.
fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Touching:
    """What an attacker pickles: unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@contextmanager
def no_longer_than(seconds: int = 60):
    """A time limit for code that takes milliseconds."""

    def end(*_):
        raise SystemExit(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
