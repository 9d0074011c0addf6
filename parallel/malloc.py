"""The C library's allocator while a model is built."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
USUAL = 32 * 2**20  # bytes: up to here glibc raises its threshold by itself


@contextmanager
def freed_memory_returned(threshold: int = 2**20) -> Iterator[None]:
    """Inside, blocks of more than `threshold` bytes go back to the system when they are freed.

    glibc would keep them for later and cut them up: where whole weights come and go and parts stay, a rank's memory grew to
    three times its part (tests/train/run/test_memory_at_start.py). Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        yield
        return
    mallopt(M_MMAP_THRESHOLD, threshold)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, USUAL)
        mallopt(M_TRIM_THRESHOLD, 2 * USUAL)  # as glibc sets it with that threshold
