"""What of a parameter and its optimizer states one data-parallel rank has."""

from typing import NamedTuple

MASTER = "master"  # float32 weights, among the names of optimizer states
EMA = "ema"  # their running mean


class Fragment(NamedTuple):
    """The part of a parameter that one data-parallel rank updates: a range of the flattened tensor-parallel shard."""

    partition: int  # index among this rank's
    offset: int  # in that partition
    start: int  # in the shard
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start
