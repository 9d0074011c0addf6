"""Input files as documents: decompressed and read a piece at a time.

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

from powernap.train.data.input_files import foreign_format, kind_of
from powernap.train.data.sample import DataError

PIECE = 2**20  # bytes of a document that are tokenized at once
HEAD = 2**20  # bytes of a document that decide between train and test
_BOM = b"\xef\xbb\xbf"

# file, start, stop: row groups of a .parquet; else the bytes in which the part's documents begin
Part = tuple[str, int, int]


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


class Document(NamedTuple):
    head: bytes
    pieces: Iterator[Piece | DataError]
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
    changed: int = 0  # pieces whose tokens decode to another text
    example: str = ""
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def skip(self, error: DataError) -> None:
        """Record a skipped document. Raises `error` if none may be skipped, DataError if too many were."""
        if self.budget is None:
            raise error
        self.skipped.append(str(error))
        check_budget(self.skipped, self.budget)

    def change(self, piece: Piece, difference: str) -> None:
        self.changed += 1
        self.example = self.example or f"{piece}: {difference}"


def check_budget(skipped: list[str], budget: int) -> None:
    """Raises DataError if too many documents were skipped."""
    if len(skipped) > budget:
        raise DataError(f"more than skip_budget={budget} documents skipped; last: {skipped[-1]}")


@dataclass(frozen=True)
class Reader:
    """How files are read.

    Args:
        text_field: field of .jsonl and column of .parquet that hold the text.
        txt_document: what makes a document in a .txt: file, paragraph or line.
        whole: documents are not divided: each is in one part, and is one piece.
        columns: of .parquet, those that `raw` yields of each row, as a JSON object; empty: the text alone.
    """

    text_field: str
    txt_document: str
    whole: bool
    columns: tuple[str, ...] = ()

    def parts(self, file: Path, size: int, check: bool) -> Iterator[tuple[Part, int]]:
        """A file in parts of about `size` bytes, if it can be divided; each with its size.

        Raises:
            DataError: if `check` and a .parquet cannot be read.
        """
        kind, codec = kind_of(file)
        total = file.stat().st_size
        if kind == ".parquet":
            try:
                groups = (_open_parquet(file) if self.columns else open_parquet(file, self.text_field)).num_row_groups
            except DataError:
                if check:
                    raise
                groups = 1  # its reader reports the error
            for group in range(groups):
                yield (str(file), group, group + 1), total // groups
        elif codec or (self.whole and self._is_one_document(kind)):
            yield (str(file), 0, total), total
        else:
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield (str(file), start, stop), stop - start

    def documents(self, part: Part, tally: Tally) -> Iterator[Document | DataError]:
        kind, codec = kind_of(Path(part[0]))
        if self._is_one_document(kind):
            yield from self._one_document(part, codec, tally)
            return
        for raw in self.raw(part, tally):
            try:
                if isinstance(raw, DataError):
                    raise raw
                data = _text_of(raw, self.text_field) if kind == ".jsonl" else raw.data
                document = raw._replace(data=data.removeprefix(_BOM))
            except DataError as error:
                yield error
                continue
            pieces = [document] if self.whole or len(document.data) <= PIECE else _pieces(document)
            yield Document(document.data[:HEAD], iter(pieces), True)

    def raw(self, part: Part, tally: Tally) -> Iterator[Piece | DataError]:
        """The raw content of a part: lines, paragraphs, rows, or pieces of one long text; hashed into tally.digest."""
        kind, codec = kind_of(Path(part[0]))
        try:
            if kind == ".parquet":
                pieces = _records(part, self.columns, tally) if self.columns else _rows(part, self.text_field, tally)
            elif self._is_one_document(kind):
                pieces = _blocks(part, codec, self.whole, tally)
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
        path = Path(part[0])
        try:
            with _open(path, codec) as opened:
                head = opened.read(HEAD + len(_BOM)).removeprefix(_BOM)[:HEAD]
            ends = codec is not None or _aligned(part)[1] == path.stat().st_size
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
    with open(file, "rb") as opened:
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


def _blocks(part: Part, codec: str | None, whole: bool, tally: Tally) -> Iterator[Piece]:
    """One long text, in pieces that end with a line or word."""
    file = part[0]
    place, stop = (0, sys.maxsize) if codec else _aligned(part)
    with _open(Path(file), codec, tally.advance) as opened:
        if place:
            opened.seek(place)
        remaining, rest, more = stop - place, b"", True
        while more:
            block = opened.read(-1 if whole else min(PIECE, remaining))
            remaining -= len(block)
            more = remaining > 0 and len(block) > 0
            rest += block
            if place == 0 and rest.startswith(_BOM):
                place, rest = len(_BOM), rest[len(_BOM) :]
            cut = _last_break(rest) if more and not whole else len(rest)
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
    with _open(Path(file), codec, tally.advance) as opened:
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


def _text_of(line: Piece, text_field: str) -> bytes:
    """Raises DataError if a line is not a JSON object with text."""
    value = _json_of(line)
    if not isinstance(value, dict) or text_field not in value:
        names = f" with one of {', '.join(map(str, value))}" if isinstance(value, dict) and value else ""
        raise DataError(f"{line} is no JSON object with '{text_field}': write text_field=...{names}")
    text = value[text_field]
    if not isinstance(text, str):
        raise DataError(f"{line} has no text in '{text_field}', but {json.dumps(text)[:40]}")
    return _encode(text, line)


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


def _rows(part: Part, text_field: str, tally: Tally) -> Iterator[Piece | DataError]:
    """The text of each row."""
    from pyarrow import types

    for row, batch in _batches(part, open_parquet(Path(part[0]), text_field), [text_field], tally):
        column = batch.column(0)
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        for number, data in enumerate(column.cast("large_binary").to_pylist(), row):
            if data is None:
                yield DataError(f"{part[0]}: row {number} has no text in '{text_field}', but null")
            else:
                yield Piece(part[0], f"row {number}", 0, data)


def _records(part: Part, columns: tuple[str, ...], tally: Tally) -> Iterator[Piece]:
    """Rows as JSON objects, with those of the columns that there are."""
    from pyarrow import ArrowInvalid

    opened = _open_parquet(Path(part[0]))
    present = [name for name in columns if name in opened.schema_arrow.names]
    for row, batch in _batches(part, opened, present, tally):
        try:
            batch.validate(full=True)
        except ArrowInvalid as error:  # such as text that is not UTF-8
            raise _unreadable(part[0], error) from None
        for number, record in enumerate(batch.to_pylist(), row):
            yield Piece(part[0], f"row {number}", 0, json.dumps(record, default=str).encode())


def _batches(part: Part, opened: Any, columns: list[str], tally: Tally) -> Iterator[tuple[int, Any]]:
    """Batches of rows, each with the number of its first."""
    import pyarrow

    file, first, stop = part
    try:
        size = Path(file).stat().st_size
        groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        row = sum(groups[:first])
        for batch in opened.iter_batches(256, row_groups=list(range(first, stop)), columns=columns):
            yield row, batch
            row += len(batch)
            tally.advance(size * len(batch) // max(1, sum(groups)))
    except pyarrow.ArrowException as error:
        raise _unreadable(file, error) from None


def open_parquet(path: Path, text_field: str):
    """A Parquet file with a column of text.

    Raises:
        DataError: if it is not.
    """
    opened = _open_parquet(path)
    schema = opened.schema_arrow
    texts = [column.name for column in schema if _is_text(column.type)]
    advice = f"write text_field=... with one of {', '.join(texts or schema.names)}"
    if text_field not in schema.names:
        raise DataError(f"{path}: no column '{text_field}': {advice}")
    if text_field not in texts:
        advice = advice if texts else "no column holds text"
        raise DataError(f"{path}: column '{text_field}' holds {schema.field(text_field).type}, not text: {advice}")
    return opened


def _open_parquet(path: Path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(path)
        opened.schema_arrow  # noqa: B018  # may fail too
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no Parquet file ({' '.join(str(error).split())})") from None
    return opened


def _is_text(kind: Any) -> bool:
    """Whether a column holds strings, or bytes that may be UTF-8."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        is_kind(kind)
        for is_kind in (types.is_string, types.is_large_string, types.is_string_view,
                        types.is_binary, types.is_large_binary, types.is_binary_view)
    )  # fmt: skip
