"""One shard: which samples lie in it and where, so that any of them can be read at once. Nothing here imports torch.

A tar has no index. Ours is made by reading its headers once, and kept in the cache: a run that goes on in the middle of a
million samples must not read the half before.

A document longer than a sequence is several samples in a row, whose keys end in -part000000, -part000001 and so on. Any
other sample is a document by itself.
"""

import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import MEMBERS, DataError
from powernap.train.data.shard_list import local_path

END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # a tar file ends with two blocks of zeros
LONGEST_HEADER = 1 << 14  # of those that carry a long name; tarfile would read as much as one claims
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
LARGEST_SAMPLE = 1 << 30  # bytes of all members, read at once
_PART = re.compile(r"(.*)-part(\d{1,9})")  # a key as document and part
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # a sample's key and its member's suffix, as WebDataset splits names


class Shard:
    """A shard as a sequence of samples, undecoded: `shard[i]` reads one from the file."""

    def __init__(self, name: str, path: Path | None, index: np.ndarray, damage: str | None = None):
        """
        Args:
            index: as `index_tar` makes it.
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
            DataError: naming the shard, if it cannot be opened, is no tar, is damaged or cut off, or holds no sample.
        """
        try:
            path = cache.fetch(name)
            try:
                kept = cache.index_file(path)
                index = _load(kept, path.stat().st_size)
                if index is None:
                    index = index_tar(path, name)
                    _save(kept, index)
                return cls(name, path, index)
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None
        except _Damaged as damage:
            if not keep_readable:
                raise
            return cls(name, path, damage.index, str(damage))
        except DataError as damage:
            if not keep_readable:
                raise
            return cls(name, None, _index([], name), str(damage))

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
        with suppress(OSError, _NotTar), open(self.path, "rb") as file:
            for key, _, offset, _ in _Members(file):
                if offset in owners:
                    found[owners[offset]] = key
        return [found[number] for number in numbers]

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(self._file)


class _Key:
    """A sample's name, looked up when somebody writes it."""

    def __init__(self, shard: Shard, number: int):
        self.shard, self.number = shard, number

    def __str__(self) -> str:
        return self.shard.key(self.number)


class _Damaged(DataError):
    """A shard of which only the first samples can be read."""

    def __init__(self, message: str, index: np.ndarray):
        super().__init__(message)
        self.index = index


class _NotTar(Exception):
    """Where a tar file breaks off, or is none."""


class _Header(tarfile.TarInfo):
    """A member's header, refused where tarfile would go backwards or read without limit."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > LONGEST_HEADER and header.type in _EXTENDED):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


class _Members:
    """The (key, suffix, offset, size) of all files in a tar that a sample may be made of. Nothing is unpacked.

    Raises:
        _NotTar: where it breaks off.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.end = 0  # where the tar ends, once all members have been seen

    def __iter__(self) -> Iterator[tuple[str, str, int, int]]:
        total = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=_Header) as tar:
                for member in tar:
                    # An extended header may have changed the size.
                    if not 0 <= member.offset < tar.offset or not 0 <= member.size <= total:
                        raise tarfile.ReadError(f"a header claims {member.size} bytes")
                    name = member.name if member.name.isprintable() else ascii(member.name)[1:-1]
                    split = _NAME.fullmatch(name)
                    if member.isfile() and not member.issparse() and split:
                        yield split[1], split[2].lower(), member.offset_data, member.size
                    tar.members = []  # tarfile would keep them all
                self.end = tar.offset
        except OSError:
            raise
        except Exception as error:  # TarError, and others that tarfile lets through, such as IndexError
            raise _NotTar(" ".join(str(error).split())) from None


