"""An index of the samples in a tar, for random access. Nothing here imports torch.

A tar has no index. Ours is built by reading its headers once, and cached, or lies beside the shard: a run that resumes in
the middle of a million samples must not read the half before.

A document longer than a sample is several samples in a row, whose keys end in -part000000, -part000001 and so on. Any
other sample is a document of its own, or holds several whole ones.
"""

import hashlib
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from powernap.train.data.sample import LONGEST_HEADER as LONGEST_NPY_HEADER
from powernap.train.data.sample import MEMBERS, DataError, read_lengths, read_loss_spans, tokens_header

END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # a tar file ends with two blocks of zeros
LONGEST_HEADER = 1 << 14  # bytes of one that carries a long name; tarfile would read any size that it claims
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# First bytes, in lower case, of what servers and tools leave in place of a tar.
_OTHERS = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"version https://git-lfs": "a Git LFS pointer",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"bzh": "a bzip2 file",
    b"\xfd7zxz": "an xz file",
    b"pk\3\4": "a zip file",
}
LARGEST_SAMPLE = 1 << 30  # bytes of all members, read at once
_PART = re.compile(r"(.*)-part(\d{1,9})")  # a key as document and part
_MAGIC = b"powernap index 1\n"  # an index beside a shard; another number if its rows are others
_HASH = 32  # bytes
_ROW = 8 * 2 * (len(MEMBERS) + 1)  # bytes
_BLOCK = 1 << 14
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # a sample's key and its member's suffix, as WebDataset splits names


class Damaged(DataError):
    """A shard of which only the first samples, those in `index`, can be read: from the file `path`, if it is kept."""

    def __init__(self, message: str, index: np.ndarray, path: Path | None = None):
        super().__init__(message)
        self.index, self.path = index, path


class NotTar(Exception):
    """A tar file breaks off, or is not one."""


class _Header(tarfile.TarInfo):
    """A member's header, refused where tarfile would go backwards or read without limit."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > LONGEST_HEADER and header.type in _EXTENDED):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


class Members:
    """The (key, suffix, offset, size) of all files in a tar that may belong to a sample. Nothing is unpacked.

    Raises:
        NotTar: where it breaks off.
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
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                self.end = tar.offset
        except OSError:
            raise
        except Exception as error:  # TarError, and others that tarfile lets through, such as IndexError
            raise NotTar(" ".join(str(error).split())) from None


def index_tar(path: Path, name: str) -> np.ndarray:
    """The positions of the samples in a tar file, and the documents they make up.

    int64 [samples, members + 1, 2]: offset and size of each of sample.MEMBERS, offset -1 where one is missing; then the
    sample's part number within its document, and the tokens of its documents, 0 if it is a sequence.

    Python's tarfile mistakes a cut between two members, or a damaged header, for the end. So the bytes after that end
    are checked: they must be two or more blocks of zeros, and nothing else.

    Raises:
        DataError: naming the shard, if it is no tar, is damaged or cut off, holds no sample, or not all parts of a document
            in order.
    """
    members: list[tuple[str, str, int, int]] = []
    with open(path, "rb") as file:
        tar = Members(file)
        try:
            for member in tar:
                members.append(member)
        except NotTar as error:
            file.seek(0)
            what = not_a_tar(file.read(tarfile.BLOCKSIZE)) or f"not a whole tar file: {error}"
            reason = f"{name}: cannot be read ({what})"
            raise Damaged(reason, _index(members, name, file, whole=False), path) from None
        end = tar.end
        total = file.seek(0, io.SEEK_END)
        file.seek(end)
        rest = iter(lambda: file.read(1 << 20), b"")
        if any(block.strip(b"\0") for block in rest):
            reason = f"{name}: damaged after {end} bytes, or several tars in one: build or copy it again"
            raise Damaged(reason, _index(members, name, file, whole=False), path)
        if total < end + END_OF_ARCHIVE:
            reason = f"{name}: cut off after {total} bytes: build or copy it again"
            raise Damaged(reason, _index(members, name, file, whole=False), path)
        index = _index(members, name, file)
    if not len(index):
        raise DataError(f"{name}: holds no sample: build it again, or take it out of the list")
    return index


def not_a_tar(head: bytes) -> str | None:
    """What a file that begins with `head` is, if it is no tar: a server's page, a pointer, a compressed file."""
    if not head:
        return "an empty file, not a tar"
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(head, encoding="utf-8", errors="surrogateescape")
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, what in _OTHERS.items():
        if text[: len(start)].lower() == start:
            return f"{what}, not a tar"
    line = head.partition(b"\n")[0].decode(errors="replace").strip()
    return f"text, not a tar: {line[:40]!r}" if line and line.isprintable() and "\ufffd" not in line else "not a tar"


def no_samples() -> np.ndarray:
    """The index of a shard without samples."""
    return _index([], "", io.BytesIO())


