"""Input files as documents: decompressed and read a piece at a time; columns.py and token_files.py read those with rows.

A document that cannot be used is yielded as a DataError naming file and place, so that the caller can skip it and
continue.
"""

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from powernap.train.data import columns, token_files
from powernap.train.data.input_files import foreign_format, is_remote, kind_of, on_disk, size_of
from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import threads

PIECE = 2**17  # bytes of a document that are tokenized at once
DECODED_FIRST, DECODED_ONE_IN = 2**18, 64  # bytes of a job that are decoded again: the first, and a share of the others
_OFFERED = 8  # fields in a message
HEAD = 2**20  # bytes of a document that decide between train and test
_BOM = b"\xef\xbb\xbf"

COUNTED = (".parquet", *token_files.KINDS)  # divided by what they hold, not by bytes

# file, start, stop: row groups of a .parquet, documents of a .bin or .ds; else the bytes in which the part's documents begin
Part = tuple[str, int, int]
ALL = sys.maxsize  # the stop of a part that is a whole file


class Piece(NamedTuple):
    """A document, or about PIECE bytes of a long one."""

    file: str
    place: str  # within the file, for messages
    start: int  # offset in bytes of `data` from the place, or in the file
    data: bytes

    def __str__(self) -> str:
        return f"{self.file}: {self.place}" if self.place else self.file

    def text(self) -> str:
        """Raises DataError for bytes that are not UTF-8."""
        try:
            return self.data.decode()
        except UnicodeDecodeError as error:
            cause = f"not UTF-8 text ({error.reason} at byte {self.start + error.start})"
            raise DataError(f"{self}: {foreign_format(self.file) or cause}") from None


class Tokens(NamedTuple):
    """A document that is tokens already."""

    file: str
    place: str
    tokens: np.ndarray  # integers [n]

    def __str__(self) -> str:
        return f"{self.file}: {self.place}"

    @property
    def data(self) -> bytes:
        return self.tokens.astype("<u4").tobytes()


class Document(NamedTuple):
    head: bytes
    pieces: Iterator[Piece | Tokens | DataError]
    ends: bool  # with these pieces; False: it continues in the next part


@dataclass
class Tally:
    """Counts what a job has read so far.

    Args:
        budget: documents that may be skipped; None: stop at the first that cannot be used.
        advance: called with the bytes read, for a progress bar.
    """

    budget: int | None = None
    advance: Callable[[int], object] = lambda count: None
    skipped: list[str] = field(default_factory=list)
    documents: int = 0
    text_bytes: dict[str, int] = field(default_factory=dict)  # of the documents that are text, by split
    left_out: dict[str, int] = field(default_factory=dict)  # documents by the reason why they are not wanted
    hashes: dict[str, list[bytes]] = field(
        default_factory=dict
    )  # of a shard's documents, or a task's samples, by split, if wanted
    decoded: int = 0  # pieces whose tokens were decoded again, and
    changed: int = 0  # those that came back as another text
    example: str = ""
    _read: int = 0  # bytes of text, and
    _decoded: int = 0  # those that were decoded again
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def skip(self, error: DataError) -> None:
        """Record a skipped document. Raises `error` if none may be skipped, DataError if too many were."""
        if self.budget is None:
            raise error
        self.skipped.append(str(error))
        check_budget(self.skipped, self.budget)

    def leave_out(self, reason: str) -> None:
        """Count a document, which was counted as one that is used, as one that is not wanted."""
        self.documents -= 1
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def to_decode(self, size: int) -> bool:
        """Whether to decode the next piece of `size` bytes again: the first ones of a job, then few, since it takes time."""
        wanted = self._decoded <= DECODED_FIRST + self._read // DECODED_ONE_IN
        self._read += size
        self._decoded += size * wanted
        return wanted

    def decode(self, piece: Piece, difference: str) -> None:
        """Count a piece that was decoded; `difference` is empty if it came back as it was."""
        self.decoded += 1
        if difference:
            self.changed += 1
            self.example = self.example or f"{piece}: {difference}"


def bytes_at_once() -> int:
    """How much text is tokenized at once, on all threads."""
    return PIECE * threads()


def check_budget(skipped: list[str], budget: int) -> None:
    """Raises DataError if too many documents were skipped."""
    if len(skipped) > budget:
        raise DataError(f"more than skip_budget={budget} documents skipped; last: {skipped[-1]}")


