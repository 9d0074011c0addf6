"""A sample in a shard: up to four .npy members, or tokens.npy alone, checked against the recipe when it is read.

docs/data.md documents the format. No torch here.
"""

import io
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from powernap.model.errors import PowernapError
from powernap.train.tasks.sample import Sample

MEMBERS = ("tokens.npy", "loss_mask.npy", "answers.npy", "probes.npy")  # the last one is optional


class DataError(PowernapError):
    """Shards that cannot be read or do not fit the recipe: one line naming shard, field and what to write."""


def encode(key: str, sample: Sample) -> dict[str, object]:
    """A sample as WebDataset's TarWriter takes it."""
    arrays = dict(zip(MEMBERS, (sample.tokens, sample.loss_mask, sample.answers, sample.probes), strict=True))
    if not len(sample.probes):
        del arrays["probes.npy"]
    return {"__key__": key, **arrays}


def decode(members: dict[str, object], sequence_length: int | None = None, vocab_size: int | None = None) -> Sample:
    """Read and check one sample.

    Args:
        members: __key__, __url__ and the bytes of each member, as WebDataset groups them.
        sequence_length, vocab_size: None for any.

    Raises:
        DataError: if a member is missing or damaged, or does not fit data.sequence_length or model.vocab_size.
    """
    location = _Location(members)
    tokens = _array(members, "tokens.npy", location)
    if members.keys() & {*MEMBERS[1:]}:
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
    _check_answers(answers, loss_mask, location)
    if "probes.npy" not in members:
        return Sample(tokens, loss_mask, answers)
    probes = _array(members, "probes.npy", location)
    _check_probes(probes, loss_mask, location)
    return Sample(tokens, loss_mask, answers, probes)


class _Location:
    """A sample's shard and key, formatted only for a message: finding the key costs more than reading the sample."""

    def __init__(self, members: dict[str, object]):
        self._members = members

    def __str__(self) -> str:
        return f"{self._members['__url__']}: sample {self._members['__key__']}"


def _array(members: dict[str, object], name: str, location: _Location) -> np.ndarray:
    if name not in members:
        raise DataError(f"{location} has no {name}: a sample holds {', '.join(MEMBERS[:3])}, or tokens.npy alone")
    try:
        data: Any = members[name]  # bytes
        start = 10 + int.from_bytes(data[8:10], "little")  # of the numbers, after a version 1.0 header
        shape, order, dtype = _read_header(data[:start])
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    except Exception as error:  # of many kinds: NumPy parses a header as Python
        raise DataError(f"{location}: {name} is not a NumPy array ({' '.join(str(error).split())})") from None


@lru_cache(maxsize=256)
def _read_header(header: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """A .npy file's shape, order and type. Each header is parsed once: parsing takes longer than all checks."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the format")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, "F" if is_fortran else "C", dtype


def _check_answers(answers: np.ndarray, loss_mask: np.ndarray, location: _Location) -> None:
    if answers.ndim != 2 or answers.shape[1] != 3 or answers.dtype.kind not in "iu":
        raise DataError(
            f"{location}: answers.npy must hold integer rows (start, stop, depth), "
            f"not {answers.dtype} {list(answers.shape)}"
        )
    for start, stop, _ in answers.tolist():
        if not (1 <= start < stop <= len(loss_mask) and loss_mask[start:stop].all()):
            raise DataError(f"{location}: answers.npy names tokens {start}..{stop - 1}, which are not all loss tokens")


def _check_probes(probes: np.ndarray, loss_mask: np.ndarray, location: _Location) -> None:
    if probes.ndim != 2 or probes.shape[1] != 2 or probes.dtype.kind not in "iu":
        raise DataError(
            f"{location}: probes.npy must hold integer rows (start, stop), not {probes.dtype} {list(probes.shape)}"
        )
    before = 0
    for start, stop in probes.tolist():
        if not before <= start < stop - 1 < len(loss_mask):
            raise DataError(
                f"{location}: probes.npy names tokens {start}..{stop - 1}: probes follow each other in a sample of "
                f"{len(loss_mask)} tokens, each with a question and an answer"
            )
        # Predicted in a probe are its own tokens after the first; its last token and the one before it predict nothing.
        for token, what in ((start, "the first of a probe"), (stop, "the first after a probe")):
            if token < len(loss_mask) and loss_mask[token]:
                raise DataError(f"{location}: token {token} is {what} and cannot be a loss token: nothing predicts it")
        before = stop
