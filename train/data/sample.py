"""A sample in a shard, checked when it is read: a sequence, of up to four .npy members, or documents end to end.

docs/data.md documents the format. No torch here.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from powernap.model.errors import PowernapError
from powernap.train.tasks.sample import Sample

# Of a sequence the first four, of which probes.npy is optional; of documents the first and the last two.
MEMBERS = ("tokens.npy", "loss_mask.npy", "answers.npy", "probes.npy", "lengths.npy", "loss_spans.npy")
LONGEST_HEADER = 256  # bytes; NumPy writes 128 before an array of one dimension


class DataError(PowernapError):
    """Shards that cannot be read or do not fit the recipe: one line naming shard, field and what to write."""


@dataclass(frozen=True)
class Documents:
    """Documents end to end, to be cut into sequences when they are read; or one part of a document."""

    tokens: np.ndarray  # unsigned [n], the smallest type that holds the vocabulary
    lengths: np.ndarray  # uint32 [d]: tokens of each document
    loss_spans: np.ndarray | None = None  # uint32 [s, 2]: rows (start, stop) of loss tokens, rising; None: all
    part: int = 0  # of a document that is longer than a sample: which of its samples this is


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


def encode(key: str, sample: Sample | Documents) -> dict[str, object]:
    """A sample as WebDataset's TarWriter takes it."""
    if isinstance(sample, Documents):
        arrays = {"tokens.npy": sample.tokens, "lengths.npy": sample.lengths}
        if sample.loss_spans is not None:
            arrays["loss_spans.npy"] = sample.loss_spans
        return {"__key__": key, **arrays}
    arrays = dict(zip(MEMBERS[:4], (sample.tokens, sample.loss_mask, sample.answers, sample.probes), strict=True))
    if not len(sample.probes):
        del arrays["probes.npy"]
    return {"__key__": key, **arrays}


def tokens_header(head: bytes, size: int, location: object) -> tuple[int, np.dtype, int]:
    """Of the tokens.npy of documents: where its numbers begin, their type, and how many there are.

    Args:
        head: its first LONGEST_HEADER bytes.
        size: bytes in all.

    Raises:
        DataError: if it does not hold unsigned integers [n].
    """
    try:
        start = 10 + int.from_bytes(head[8:10], "little")
        shape, _, dtype = _read_header(head[:start])
    except Exception as error:  # of many kinds: NumPy parses a header as Python
        raise DataError(f"{location}: tokens.npy is not a NumPy array ({_one_line(error)})") from None
    if len(shape) != 1 or dtype.kind != "u":
        raise DataError(
            f"{location}: tokens.npy beside lengths.npy must hold unsigned integers [n], not {dtype} {list(shape)}"
        )
    if shape[0] < 1 or start + shape[0] * dtype.itemsize != size:
        raise DataError(f"{location}: tokens.npy claims {shape[0]:,} tokens in {size:,} bytes: build the shard again")
    return start, dtype, shape[0]


