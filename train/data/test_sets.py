"""Test shards by length: an entry of data.test may hold longer sequences than the training. Nothing here imports torch."""

from powernap.train.config import DataConfig
from powernap.train.data.cache import cache_of
from powernap.train.data.sample import decode
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards


def test_sets(data: DataConfig) -> list[DataConfig]:
    """`data` with the test shards of one length each: first those of data.sequence_length, then others by length.

    The shards of an entry of data.test hold sequences of one length. The first entry's is data.sequence_length, and so is
    that of documents, which are cut to it.

    Raises:
        DataError: if an entry names no shards, or its first one cannot be read.
    """
    assert data.test is not None
    expand_shards(data.test, "data.test")  # none is named twice
    first, *others = [data.test] if isinstance(data.test, str) else data.test
    by_length: dict[int, list[str]] = {data.sequence_length: [first]}
    for entry in others:
        length = stored_length(expand_shards(entry, "data.test")[0], data)
        by_length.setdefault(length or data.sequence_length, []).append(entry)
    lengths = [data.sequence_length, *sorted(by_length.keys() - {data.sequence_length})]
    return [data.model_copy(update={"test": by_length[length], "sequence_length": length}) for length in lengths]


def stored_length(name: str, data: DataConfig) -> int | None:
    """The tokens of a shard's sequences; None if it holds documents. Raises DataError if it cannot be read."""
    shard = Shard.open(name, cache_of(data))
    return None if shard.holds_documents else len(decode(shard[0]).tokens)
