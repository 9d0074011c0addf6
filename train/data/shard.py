"""One shard: its samples, any of which can be read at once, and a list of shards' fingerprint. Nothing here imports torch."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import MEMBERS, DataError
from powernap.train.data.shard_list import local_path
from powernap.train.data.tar_index import Damaged, Members, NotTar, no_samples


class Shard:
    """A shard as a sequence of samples, undecoded: `shard[i]` reads one from the file."""

    def __init__(self, name: str, path: Path | None, index: np.ndarray, damage: str | None = None):
        """
        Args:
            index: as tar_index.index_tar makes it.
            damage: what is wrong with the shard: it has more samples, which cannot be read.
        """
        self.name, self.path, self.damage = name, path, damage
        self._places, self._parts = index[:, :-1], index[:, -1, 0]
        self._file = None if path is None else os.open(path, os.O_RDONLY)

    @classmethod
    def open(cls, name: str, cache: ShardCache, keep_readable: bool = False) -> "Shard":
        """Fetch a shard if it is remote, and find its samples.

        Args:
            name: a path or URL.
            keep_readable: of a shard that cannot be read, or not to its end, take what can be, and note the damage.

        Raises:
            DataError: naming the shard, if it cannot be opened, is no tar, is damaged or cut off, holds no sample, or is not
                the one that its manifest records.
        """
        try:
            try:
                path, index = cache.fetch(name, keep_damaged=keep_readable)
                return cls(name, path, index)
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None
        except Damaged as damage:
            if not keep_readable:
                raise
            return cls(name, damage.path, damage.index, str(damage))
        except DataError as damage:
            if not keep_readable:
                raise
            return cls(name, None, no_samples(), str(damage))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, object]:
        """A sample as WebDataset hands it out: __key__, __url__ and the bytes of each member.

        Raises:
            DataError: if the file has become shorter.
        """
        places = [(suffix, *place) for suffix, place in zip(MEMBERS, self._places[number].tolist(), strict=True)]
        places = [(suffix, offset, size) for suffix, offset, size in places if offset >= 0]
        sample: dict[str, object] = {"__url__": self.name, "__key__": _Key(self, number)}
        if places:
            start = min(offset for _, offset, _ in places)
            stop = max(offset + size for _, offset, size in places)
            assert self._file is not None
            data = os.pread(self._file, stop - start, start)
            if len(data) < stop - start:
                raise DataError(f"{self.name}: has become shorter while it was read: build or copy it again")
            sample |= {suffix: data[offset - start : offset - start + size] for suffix, offset, size in places}
        return sample

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[number] for number in range(len(self)))

    @property
    def documents(self) -> np.ndarray:
        """The first sample of each document, in rising order."""
        return np.flatnonzero(self._parts == 0)

    def begins_document(self, number: int) -> bool:
        return bool(self._parts[number] == 0)

    def key(self, number: int) -> str:
        """A sample's name. Reads all headers again: for messages."""
        return self.keys([number])[0]

    def keys(self, numbers: list[int]) -> list[str]:
        """The names of samples; reads all headers again, once for all of them."""
        found = {number: f"number {number}" for number in numbers}
        owners = {int(offset): n for n in numbers if n < len(self) for offset in self._places[n, :, 0] if offset >= 0}
        assert self.path is not None
        with suppress(OSError, NotTar), open(self.path, "rb") as file:
            for key, _, offset, _ in Members(file):
                if offset in owners:
                    found[owners[offset]] = key
        return [found[number] for number in numbers]

    def __del__(self):
        if (file := getattr(self, "_file", None)) is not None:
            os.close(file)


class _Key:
    """A sample's name, looked up when somebody writes it."""

    def __init__(self, shard: Shard, number: int):
        self.shard, self.number = shard, number

    def __str__(self) -> str:
        return self.shard.key(self.number)


def fingerprint(shards: Sequence[str]) -> str:
    """What tells one list of shards from another: names, sizes and, of local files, two pieces of each.

    Folders do not count, nor what a URL carries behind a question mark: data may be moved and links signed anew.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(os.path.basename(shard.partition("?")[0]).encode() + b"\0")
        path = local_path(shard)
        if path is not None:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with open(path, "rb") as file:
                for place in (0, size // 2):
                    file.seek(place)
                    digest.update(file.read(1 << 14))
    return digest.hexdigest()[:32]