@dataclass(frozen=True)
class Reader:
    """How files are read.

    Args:
        text_field: what holds the text, or tokens: field of .jsonl, column of .parquet and .arrow, member of .tar; nested ones with
            dots.
        txt_document: what makes a document in a .txt: file, paragraph or line.
        whole: no document is divided between parts.
        one_piece: nor is it between pieces, so it is held in memory.
        columns: of .parquet and .arrow, those that `raw` yields of each row, as a JSON object; empty: the text alone.
    """

    text_field: str
    txt_document: str
    whole: bool
    one_piece: bool = False
    columns: tuple[str, ...] = ()

    def parts(self, file: str, size: int, check: bool) -> Iterator[tuple[Part, int]]:
        """A file in parts of about `size` bytes, if it can be divided; each with its size.

        Raises:
            DataError: if `check` and a file cannot be read.
        """
        kind, codec = kind_of(file)
        total = size_of(file)
        if codec or kind in (".arrow", ".tar") or is_remote(file) or (self.whole and self._is_one_document(kind)):
            yield (file, 0, ALL if kind in COUNTED else total), total
            return
        if kind not in COUNTED:
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield (file, start, stop), stop - start
            return
        try:
            if kind == ".parquet":
                units, step = columns.count_row_groups(file, None if self.columns else self.text_field), 1
            else:
                units = token_files.count_documents(file)
                step = max(1, units * size // max(1, total))
        except DataError:
            if check:
                raise
            units = step = 1  # its reader reports the error
        for first in range(0, units, step):
            stop = min(first + step, units)
            yield (file, first, stop), total * (stop - first) // units

    def documents(self, part: Part, tally: Tally) -> Iterator[Document | DataError]:
        kind, codec = kind_of(part[0])
        if self._is_one_document(kind):
            yield from self._one_document(part, codec, tally)
            return
        for raw in self.raw(part, tally):
            try:
                if isinstance(raw, DataError):
                    raise raw
                content = raw
                if kind == ".jsonl" and isinstance(raw, Piece):
                    content = _content_of(raw, self.text_field)
            except DataError as error:
                yield error
                continue
            if isinstance(content, Tokens):
                yield Document(content.data[:HEAD], iter([content]), True)
                continue
            document = content._replace(data=content.data.removeprefix(_BOM))
            pieces = [document] if self.one_piece or len(document.data) <= PIECE else _pieces(document)
            yield Document(document.data[:HEAD], iter(pieces), True)

    def raw(self, part: Part, tally: Tally) -> Iterator[Piece | Tokens | DataError]:
        """The raw content of a part: lines, paragraphs, rows, or pieces of one long text; hashed into tally.digest."""
        kind, codec = kind_of(part[0])
        pieces: Iterator[Piece | Tokens | DataError]
        try:
            if kind in columns.KINDS and self.columns:
                pieces = _of_rows(part, columns.records(part, self.columns, tally.advance))
            elif kind in columns.KINDS:
                pieces = _of_rows(part, columns.values(part, self.text_field, tally.advance))
            elif kind == ".tar":
                pieces = _of_rows(part, token_files.of_tar(part[0], self.text_field, tally.advance))
            elif kind in token_files.KINDS:
                pieces = _of_rows(part, token_files.documents(part, tally.advance))
            elif self._is_one_document(kind):
                pieces = _blocks(part, codec, self.one_piece, tally)
            elif kind == ".txt" and self.txt_document == "paragraph":
                pieces = _paragraphs(part, codec, tally)
            else:
                pieces = _lines(part, codec, tally)
            for piece in pieces:
                tally.digest.update(str(piece).encode() if isinstance(piece, DataError) else piece.data + b"\n")
                yield piece
        except OSError as error:
            yield _unreadable(part[0], error)
        except DataError as error:
            yield error

    def _is_one_document(self, kind: str) -> bool:
        return kind == ".txt" and self.txt_document == "file"

    def _one_document(self, part: Part, codec: str | None, tally: Tally) -> Iterator[Document | DataError]:
        try:
            path = on_disk(part[0])
            with _open(path, codec) as opened:
                head = opened.read(HEAD + len(_BOM)).removeprefix(_BOM)[:HEAD]
            ends = codec is not None or part[2] == ALL or _aligned(part)[1] == path.stat().st_size
        except DataError as error:
            yield error
        except OSError as error:
            yield _unreadable(part[0], error)
        else:
            yield Document(head, self.raw(part, tally), ends)


def _unreadable(file: str, error: Exception) -> DataError:
    return DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or ' '.join(str(error).split())})")


