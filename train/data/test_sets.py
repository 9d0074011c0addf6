"""Test shards by name and by length: an entry of data.test may hold longer sequences than the training. No torch here."""

from powernap.train.config import DataConfig
from powernap.train.data.cache import cache_of
from powernap.train.data.manifest import read_manifest
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards, local_path


def named_tests(data: DataConfig) -> dict[str, DataConfig]:
    """`data` with each of its test sets alone, by name; a single one has an empty name."""
    return {name: data.model_copy(update={"test": shards}) for name, shards in data.tests.items()}


def test_sets(data: DataConfig) -> list[DataConfig]:
    """`data` with the test shards of one length each: first those of data.sequence_length, then others by length.

    The shards of an entry of data.test hold sequences of one length. The first entry's is data.sequence_length, and so is
    that of documents, which are cut to it.

    Raises:
        DataError: if an entry names no shards, or its first one cannot be read.
    """
    assert isinstance(data.test, str | list), "one of named_tests"
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


def is_test(field: str) -> bool:
    """Whether a recipe's field names test shards."""
    return field == "data.test" or field.startswith("data.test.")


def test_tokens_per_byte(data: DataConfig) -> float | None:
    """Loss tokens per byte of the held-out text, of which a manifest counts both; None if none does, or several do otherwise."""
    assert isinstance(data.test, str | list), "one of named_tests"
    found = set()
    for name in expand_shards(data.test, "data.test"):
        path = local_path(name)
        try:
            split = (read_manifest(path).get("splits") or {}).get("test") if path else None
        except DataError:
            split = None
        counts = [split.get(key) if isinstance(split, dict) else None for key in ("tokens", "text_bytes")]
        found.add(tuple(counts))
    ((tokens, size),) = found if len(found) == 1 else [(None, None)]
    return tokens / size if type(tokens) is int and type(size) is int and size > 0 else None