def _index(members: list[tuple[str, str, int, int]], name: str, file: BinaryIO, whole: bool = True) -> np.ndarray:
    """Group members into samples: neighbours with the same key. Unless `whole`, drop the last: it may be incomplete."""
    samples: list[list[tuple[int, int]]] = []
    before = None
    for key, group in itertools.groupby(members, key=lambda member: member[0]):
        extents: dict[str, tuple[int, int]] = {}
        for _, suffix, offset, size in group:
            if suffix in extents:
                raise DataError(f"{name}: sample {key} has two members .{suffix}: build it again")
            extents[suffix] = (offset, size)
        if sum(size for _, size in extents.values()) > LARGEST_SAMPLE:
            raise DataError(f"{name}: sample {key} is larger than {LARGEST_SAMPLE:,} bytes: build it again")
        document, part = _document(key)
        tokens = _count_tokens(file, extents, f"{name}: sample {key}", several=document == key)
        if samples and bool(tokens) != bool(samples[-1][-1][1]):
            raise DataError(f"{name}: sample {key} has no lengths.npy, or the one before has none: build it again")
        if part and before != (document, part - 1):
            raise DataError(f"{name}: sample {key} does not follow part {part - 1} of its document: build it again")
        before = document, part
        samples.append([*(extents.get(suffix, (-1, 0)) for suffix in MEMBERS), (part, tokens)])
    if not whole:
        samples = samples[:-1]
    return np.array(samples, dtype=np.int64).reshape(len(samples), len(MEMBERS) + 1, 2)


def _count_tokens(file: BinaryIO, extents: dict[str, tuple[int, int]], location: str, several: bool) -> int:
    """The tokens of a sample of documents; 0 of a sequence.

    several: it may hold more than one document.

    Raises:
        DataError: if its members do not fit each other.
    """
    if "lengths.npy" not in extents:
        return 0
    if "tokens.npy" not in extents:
        raise DataError(f"{location} has no tokens.npy: build the shard again")

    def read(member: str, most: int = LARGEST_SAMPLE) -> bytes:
        offset, size = extents[member]
        file.seek(offset)
        return file.read(min(size, most))

    _, _, tokens = tokens_header(read("tokens.npy", LONGEST_NPY_HEADER), extents["tokens.npy"][1], location)
    if len(read_lengths(read("lengths.npy"), tokens, location)) > 1 and not several:
        raise DataError(f"{location} is part of a document, but holds several: build the shard again")
    if "loss_spans.npy" in extents:
        read_loss_spans(read("loss_spans.npy"), tokens, location)
    return tokens


def _document(key: str) -> tuple[str, int]:
    """A sample's document, and which part of it the sample is."""
    match = _PART.fullmatch(key)
    return (match[1], int(match[2])) if match else (key, 0)


def index_file(shard: Path) -> Path:
    """Where the index beside a shard is: it travels with it, so that no machine has to read all headers."""
    return shard.with_suffix(".index")


def write_index(shard: Path, index: np.ndarray) -> None:
    """Write the index beside a shard: what the shard is known by, a hash, and the differences of rows, compressed."""
    content = zlib.compress(np.diff(index, axis=0, prepend=0).astype("<i8").tobytes())
    index_file(shard).write_bytes(_MAGIC + _mark(shard) + hashlib.sha256(content).digest() + content)


def read_index(shard: Path, name: str) -> np.ndarray | None:
    """The index beside a shard; None if there is none.

    Raises:
        DataError: if it is damaged, or of another file: size and three blocks of the shard are compared.
    """
    file = index_file(shard)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    size = shard.stat().st_size
    begin = len(_MAGIC) + 2 * _HASH
    mark, digest, content = data[len(_MAGIC) : begin - _HASH], data[begin - _HASH : begin], data[begin:]
    if not data.startswith(_MAGIC) or hashlib.sha256(content).digest() != digest:
        raise DataError(f"{file}: damaged: copy it again, or delete it")
    if mark != _mark(shard):
        raise DataError(f"{file}: of another file than {name}: copy both again, or delete it")
    rows = zlib.decompressobj().decompress(content, size)  # it takes less room than the shard
    if len(rows) % _ROW or (index := _fitting(_summed(rows), size)) is None:
        raise DataError(f"{file}: does not fit {name}: delete it")
    return index


def _summed(rows: bytes) -> np.ndarray:
    return np.frombuffer(rows, "<i8").reshape(-1, len(MEMBERS) + 1, 2).cumsum(axis=0, dtype=np.int64)


def _mark(shard: Path) -> bytes:
    """A hash of a shard's size, and of its first, middle and last 16 KiB."""
    size = shard.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(shard, "rb") as file:
        for offset in (0, size // 2, max(0, size - _BLOCK)):
            file.seek(offset)
            digest.update(file.read(_BLOCK))
    return digest.digest()


def load_index(file: Path, shard_size: int) -> np.ndarray | None:
    """A cached index, if there is one that fits such a shard; any other file in its place is ignored."""
    try:
        # Mapped: a header cannot allocate more than the file holds, and objects cannot be mapped.
        index = np.array(np.lib.format.open_memmap(file, mode="r"))
    except Exception:  # no file yet, half a file, or whatever NumPy's header parser raises
        return None
    return _fitting(index, shard_size)


def _fitting(index: np.ndarray, shard_size: int) -> np.ndarray | None:
    """An index, unless a shard of this size cannot have it."""
    if index.dtype != np.int64 or index.shape[1:] != (len(MEMBERS) + 1, 2) or not len(index):
        return None
    offsets, sizes, parts, tokens = index[:, :-1, 0], index[:, :-1, 1], index[:, -1, 0], index[:, -1, 1]
    fits = (offsets >= -1) & (offsets <= shard_size) & (sizes >= 0) & (sizes <= shard_size - offsets.clip(0))
    counts = (tokens >= 0) & (tokens <= shard_size) & ((tokens > 0) == (tokens[0] > 0))
    return index if fits.all() and counts.all() and (parts >= 0).all() else None


def save_index(file: Path, index: np.ndarray) -> None:
    """Cache an index if possible: a cache that cannot be written only costs time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        with open(unfinished, "wb") as opened:
            np.save(opened, index)
        unfinished.rename(file)