class _Counted(io.FileIO):
    def __init__(self, path: Path, advance: Callable[[int], object]):
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._advance(count)
        return count


def _open(path: Path, codec: str | None, advance: Callable[[int], object] = lambda count: None) -> BinaryIO:
    """The bytes of a file, decompressed; `advance` gets the number of bytes read from the file itself."""
    file = io.BufferedReader(_Counted(path, advance), PIECE)
    if codec is None:
        return file
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, codec), PIECE)


def _aligned(part: Part) -> tuple[int, int]:
    """The bytes of a part of one long text: both ends moved forward to the beginning of a line or word."""
    file, start, stop = part
    with open(on_disk(file), "rb") as opened:
        return _next_break(opened, start), _next_break(opened, stop)


def _next_break(file: io.BufferedReader, place: int) -> int:
    if place == 0:
        return 0
    file.seek(place - 1)
    near = file.read(PIECE)
    if len(near) <= 1:
        return place - 1 + len(near)
    if (line := near.find(b"\n")) >= 0:
        return place + line
    if (blank := near.find(b" ", 1)) >= 0:
        return place - 1 + blank
    character = re.search(rb"[^\x80-\xbf]", near[1:])
    return place + (character.start() if character else len(near) - 1)


def _blocks(part: Part, codec: str | None, one_piece: bool, tally: Tally) -> Iterator[Piece]:
    """One long text, in pieces that end with a line or word."""
    file = part[0]
    place, stop = (0, sys.maxsize) if codec else _aligned(part)
    with _open(on_disk(file), codec, tally.advance) as opened:
        if place:
            opened.seek(place)
        remaining, rest, more = stop - place, b"", True
        while more:
            block = opened.read(-1 if one_piece else min(PIECE, remaining))
            remaining -= len(block)
            more = remaining > 0 and len(block) > 0
            rest += block
            if place == 0 and rest.startswith(_BOM):
                place, rest = len(_BOM), rest[len(_BOM) :]
            cut = _last_break(rest) if more and not one_piece else len(rest)
            if cut:
                yield Piece(file, "", place, rest[:cut])
            place, rest = place + cut, rest[cut:]


def _pieces(document: Piece) -> Iterator[Piece]:
    start = 0
    while len(document.data) - start > PIECE:
        cut = _last_break(document.data[start : start + PIECE])
        yield document._replace(start=start, data=document.data[start : start + cut])
        start += cut
    yield document._replace(start=start, data=document.data[start:])


