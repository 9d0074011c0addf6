"""Batches of checked samples from WebDataset shards, in an order that depends on the seed and nothing else.

The order: shards are permuted anew for every epoch and dealt to `lanes` lanes; lane l reads shards l, l + lanes, ...
and mixes their samples in a buffer. Sample k of the whole run is the next one of lane k % lanes and goes to rank
k % world_size, where reader process w of W serves every W-th lane of the rank. So for a given number of lanes, global
batch s holds the same samples however many ranks and reader processes share the work, and a run goes on exactly by
skipping.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from powernap.train.data.read_shard import read_shard
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard_list import count_lanes, expand_shards
from powernap.train.tasks.sample import Sample

__all__ = ["Batch", "DataError", "evaluation_batches", "expand_shards", "training_batches"]


@dataclass(frozen=True)
class Batch:
    """Sequences of one rank, on the CPU."""

    tokens: torch.Tensor  # int64 [B, T]
    loss_mask: torch.Tensor  # bool [B, T]: True at tokens that are targets
    answers: list[np.ndarray]  # B arrays of rows (start, stop, depth)


def training_batches(
    shards: str | list[str],
    *,
    batch_size: int,
    sequence_length: int,
    vocab_size: int,
    rank: int,
    world_size: int,
    workers: int,
    lanes: int | None,
    seed: int,
    shuffle_buffer: int,
    skip_batches: int,
) -> Iterator[Batch]:
    """This rank's batches, endlessly, from the one after `skip_batches` on.

    Args:
        batch_size: sequences per rank.
        workers: reader processes of this rank; 0: read here.
        lanes: None for one per reader. Set it to keep the order when world_size or workers change.
        shuffle_buffer: samples that a lane mixes; 1: a shard's samples keep their order.

    Raises:
        DataError: at the first batch if shards or lanes do not fit, later if a shard cannot be read or does not fit.
    """
    shards = expand_shards(shards, "data.train")
    lanes = count_lanes(len(shards), lanes, world_size, workers)
    stream = LaneStream(
        shards,
        lanes=lanes,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        skip=skip_batches * batch_size,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
    )
    readers = DataLoader(
        stream,
        batch_size=None,  # single samples: torch takes them from the workers in turn
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=max(2, math.ceil(2 * batch_size / workers)) if workers else None,  # two batches ahead
        generator=torch.Generator(),  # its own: the model's random numbers must not depend on the readers
    )
    samples = iter(readers)
    try:
        while True:
            yield _collate([_raise_error(next(samples)) for _ in range(batch_size)])
    finally:
        del samples  # ends the reader processes, even while a traceback keeps this frame


def evaluation_batches(
    shards: str | list[str],
    *,
    batch_size: int,
    sequence_length: int,
    vocab_size: int,
    rank: int,
    world_size: int,
    limit: int,
) -> Iterator[Batch]:
    """The first `limit` samples in file order; sample k goes to rank k % world_size. The last batch may be smaller.

    Raises:
        DataError: if a shard is missing, cannot be read or does not fit.
    """
    files = itertools.chain.from_iterable(read_shard(shard) for shard in expand_shards(shards, "data.test"))
    samples = (decode(files, sequence_length, vocab_size) for files in itertools.islice(files, rank, limit, world_size))
    while batch := list(itertools.islice(samples, batch_size)):
        yield _collate(batch)


class LaneStream(IterableDataset):
    """The samples of one rank, or of one of its reader processes; a DataError comes as the last item.

    It is handed on as a value since torch would wrap an exception into pages of text.
    """

    def __init__(
        self,
        shards: list[str],
        *,
        lanes: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_buffer: int,
        skip: int,
        sequence_length: int,
        vocab_size: int,
    ):
        """`skip` counts this rank's samples."""
        super().__init__()
        self.shards = shards
        self.lanes = lanes
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skip = skip
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size

    def __iter__(self) -> Iterator[Sample | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = list(range(self.rank, self.lanes, self.world_size))
        # The rank's sample i comes from its lane i % len(own). After a skip the first one due is in the middle.
        due = [(self.skip + position) % len(own) for position in range(len(own))]
        try:
            streams = [self._read_lane(own[i], skip=_count(self.skip, i, len(own))) for i in due[worker::workers]]
            for stream in itertools.cycle(streams):
                yield decode(next(stream), self.sequence_length, self.vocab_size)
        except DataError as error:
            yield error

    def _read_lane(self, lane: int, skip: int) -> Iterator[dict[str, object]]:
        """Undecoded samples of a lane, endlessly, without the first `skip`."""
        return itertools.islice(self._epochs(lane), skip, None)

    def _epochs(self, lane: int) -> Iterator[dict[str, object]]:
        for epoch in itertools.count():
            order = list(self.shards)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            samples = itertools.chain.from_iterable(read_shard(shard) for shard in order[lane :: self.lanes])
            mix = shuffle(
                self.shuffle_buffer,
                initial=self.shuffle_buffer,
                rng=random.Random(f"{self.seed}/{epoch}/{lane}"),
            )
            yield from mix(samples)


def _count(total: int, position: int, step: int) -> int:
    """How many of the numbers 0 .. total - 1 are `position` modulo `step`."""
    return len(range(position, total, step))


def _raise_error(item: Sample | DataError) -> Sample:
    if isinstance(item, DataError):
        raise item
    return item


def _as_it_is(sample: Sample | DataError) -> Sample | DataError:
    return sample


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64)),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        answers=[sample.answers for sample in samples],
    )