def read_lengths(data: bytes, tokens: int, location: object) -> np.ndarray:
    """lengths.npy: int64 [d]. Raises DataError unless it divides the `tokens` into documents."""
    lengths = _array({"lengths.npy": data}, "lengths.npy", location)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise DataError(f"{location}: lengths.npy must hold integers [d], not {lengths.dtype} {list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > tokens or lengths.sum(dtype=np.int64) != tokens:
        raise DataError(f"{location}: lengths.npy does not add up to its {tokens:,} tokens: build the shard again")
    return lengths.astype(np.int64)


def read_loss_spans(data: bytes, tokens: int, location: object) -> np.ndarray:
    """loss_spans.npy: int64 [s, 2]. Raises DataError unless its rows lie in the `tokens`, one after the other."""
    spans = _array({"loss_spans.npy": data}, "loss_spans.npy", location)
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype.kind not in "iu":
        raise DataError(
            f"{location}: loss_spans.npy must hold integer rows (start, stop), not {spans.dtype} {list(spans.shape)}"
        )
    borders = spans.astype(np.int64).ravel()
    if len(borders) and (borders[0] < 0 or borders[-1] > tokens or (np.diff(borders) < 0).any()):
        raise DataError(f"{location}: loss_spans.npy names tokens beyond its {tokens:,}, or not in rising order")
    return borders.reshape(-1, 2)


def decode(members: dict[str, object], sequence_length: int | None = None, vocab_size: int | None = None) -> Sample:
    """Read and check one sample.

    Args:
        members: __key__, __url__ and the bytes of each member, as WebDataset groups them.
        sequence_length, vocab_size: None for any.

    Raises:
        DataError: if a member is missing or damaged, or does not fit data.sequence_length or model.vocab_size.
    """
    location = Location(members)
    tokens = _array(members, "tokens.npy", location)
    if members.keys() & {*MEMBERS[1:4]}:
        loss_mask, answers = (_array(members, name, location) for name in MEMBERS[1:3])
    else:  # plain tokens: each is a target
        loss_mask, answers = np.ones(len(tokens), dtype=bool), np.zeros((0, 3), dtype=np.int32)

    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{location}: tokens.npy must hold integers [T], not {tokens.dtype} {list(tokens.shape)}")
    if sequence_length is not None and len(tokens) != sequence_length:
        raise DataError(
            f"{location} has {len(tokens)} tokens, data.sequence_length={sequence_length}: "
            f"write data.sequence_length={len(tokens)}"
        )
    if not len(tokens):
        raise DataError(f"{location}: tokens.npy is empty: build the shard again")
    if tokens.min() < 0:
        raise DataError(f"{location}: token {tokens.min()} is negative: build the shard again")
    if vocab_size is not None and tokens.max() >= vocab_size:
        raise DataError(
            f"{location} has token {tokens.max()}, model.vocab_size={vocab_size}: "
            f"write model.vocab_size={tokens.max() + 1} or more"
        )
    if loss_mask.dtype != bool or loss_mask.shape != tokens.shape:
        raise DataError(
            f"{location}: loss_mask.npy must hold booleans [{len(tokens)}], not {loss_mask.dtype} {list(loss_mask.shape)}"
        )
    if not loss_mask[1:].any():  # the first token is never predicted
        raise DataError(f"{location}: loss_mask.npy marks no token after the first: there is nothing to learn from")
    check_answers(answers, loss_mask, location)
    if "probes.npy" not in members:
        return Sample(tokens, loss_mask, answers)
    probes = _array(members, "probes.npy", location)
    check_probes(probes, loss_mask, location)
    return Sample(tokens, loss_mask, answers, probes)


class Location:
    """A sample's shard and key, formatted only for a message: finding the key costs more than reading the sample."""

    def __init__(self, members: dict[str, object]):
        self._members = members

    def __str__(self) -> str:
        return f"{self._members['__url__']}: sample {self._members['__key__']}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def array_of(data: bytes, name: str, location: object) -> np.ndarray:
    """The array in a .npy file's bytes. Raises DataError."""
    return _array({name: data}, name, location)


def _array(members: dict[str, object], name: str, location: object) -> np.ndarray:
    if name not in members:
        raise DataError(f"{location} has no {name}: a sample holds {', '.join(MEMBERS[:3])}, or tokens.npy alone")
    try:
        data: Any = members[name]  # bytes
        start = 10 + int.from_bytes(data[8:10], "little")  # of the numbers, after a version 1.0 header
        shape, order, dtype = _read_header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    except Exception as error:  # of many kinds: NumPy parses a header as Python
        raise DataError(f"{location}: {name} is not a NumPy array ({_one_line(error)})") from None


@lru_cache(maxsize=256)
def _read_header(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """A .npy file's shape, order and type. Each header is parsed once: parsing takes longer than all checks."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the format")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, "F" if is_fortran else "C", dtype


def check_answers(answers: np.ndarray, loss_mask: np.ndarray, location: object, name: str = "answers.npy") -> None:
    """Raises DataError unless the rows of `answers` lie in the loss mask."""
    if answers.ndim != 2 or answers.shape[1] != 3 or answers.dtype.kind not in "iu":
        raise DataError(
            f"{location}: {name} must hold integer rows (start, stop, depth), not {answers.dtype} {list(answers.shape)}"
        )
    for start, stop, _ in answers.tolist():
        if not (1 <= start < stop <= len(loss_mask) and loss_mask[start:stop].all()):
            raise DataError(f"{location}: {name} names tokens {start}..{stop - 1}, which are not all loss tokens")


def check_probes(probes: np.ndarray, loss_mask: np.ndarray, location: object, name: str = "probes.npy") -> None:
    """Raises DataError unless the rows of `probes` rise, and what bears loss in them is predicted in them."""
    if probes.ndim != 2 or probes.shape[1] != 2 or probes.dtype.kind not in "iu":
        raise DataError(
            f"{location}: {name} must hold integer rows (start, stop), not {probes.dtype} {list(probes.shape)}"
        )
    before = 0
    for start, stop in probes.tolist():
        if not before <= start < stop - 1 < len(loss_mask):
            raise DataError(
                f"{location}: {name} names tokens {start}..{stop - 1}: probes follow each other in a sample of "
                f"{len(loss_mask)} tokens, each with a question and an answer"
            )
        # Predicted in a probe are its own tokens after the first; its last token and the one before it predict nothing.
        for token, what in ((start, "the first of a probe"), (stop, "the first after a probe")):
            if token < len(loss_mask) and loss_mask[token]:
                raise DataError(f"{location}: token {token} is {what} and cannot be a loss token: nothing predicts it")
        before = stop