def _last_break(data: bytes) -> int:
    """Where the last line or word begins in the second half of `data`, or else the last character of `data`."""
    for mark, behind in ((b"\n", 1), (b" ", 0)):
        at = data.rfind(mark, len(data) // 2, len(data) - 1)
        while at >= 0 and data[at + 1 : at + 2].isspace():
            at = data.rfind(mark, len(data) // 2, at)
        if at >= 0:
            return at + behind
    at = len(data) - 1
    while at > len(data) - 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return max(at, 0)


def _lines(part: Part, codec: str | None, tally: Tally) -> Iterator[Piece]:
    """The non-blank lines that begin in a part."""
    stop = None if codec else part[2]
    for place, line in _all_lines(part, codec, tally):
        if stop is not None and place >= stop:
            return
        if line.strip():
            yield Piece(part[0], f"the line at byte {place}", 0, line.rstrip(b"\r\n"))


def _paragraphs(part: Part, codec: str | None, tally: Tally) -> Iterator[Piece]:
    """The paragraphs after the blank lines that begin in a part, and the file's first one."""
    start, stop = (0, None) if codec else part[1:]
    begun: list[bytes] | None = [] if start == 0 else None  # None: in a paragraph that began in the previous part
    first = 0
    for place, line in _all_lines(part, codec, tally):
        if line.strip():
            if begun is None:
                assert stop is not None
                if place >= stop:
                    return
            else:
                first = first if begun else place
                begun.append(line)
            continue
        if begun:
            yield _paragraph(part[0], first, begun)
        if stop is not None and place >= stop:
            return
        begun = []
    if begun:
        yield _paragraph(part[0], first, begun)


def _paragraph(file: str, place: int, lines: list[bytes]) -> Piece:
    return Piece(file, f"the paragraph at byte {place}", 0, b"".join(lines).rstrip(b"\r\n"))


def _all_lines(part: Part, codec: str | None, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """All lines from the first that begins in a part to the file's end, each with its offset."""
    file, start, _ = part
    with _open(on_disk(file), codec, tally.advance) as opened:
        place = 0
        if start and not codec:
            opened.seek(start - 1)
            place = start - 1 + len(opened.readline())  # the rest of a line that began before
        for line in opened:
            yield place, line if place else line.removeprefix(_BOM)
            place += len(line)


def read_object(line: Piece) -> dict[str, Any]:
    """Raises DataError if a line is not a JSON object."""
    value = _json_of(line)
    if not isinstance(value, dict):
        raise DataError(f"{line} is no JSON object: write one object per line")
    return value


def _content_of(line: Piece, text_field: str) -> Piece | Tokens:
    """Raises DataError if a line is not a JSON object with text, or tokens."""
    return _content(line.file, line.place, field_of(_json_of(line), text_field, line), text_field)


def field_of(value: Any, field: str, line: object, option: str = "text_field") -> Any:
    """A field of a JSON object; its name as it is, or with dots for objects within objects.

    option: what names the field, for messages.

    Raises:
        DataError: if there is none.
    """
    found, rest = value, field
    while isinstance(found, dict):
        if rest in found:
            return found[rest]
        first, _, later = rest.partition(".")
        if not later or not isinstance(found.get(first), dict):
            break
        found, rest = found[first], later
    before = field.removesuffix(rest)
    leaves = [f"{before}{path}" for path in text_paths(found)] if isinstance(found, dict) else []
    more = ", ..." if len(leaves) > _OFFERED else ""
    names = f" with one of {', '.join(leaves[:_OFFERED])}{more}" if leaves else ""
    raise DataError(f"{line} is no JSON object with '{field}': write {option}=...{names}")


def text_paths(value: dict[str, Any], before: str = "") -> list[str]:
    """The dotted paths of what may be read as text: text, or lists, which may be tokens or conversations."""
    paths = []
    for name, inner in value.items():
        if isinstance(inner, dict):
            paths += text_paths(inner, f"{before}{name}.")
        elif isinstance(inner, str | list):
            paths.append(f"{before}{name}")
    return paths


def _of_rows(part: Part, rows: Iterator[tuple[str, Any]]) -> Iterator[Piece | Tokens | DataError]:
    """Rows of (place, value) as documents."""
    for place, value in rows:
        try:
            yield value if isinstance(value, DataError) else _content(part[0], place, value, "text_field")
        except DataError as error:
            yield error


def _content(file: str, place: str, value: Any, field: str) -> Piece | Tokens:
    """Text as a piece, whole numbers as tokens. Raises DataError for anything else."""
    piece = Piece(file, place, 0, b"")
    if isinstance(value, bytes):
        return piece._replace(data=value)
    if isinstance(value, str):
        return piece._replace(data=_encode(value, piece))
    if isinstance(value, np.ndarray) or (isinstance(value, list) and value and all(type(n) is int for n in value)):
        try:
            tokens = np.asarray(value)
            if (
                tokens.ndim == 1
                and tokens.dtype.kind in "iu"
                and len(tokens)
                and 0 <= tokens.min() <= tokens.max() < 2**32
            ):
                return Tokens(file, place, tokens)
        except OverflowError:
            pass
        raise DataError(f"{piece} holds numbers in '{field}' that are no tokens: whole numbers from 0, in one row")
    raise DataError(f"{piece} has no text in '{field}', but {json.dumps(value, default=str)[:40]}")


def _json_of(line: Piece) -> Any:
    if line.data.lstrip()[:1] == b"[":
        raise DataError(f"{line} is a JSON array: write one object per line, such as with jq -c '.[]'")
    try:
        return json.loads(line.text())
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{line} is no JSON ({' '.join(str(error).split())}): write one object per line") from None


def _encode(text: str, piece: Piece) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{piece} holds {half}, half of a surrogate pair, which is no character") from None
