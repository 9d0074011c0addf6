"""Exact duplicates among the documents of a build, by the hash of their tokens; left out of shards that are written already.

Each job of a build writes the hash of every document in its shards, in order. Once all are there, the first document of
each hash stays, and shards that hold others are written again: with the bytes that they would have if these had not been
in the input. So the result is the same on any number of cores and machines.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from powernap.train.data.bundle import Bundle
from powernap.train.data.manifest import SPLITS
from powernap.train.data.sample import Documents
from powernap.train.data.shard import Shard
from powernap.train.data.tar_index import index_tar

HASH = np.dtype(
    [("first", "<u8"), ("second", "<u8")]
)  # 128 bits: two of 10^12 documents share one by chance 1 in 10^14
SORTED = 2**24  # hashes that are sorted at once, for which 40 bytes each are held


def hash_file(folder: Path, split: str, number: int) -> Path:
    """The file with the hashes of the documents in a job's shard, which there is while a folder is being built."""
    return folder / f"{split}-{number:06d}.hashes"


def find_duplicates(folder: Path, jobs: int) -> dict[int, dict[str, np.ndarray]]:
    """Which documents repeat one of an earlier job, or an earlier one of the same shard: job -> split -> bool [documents].

    Jobs without such documents are left out.
    """
    shards = [(n, split) for n in range(jobs) for split in SPLITS if hash_file(folder, split, n).exists()]
    if not shards:
        return {}
    files = [hash_file(folder, split, n) for n, split in shards]
    counts = np.array([path.stat().st_size // HASH.itemsize for path in files], dtype=np.int64)
    ends = counts.cumsum()
    repeated = np.zeros(counts.sum(), dtype=bool)
    buckets = max(1, -(-len(repeated) // SORTED))
    for bucket in range(buckets):
        hashes, places = [], []
        for path, start in zip(files, ends - counts, strict=True):
            here = np.fromfile(path, HASH)
            chosen = np.flatnonzero(here["first"] % buckets == bucket)
            hashes.append(here[chosen])
            places.append(chosen + start)
        together, place = np.concatenate(hashes), np.concatenate(places)
        order = np.lexsort((place, together["second"], together["first"]))
        same = together[order][1:] == together[order][:-1]
        repeated[place[order][1:][same]] = True
    found: dict[int, dict[str, np.ndarray]] = {}
    for (number, split), which in zip(shards, np.split(repeated, ends[:-1]), strict=True):
        if which.any():
            found.setdefault(number, {})[split] = which
    return found


def without(path: Path, repeated: np.ndarray) -> Iterator[tuple[str, Documents]]:
    """Key within its split and sample of the documents of a shard that are not `repeated`, bundled anew."""
    shard = Shard(path.name, path, index_tar(path, path.name))
    bundle: Bundle | None = None
    document = -1
    for number, part in enumerate(shard.parts.tolist()):
        tokens = shard.read_tokens(number, 0, int(shard.tokens[number]))
        bears_loss = np.zeros(len(tokens) + 1, dtype=bool)
        for start, stop in shard.loss_spans(number).tolist():
            bears_loss[start:stop] = True
        bundle = bundle or Bundle(tokens.dtype)
        ends = number + 1 == len(shard) or shard.parts[number + 1] == 0
        stops = shard.lengths(number).cumsum()
        for start, stop in zip((0, *stops), stops, strict=False):
            document += not part
            if not repeated[document]:
                for first, last in _runs(bears_loss, int(start), int(stop)):
                    yield from bundle.add(tokens[first:last], bool(ends and last == stop), bool(bears_loss[first]))
    if bundle:
        yield from bundle.rest()


def _runs(bears_loss: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """start..stop-1 in stretches of tokens that all bear loss, or all bear none."""
    borders = [start, *(np.flatnonzero(np.diff(bears_loss[start:stop])) + start + 1).tolist(), stop]
    yield from zip(borders, borders[1:], strict=False)