def index_tar(path: Path, name: str) -> np.ndarray:
    """Where the samples of a tar file lie, and which documents they make up.

    int64 [samples, members + 1, 2]: offset and size of each of sample.MEMBERS, offset -1 where one is missing; then the
    number of the part of its document that the sample is, and 0.

    Python's tarfile takes a cut between two members or a damaged header for the end. So what comes after the end it found
    is compared with what should: two blocks of zeros or more, and nothing else.

    Raises:
        DataError: naming the shard, if it is no tar, is damaged or cut off, holds no sample, or not all parts of a document
            in order.
    """
    members: list[tuple[str, str, int, int]] = []
    with open(path, "rb") as file:
        found = _Members(file)
        try:
            for member in found:
                members.append(member)
        except _NotTar as error:
            reason = f"{name}: cannot be read (not a whole tar file: {error})"
            raise _Damaged(reason, _index(members, name, whole=False)) from None
        end = found.end
        total = file.seek(0, io.SEEK_END)
        file.seek(end)
        rest = iter(lambda: file.read(1 << 20), b"")
        if any(block.strip(b"\0") for block in rest):
            reason = f"{name}: damaged after {end} bytes, or several tars in one: build or copy it again"
            raise _Damaged(reason, _index(members, name, whole=False))
        if total < end + END_OF_ARCHIVE:
            reason = f"{name}: cut off after {total} bytes: build or copy it again"
            raise _Damaged(reason, _index(members, name, whole=False))
    index = _index(members, name)
    if not len(index):
        raise DataError(f"{name}: holds no sample: build it again, or take it out of the list")
    return index


def _index(members: list[tuple[str, str, int, int]], name: str, whole: bool = True) -> np.ndarray:
    """Group members into samples: neighbours with the same key. Of a tar that is not `whole`, the last may be half."""
    samples, before = [], None
    for key, group in itertools.groupby(members, key=lambda member: member[0]):
        found: dict[str, tuple[int, int]] = {}
        for _, suffix, offset, size in group:
            if suffix in found:
                raise DataError(f"{name}: sample {key} has two members .{suffix}: build it again")
            found[suffix] = (offset, size)
        if sum(size for _, size in found.values()) > LARGEST_SAMPLE:
            raise DataError(f"{name}: sample {key} is larger than {LARGEST_SAMPLE:,} bytes: build it again")
        document, part = _document(key)
        if part and before != (document, part - 1):
            raise DataError(f"{name}: sample {key} does not follow part {part - 1} of its document: build it again")
        before = document, part
        samples.append([*(found.get(suffix, (-1, 0)) for suffix in MEMBERS), (part, 0)])
    if not whole:
        samples = samples[:-1]
    return np.array(samples, dtype=np.int64).reshape(len(samples), len(MEMBERS) + 1, 2)


def _document(key: str) -> tuple[str, int]:
    """A sample's document, and which part of it the sample is."""
    match = _PART.fullmatch(key)
    return (match[1], int(match[2])) if match else (key, 0)


def fingerprint(shards: list[str]) -> str:
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


def _load(file: Path, shard_size: int) -> np.ndarray | None:
    """A kept index, if there is one that can be of such a shard; whatever else lies there is passed over."""
    try:
        # Mapped: nothing is allocated for numbers that the file does not hold, and objects cannot be.
        index = np.array(np.lib.format.open_memmap(file, mode="r"))
    except Exception:  # none yet, half a file, and what NumPy's parser of headers lets through
        return None
    if index.dtype != np.int64 or index.shape[1:] != (len(MEMBERS) + 1, 2) or not len(index):
        return None
    offsets, sizes, parts = index[:, :-1, 0], index[:, :-1, 1], index[:, -1, 0]
    fits = (offsets >= -1) & (offsets <= shard_size) & (sizes >= 0) & (sizes <= shard_size - offsets.clip(0))
    return index if fits.all() and (parts >= 0).all() else None


def _save(file: Path, index: np.ndarray) -> None:
    """Keep it if we can: a cache that cannot be written only costs time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        with open(unfinished, "wb") as opened:
            np.save(opened, index)
        unfinished.rename(file)
