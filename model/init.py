"""The same weights at the start for every layout."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_init(name: str) -> Iterator[None]:
    """Draw what is initialised inside from torch's seed and `name` alone.

    A pipeline stage that builds blocks 4 to 7 then draws for them what one process draws that builds all. Sharding over
    tensor ranks needs nothing more: on the CPU every rank draws the whole weight and keeps its slice.
    """
    seed = random.Random(f"{torch.initial_seed()}/{name}").getrandbits(63)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
