"""Rows of .parquet and .arrow files, a column at a time. Data sets that Hugging Face saved to disk are .arrow files."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from powernap.train.data.input_files import kind_of, on_disk
from powernap.train.data.sample import DataError

KINDS = (".parquet", ".arrow")
ROWS = 256  # read at once


def count_row_groups(file: str, field: str | None) -> int:
    """The row groups of a .parquet. Raises DataError if it has none, or no column for `field`."""
    opened = _open_parquet(file)
    if field is not None:
        _column(file, opened.schema_arrow, field)
    return opened.num_row_groups


def values(part: tuple[str, int, int], field: str, advance: Callable[[int], object]) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row: bytes of text, an array of tokens, or a DataError where there is neither.

    Raises:
        DataError: if the file cannot be read.
    """
    file = part[0]
    with _read(part) as (schema, batches):
        path = _column(file, schema, field)
        for row, batch in _numbered(file, batches([path]), advance):
            for number, value in enumerate(_column_values(batch, path), row):
                if value is None:
                    value = DataError(f"{file}: row {number} has no text in '{field}', but null")
                yield f"row {number}", value


def records(
    part: tuple[str, int, int], names: tuple[str, ...], advance: Callable[[int], object]
) -> Iterator[tuple[str, bytes]]:
    """(place, JSON object) of each row, with those of the columns that there are. Raises DataError."""
    from pyarrow import ArrowInvalid

    with _read(part) as (schema, batches):
        present = [name for name in names if name in schema.names]
        for row, batch in _numbered(part[0], batches(present), advance):
            try:
                batch.validate(full=True)
            except ArrowInvalid as error:  # such as text that is not UTF-8
                raise _unreadable(part[0], error) from None
            for number, record in enumerate(batch.select(present).to_pylist(), row):
                yield f"row {number}", json.dumps(record, default=str).encode()


@contextmanager
def _read(part: tuple[str, int, int]) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[tuple[int, Any]]]]]:
    """A file's schema, and a function from columns to (first row, batch of rows)."""
    import pyarrow

    file, first, stop = part
    try:
        if kind_of(file)[0] == ".parquet":
            opened = _open_parquet(file)
            groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            chosen = list(range(first, min(stop, len(groups))))
            yield (
                opened.schema_arrow,
                lambda names: _counted(
                    sum(groups[:first]), opened.iter_batches(ROWS, row_groups=chosen, columns=names)
                ),
            )
        else:
            with _open_arrow(file) as batches:
                schema = batches.schema
                small = (
                    batch.slice(start, ROWS) for batch in batches for start in range(0, max(1, batch.num_rows), ROWS)
                )
                yield schema, lambda _: _counted(0, small)
    except pyarrow.ArrowException as error:
        raise _unreadable(file, error) from None


def _counted(row: int, batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        yield row, batch
        row += len(batch)


def _numbered(
    file: str, batches: Iterator[tuple[int, Any]], advance: Callable[[int], object]
) -> Iterator[tuple[int, Any]]:
    for row, batch in batches:
        yield row, batch
        advance(batch.nbytes)


def _column(file: str, schema: Any, field: str) -> str:
    """The column that `field` names, structs within structs with dots. Raises DataError unless it holds text or tokens."""
    kinds = dict(_leaves("", schema))
    usable = [name for name, kind in kinds.items() if _is_text(kind) or _is_tokens(kind)]
    advice = f"write text_field=... with one of {', '.join(usable or kinds)}"
    if field not in kinds:
        raise DataError(f"{file}: no column '{field}': {advice}")
    if field not in usable:
        advice = advice if usable else "no column holds text"
        raise DataError(f"{file}: column '{field}' holds {kinds[field]}, not text: {advice}")
    return field


def _leaves(prefix: str, fields: Any) -> Iterator[tuple[str, Any]]:
    from pyarrow import types

    for field in fields:
        yield prefix + field.name, field.type
        if types.is_struct(field.type):
            children = [field.type.field(number) for number in range(field.type.num_fields)]
            yield from _leaves(f"{prefix}{field.name}.", children)


def _column_values(batch: Any, path: str) -> list[Any]:
    import numpy as np
    from pyarrow import compute, types

    if path in batch.schema.names:
        column = batch.column(path)
    else:
        first, *others = path.split(".")
        column = compute.struct_field(batch.column(first), others)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        return column.cast("large_binary").to_pylist()
    return [None if tokens is None else np.array(tokens, dtype=np.int64) for tokens in column.to_pylist()]


def _is_text(kind: Any) -> bool:
    """Whether a column holds strings, or bytes that may be UTF-8."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        is_kind(kind)
        for is_kind in (types.is_string, types.is_large_string, types.is_string_view,
                        types.is_binary, types.is_large_binary, types.is_binary_view)
    )  # fmt: skip


def _is_tokens(kind: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_integer(kind.value_type)


def _open_parquet(file: str):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(on_disk(file))
        opened.schema_arrow  # noqa: B018  # may fail too
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: no Parquet file ({' '.join(str(error).split())})") from None
    return opened


@contextmanager
def _open_arrow(file: str) -> Iterator[Any]:
    """A reader of record batches: of Arrow's stream format, which Hugging Face writes, or of its file format."""
    import pyarrow

    codec = kind_of(file)[1]
    try:
        if codec:
            with pyarrow.OSFile(str(on_disk(file))) as source, pyarrow.CompressedInputStream(source, codec) as stream:
                yield pyarrow.ipc.open_stream(stream)
            return
        with pyarrow.memory_map(str(on_disk(file))) as source:
            if source.read(6) == b"ARROW1":
                opened = pyarrow.ipc.open_file(source)
                yield _Batches(opened.schema, map(opened.get_batch, range(opened.num_record_batches)))
            else:
                source.seek(0)
                yield pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: no Arrow file ({' '.join(str(error).split())})") from None


class _Batches:
    def __init__(self, schema: Any, batches: Iterator[Any]):
        self.schema, self._batches = schema, batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self._batches)


def _unreadable(file: str, error: Exception) -> DataError:
    return DataError(f"{file}: cannot be read ({' '.join(str(error).split())})")
