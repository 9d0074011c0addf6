"""The order of training samples: a function of the shards, the seed and a sample's number in the run, and nothing else.

Sample k of a run is the next one of lane k % lanes. In each epoch the shards are permuted and dealt to the lanes; a lane
reads its shards one after the other, each shuffled within stretches of `shuffle_buffer` samples. A lane that has
finished its shards begins the next epoch, so lanes of different lengths drift apart, and none ever runs dry.

With `whole_documents`, documents are shuffled, not samples: the parts of one follow each other in a lane.

With several datasets, sample k belongs to one of them by the weights, and is that dataset's next sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from powernap.train.data.sample import DataError
from powernap.train.data.sequences import Sequences

EMPTY_AT_MOST = 100  # shards in a row that a lane finds unreadable before it gives up
PERIOD = 1000  # samples over which a mixture meets its weights exactly


class Cursor(NamedTuple):
    """A position to resume a lane from: the start of one of its shards."""

    epoch: int = 0
    turn: int = 0  # which of the lane's shards in that epoch
    before: int = 0  # samples of the lane before that shard


@dataclass(frozen=True)
class Order:
    """How the shards of a dataset are shuffled."""

    shards: tuple[str, ...]
    lanes: int
    seed: int
    shuffle_buffer: int
    whole_documents: bool = False

    def turns(self, lane: int, epoch: int) -> list[int]:
        """The shards that a lane reads in an epoch, by number."""
        return _permutation(len(self.shards), self.seed, epoch)[lane :: self.lanes].tolist()

    def within(self, number: int, shard: Sequences, epoch: int) -> np.ndarray:
        """The order in which the samples of shard `number` are read in an epoch."""
        if not self.whole_documents:
            return self._shuffle(number, len(shard), epoch)
        documents = np.split(np.arange(len(shard)), shard.documents[1:])
        shuffled = [documents[i] for i in self._shuffle(number, len(documents), epoch)]
        return np.concatenate(shuffled)

    def _shuffle(self, shard: int, samples: int, epoch: int) -> np.ndarray:
        """A random order of a shard's samples or documents. The offset of its stretches is random, too."""
        if self.shuffle_buffer >= samples:
            return _permutation(samples, self.seed, epoch, shard)
        if self.shuffle_buffer == 1:
            return np.arange(samples)
        random = _random(self.seed, epoch, shard)
        first = random.randint(1, self.shuffle_buffer + 1)
        borders = range(first, samples, self.shuffle_buffer)
        return np.concatenate([random.permutation(part) for part in np.split(np.arange(samples), borders)])


class Lane:
    """A lane's samples by number, in rising order."""

    def __init__(self, order: Order, lane: int, cursor: Cursor, open_shard: Callable[[str, str | None], Sequences]):
        """
        Args:
            open_shard: opens a shard; its second argument is the lane's next shard in this epoch, if any. Shards
                without samples are passed over.
        """
        self.cursor = cursor
        self._order, self._lane, self._open_shard = order, lane, open_shard
        self._turns = order.turns(lane, cursor.epoch)
        self._empty = 0  # shards in a row without a sample
        self._enter()

    def find(self, number: int) -> tuple[Sequences, int]:
        """The shard that holds the lane's sample `number`, and the sample's number in it."""
        assert number >= self.cursor.before, "a lane only goes forward"
        while number >= self.cursor.before + len(self.shard):
            epoch, turn, before = self.cursor
            self.cursor = Cursor(epoch, turn + 1, before + len(self.shard))
            self._empty = 0 if len(self.shard) else self._empty + 1
            if self._empty > max(EMPTY_AT_MOST, 4 * len(self._order.shards)):
                raise DataError(f"no sample can be read from {self.shard.name} and others: build the shards again")
            if self.cursor.turn == len(self._turns):
                self.cursor = Cursor(epoch + 1, 0, self.cursor.before)
                self._turns = self._order.turns(self._lane, epoch + 1)
            self._enter()
        return self.shard, int(self._shuffled[number - self.cursor.before])

    def _enter(self) -> None:
        shard = self._turns[self.cursor.turn]
        names = [self._order.shards[shard] for shard in self._turns[self.cursor.turn :][:2]]
        self.shard = self._open_shard(names[0], names[1] if len(names) > 1 else None)
        self._shuffled = self._order.within(shard, self.shard, self.cursor.epoch)


@dataclass(frozen=True)
class Mixture:
    """Which dataset each sample of a run belongs to: in every 1000 samples, each has its share, in random order."""

    weights: tuple[float, ...]
    seed: int

    def locate(self, number: int) -> tuple[int, int]:
        """Sample `number` of the run: its dataset, and its number among the samples of that dataset."""
        if len(self.weights) == 1:
            return 0, number
        period, place = divmod(number, PERIOD)
        datasets, numbers = _period(self.quotas, self.seed, period)
        dataset = int(datasets[place])
        return dataset, period * self.quotas[dataset] + int(numbers[place])

    @property
    def quotas(self) -> tuple[int, ...]:
        """Samples of each dataset in a period; rounded so that they add up."""
        return _quotas(self.weights)


@lru_cache(maxsize=16)
def _quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    exact = np.array(weights, dtype=np.float64) * (PERIOD / sum(weights))
    quotas = np.floor(exact).astype(int)
    largest_rest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest_rest[: PERIOD - quotas.sum()]] += 1
    return tuple(quotas.tolist())


@lru_cache(maxsize=16)
def _period(quotas: tuple[int, ...], seed: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    datasets = _random(seed, period, len(quotas)).permutation(np.repeat(np.arange(len(quotas)), quotas))
    numbers = np.zeros(PERIOD, dtype=int)
    for dataset, quota in enumerate(quotas):
        numbers[datasets == dataset] = np.arange(quota)
    return datasets, numbers


def _permutation(count: int, *seed: int) -> np.ndarray:
    return _random(*seed).permutation(count)


def _random(*seed: int) -> np.random.RandomState:
    """Legacy RandomState: NumPy guarantees its stream in every version, so a run can be resumed years later."""
    return np.random.RandomState(np.array(seed, dtype=np.uint32))
