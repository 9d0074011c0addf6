"""Files of tokens: Megatron's .bin beside .idx, datatrove's .ds beside .ds.index, and tars of samples as WebDataset reads them."""

import itertools
import json
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from powernap.train.data.input_files import on_disk
from powernap.train.data.sample import DataError, array_of
from powernap.train.data.tar_index import END_OF_ARCHIVE, LARGEST_SAMPLE, Members, NotTar

KINDS = (".bin", ".ds")
# Of an .idx: magic, version, type of the tokens, sequences, documents plus one; 12 bytes a sequence and 8 a document follow.
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = (1, 2, 3, 4, 5, 8)  # types of tokens


def count_documents(file: str) -> int:
    """The documents of a .bin or .ds. Raises DataError if its index cannot be read."""
    try:
        if file.endswith(".ds"):
            return len(_ends(file))
        return _idx_documents(file)
    except OSError as error:
        raise DataError(f"{file}: its index cannot be read ({error.strerror})") from None


def _idx_documents(file: str) -> int:
    index = Path(file).with_suffix(".idx")
    with open(index, "rb") as opened:
        head = opened.read(_HEADER.size)
    if len(head) == _HEADER.size:
        magic, version, kind, sequences, borders = _HEADER.unpack(head)
        size = _HEADER.size + 12 * sequences + 8 * borders
        if magic == b"MMIDIDX\0\0" and version == 1 and kind in _INTEGERS and borders and size == index.stat().st_size:
            return borders - 1
    raise DataError(f"{file}: the .idx beside it is none of Megatron's, or not whole")


def documents(part: tuple[str, int, int], advance: Callable[[int], object]) -> Iterator[tuple[str, np.ndarray]]:
    """(place, tokens) of each document. Raises DataError if the file does not fit its index."""
    file, first, stop = part
    read = (_ds if file.endswith(".ds") else _megatron)(file)
    for number in range(first, min(stop, count_documents(file))):
        try:
            tokens = read(number)
        except Exception as error:  # whatever an index leads to
            raise DataError(f"{file}: document {number} cannot be read ({' '.join(str(error).split())})") from None
        yield f"document {number}", tokens
        advance(tokens.nbytes)


def _ends(file: str) -> np.ndarray:
    """int64 [documents]: the token behind each document of a .ds."""
    if Path(f"{file}.loss").exists():
        raise DataError(
            f"{file}: has a .loss beside it, which is not read: convert it to loss_spans.npy (docs/data.md)"
        )
    ends = np.fromfile(f"{file}.index", dtype="<u8").astype(np.int64)
    if not len(ends) or ends[0] < 0 or (np.diff(ends) < 0).any():
        raise DataError(f"{file}: the .ds.index beside it is none of datatrove's")
    return ends


def _ds(file: str) -> Callable[[int], np.ndarray]:
    ends = _ends(file)
    width = {2 * ends[-1]: "<u2", 4 * ends[-1]: "<u4"}.get(Path(file).stat().st_size)
    if width is None:
        raise DataError(f"{file}: not the {ends[-1]:,} tokens of two or four bytes that its .ds.index counts")
    tokens = np.memmap(file, dtype=width, mode="r")
    return lambda number: np.array(tokens[ends[number - 1] if number else 0 : ends[number]])


def _megatron(file: str) -> Callable[[int], np.ndarray]:
    opened = _indexed_dataset(file)
    borders, lengths = opened.document_indices, opened.sequence_lengths
    if (lengths < 0).any() or (np.diff(borders) < 0).any() or not 0 <= borders[0] <= borders[-1] <= len(lengths):
        raise DataError(f"{file}: the .idx beside it is damaged: copy it again")

    def read(number: int) -> np.ndarray:
        sequences = range(int(borders[number]), int(borders[number + 1]))
        return np.concatenate([np.zeros(0, opened.index.dtype), *(opened.get(sequence) for sequence in sequences)])

    return read


@lru_cache(maxsize=1)
def _indexed_dataset(file: str) -> Any:
    """Megatron-core's own reader. Raises DataError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it would rather have
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        import powernap.model.megatron  # noqa: F401  # without it, the import builds what nothing here uses
    try:
        return IndexedDataset(str(Path(file).with_suffix("")))
    except Exception as error:  # it asserts, and NumPy raises what a header leads to
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split()) or 'damaged'})") from None


def of_tar(file: str, field: str, advance: Callable[[int], object]) -> Iterator[tuple[str, Any]]:
    """(place, value) of each sample: the member .txt or .npy that `field` names, or a field of its .json, such as json.text.

    Raises:
        DataError: if the tar breaks off.
    """
    with open(on_disk(file), "rb") as index, open(on_disk(file), "rb") as content:
        tar = Members(index)
        try:
            for key, group in itertools.groupby(tar, key=lambda member: member[0]):
                members = {suffix: (offset, size) for _, suffix, offset, size in group}
                advance(sum(size for _, size in members.values()))
                try:
                    yield f"sample {key}", _member(f"{file}: sample {key}", members, field, content)
                except DataError as error:
                    yield f"sample {key}", error
        except NotTar as error:
            raise DataError(f"{file}: cannot be read (not a whole tar file: {error})") from None
        if index.seek(0, 2) < tar.end + END_OF_ARCHIVE:  # tarfile takes a cut between two members for the end
            raise DataError(f"{file}: cut off after {index.tell()} bytes: copy it again")


def _member(where: str, members: dict[str, tuple[int, int]], field: str, content: Any) -> Any:
    suffix = next((suffix for suffix in members if field == suffix or field.startswith(f"{suffix}.")), None)
    if suffix is None and field == "text" and "txt" in members:
        suffix = field = "txt"
    if suffix is None:
        raise DataError(f"{where} has no member '{field}': write text_field=... with one of {', '.join(members)}")
    offset, size = members[suffix]
    if size > LARGEST_SAMPLE:
        raise DataError(f"{where} is larger than {LARGEST_SAMPLE:,} bytes")
    content.seek(offset)
    data = content.read(size)
    if suffix.endswith("npy"):
        return array_of(data, suffix, where)
    if suffix != "json":
        return data
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({' '.join(str(error).split())})") from None
    for name in field.split(".")[1:]:
        value = value.get(name) if isinstance(value, dict) else None
    return value
