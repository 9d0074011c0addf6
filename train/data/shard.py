"""One shard with random access to its samples, and the fingerprint of a list of shards. Nothing here imports torch."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import (
    LONGEST_HEADER,
    MEMBERS,
    DataError,
    Location,
    read_lengths,
    read_loss_spans,
    tokens_header,
)
from powernap.train.data.shard_list import local_path
from powernap.train.data.tar_index import Damaged, Members, NotTar, no_samples


class Shard:
    """A shard as a sequence of samples, undecoded: `shard[i]` reads one from the file."""

    def __init__(self, name: str, path: Path | None, index: np.ndarray, damage: str | None = None):
        """
        Args:
            index: as tar_index.index_tar makes it.
            damage: what is wrong with the shard, if it has further samples that cannot be read.
        """
        self.name, self.path, self.damage = name, path, damage
        self._extents = index[:, :-1]
        self.parts = index[:, -1, 0]  # int64 [samples]: the number of each within its document
        self.tokens = index[:, -1, 1]  # int64 [samples]: of the documents in each; 0 if it is a sequence
        self._file = None if path is None else os.open(path, os.O_RDONLY)

    @classmethod
    def open(cls, name: str, cache: ShardCache, keep_readable: bool = False) -> "Shard":
        """Fetch a shard if it is remote, and find its samples.

        Args:
            name: a path or URL.
            keep_readable: keep the readable samples of a damaged shard, possibly none, and note the damage.

        Raises:
            DataError: naming the shard, if it cannot be opened, is no tar, is damaged or cut off, holds no sample, or
                does not match its manifest.
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
        return len(self._extents)

    def __getitem__(self, number: int) -> dict[str, object]:
        """A sample as WebDataset yields it: __key__, __url__ and the bytes of each member.

        Raises:
            DataError: if the file has become shorter.
        """
        members = [(suffix, *extent) for suffix, extent in zip(MEMBERS, self._extents[number].tolist(), strict=True)]
        members = [(suffix, offset, size) for suffix, offset, size in members if offset >= 0]
        sample: dict[str, object] = {"__url__": self.name, "__key__": _Key(self, number)}
        if members:
            start = min(offset for _, offset, _ in members)
            stop = max(offset + size for _, offset, size in members)
            data = self._read(start, stop - start)
            sample |= {suffix: data[offset - start : offset - start + size] for suffix, offset, size in members}
        return sample

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[number] for number in range(len(self)))

    def _read(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        data = os.pread(self._file, size, offset)
        if len(data) < size:
            raise DataError(f"{self.name}: has become shorter while it was read: build or copy it again")
        return data

    @property
    def holds_documents(self) -> bool:
        """Whether its samples are documents, to be cut into sequences; else they are sequences."""
        return bool(len(self.tokens) and self.tokens[0])

    @property
    def has_loss_spans(self) -> bool:
        """Whether some tokens of its documents bear no loss."""
        return bool((self._extents[:, MEMBERS.index("loss_spans.npy"), 0] >= 0).any())

    def read_tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """tokens[start:stop] of a sample of documents, without reading the others. Raises DataError."""
        offset, size = self._extents[number, MEMBERS.index("tokens.npy")].tolist()
        location = self.location(number)
        first, dtype, tokens = tokens_header(self._read(offset, min(size, LONGEST_HEADER)), size, location)
        if stop > tokens:  # the index is of another file
            raise DataError(f"{location} has {tokens:,} tokens, not {self.tokens[number]:,}: build the shard again")
        return np.frombuffer(
            self._read(offset + first + start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype
        )

    def lengths(self, number: int) -> np.ndarray:
        """int64 [d]: the tokens of each document of a sample. Raises DataError."""
        return read_lengths(self._member(number, "lengths.npy"), int(self.tokens[number]), self.location(number))

    def loss_spans(self, number: int) -> np.ndarray:
        """int64 [s, 2]: rows (start, stop) of the loss tokens of a sample of documents. Raises DataError."""
        tokens = int(self.tokens[number])
        if self._extents[number, MEMBERS.index("loss_spans.npy"), 0] < 0:
            return np.array([[0, tokens]])
        return read_loss_spans(self._member(number, "loss_spans.npy"), tokens, self.location(number))

    def _member(self, number: int, member: str) -> bytes:
        offset, size = self._extents[number, MEMBERS.index(member)].tolist()
        return self._read(offset, size) if offset >= 0 else b""

    def location(self, number: int) -> Location:
        """A sample's shard and key, for messages."""
        return Location({"__url__": self.name, "__key__": _Key(self, number)})

    def key(self, number: int) -> str:
        """A sample's key, for messages: reads all headers again."""
        return self.keys([number])[0]

    def keys(self, numbers: list[int]) -> list[str]:
        """The keys of samples; reads all headers again, once for all of them."""
        keys = {number: f"number {number}" for number in numbers}
        owners = {int(offset): n for n in numbers if n < len(self) for offset in self._extents[n, :, 0] if offset >= 0}
        assert self.path is not None
        with suppress(OSError, NotTar), open(self.path, "rb") as file:
            for key, _, offset, _ in Members(file):
                if offset in owners:
                    keys[owners[offset]] = key
        return [keys[number] for number in numbers]

    def __del__(self):
        if (file := getattr(self, "_file", None)) is not None:
            os.close(file)


class _Key:
    """A sample's key, looked up when it is formatted."""

    def __init__(self, shard: Shard, number: int):
        self.shard, self.number = shard, number

    def __str__(self) -> str:
        return self.shard.key(self.number)


def fingerprint(shards: Sequence[str]) -> str:
    """A hash of a list of shards: their names and, of local files, the size and two blocks of each.

    Folders and URL queries do not count: data may be moved, and links signed again.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(os.path.basename(shard.partition("?")[0]).encode() + b"\0")
        path = local_path(shard)
        if path is not None:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with open(path, "rb") as file:
                for offset in (0, size // 2):
                    file.seek(offset)
                    digest.update(file.read(1 << 14))
    return digest.hexdigest()[:32]
