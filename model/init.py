"""The same initial weights in every layout."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_init(name: str) -> Iterator[None]:
    """Seed the initialisation inside with torch's seed and `name` alone.

    A pipeline stage with blocks 4 to 7 then draws the same weights for them as one process that builds all. Sharding
    over tensor ranks needs nothing more: on the CPU every rank draws the whole weight and keeps its slice.
    """
    seed = random.Random(f"{torch.initial_seed()}/{name}").getrandbits(63)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
