"""A shard as the sequences that a recipe reads: those that are stored, or documents cut to its length. No torch here.

Documents are cut when they are read. The cut is a function of the tokens of a shard's documents and of the recipe's
fields alone, so order, cursors and resume are those of stored sequences.

Packed documents follow each other in the order of the shard and are cut every T-1 tokens; a sequence begins with the last
token of the one before, so that every token is a target once. Whole documents are cut separately, for training that
carries the fast weights from one sequence to the next. The last sequence of a shard, or of a whole document, is padded.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Self

import numpy as np

from powernap.model.config import ModelConfig
from powernap.train.config import DataConfig
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from powernap.train.data.tar_index import no_samples
from powernap.train.tasks.sample import Sample


class Cutting(NamedTuple):
    """How documents become sequences."""

    sequence_length: int | None  # T; None: as stored, not for documents
    documents: Literal["packed", "whole"] = "packed"
    pad_token_id: int | None = None  # fills the end of a sequence that is not a target; None: any token would do
    vocab_size: int | None = None  # None: any

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig) -> Self:
        return cls(data.sequence_length, data.documents, model.pad_token_id, model.vocab_size)


def cut(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut stretches of tokens that follow each other into sequences; each begins with the last token of the one before.

    Args:
        lengths: int64 [d], tokens of each stretch; one without a second token has no sequence.

    Returns:
        int64 [n] each: the first token of a sequence, the one behind its last, its number within the stretch
    """
    counts = (lengths + sequence_length - 3) // (sequence_length - 1)
    parts = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    ends = lengths.cumsum()
    starts = np.repeat(ends - lengths, counts) + parts * (sequence_length - 1)
    return starts, np.minimum(starts + sequence_length, np.repeat(ends, counts)), parts


class Sequences:
    """The sequences of a shard by number."""

    def __init__(self, shard: Shard, cutting: Cutting):
        """Raises DataError if the shard's documents cannot be read."""
        self.shard, self.name, self.damage, self._cutting = shard, shard.name, shard.damage, cutting
        self._parts = shard.parts
        if shard.holds_documents:
            assert cutting.sequence_length
            self._ends = shard.tokens.cumsum()
            stretches = document_lengths(shard) if cutting.documents == "whole" else self._ends[-1:]
            self._starts, self._stops, parts = cut(stretches, cutting.sequence_length)
            self._parts = parts if cutting.documents == "whole" else np.zeros_like(parts)

    @classmethod
    def open(cls, name: str, cache: ShardCache, cutting: Cutting, keep_readable: bool = False) -> Self:
        """As Shard.open."""
        shard = Shard.open(name, cache, keep_readable)
        try:
            return cls(shard, cutting)
        except DataError as damage:
            if not keep_readable:
                raise
            return cls(Shard(name, None, no_samples(), str(damage)), cutting)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Sample:
        """A sequence, checked.

        Raises:
            DataError: if it is malformed, or does not fit data.sequence_length or model.vocab_size.
        """
        length, _, pad, vocab_size = self._cutting
        if not self.shard.holds_documents:
            return decode(self.shard[number], length, vocab_size)
        assert length
        start, stop = int(self._starts[number]), int(self._stops[number])
        tokens = np.full(length, pad or 0, dtype=np.int64)
        loss_mask = np.zeros(length, dtype=bool)
        for sample, first, last, at in self._pieces(start, stop):
            here = slice(at, at + last - first)
            tokens[here] = self.shard.read_tokens(sample, first, last)
            spans = self.shard.loss_spans(sample)
            for loss_start, loss_stop in spans[(spans[:, 1] > first) & (spans[:, 0] < last)].clip(first, last) - first:
                loss_mask[here][loss_start:loss_stop] = True
            largest = int(tokens[here].max())
            if vocab_size is not None and largest >= vocab_size:
                raise DataError(
                    f"{self.shard.location(sample)} has token {largest}, model.vocab_size={vocab_size}: write "
                    f"model.vocab_size={largest + 1} or more"
                )
        loss_mask[0] = False  # nothing precedes it
        return Sample(tokens, loss_mask, np.zeros((0, 3), np.int32))

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """Of tokens start..stop-1 of the shard: (sample, first token in it, the one behind the last, place from `start`)."""
        pieces, at = [], start
        while at < stop:
            sample = int(np.searchsorted(self._ends, at, side="right"))
            end = int(self._ends[sample])
            before = end - int(self.shard.tokens[sample])
            last = min(stop, end)
            pieces.append((sample, at - before, last - before, at - start))
            at = last
        return pieces

    @property
    def padded(self) -> int:
        """Tokens that only fill the sequences that documents are cut into."""
        assert self.shard.holds_documents and self._cutting.sequence_length
        return len(self) * self._cutting.sequence_length - int((self._stops - self._starts).sum())

    @property
    def documents(self) -> np.ndarray:
        """The first sequence of each document, in rising order; packed sequences count as a document each."""
        return np.flatnonzero(self._parts == 0)

    def begins_document(self, number: int) -> bool:
        return bool(self._parts[number] == 0)

    def names(self, numbers: list[int]) -> list[str]:
        """What sequences are called in messages: reads all headers again, once for all of them."""
        if not self.shard.holds_documents:
            return self.shard.keys(numbers)
        firsts = [self._pieces(int(self._starts[n]), int(self._stops[n]))[0][:2] for n in numbers]
        keys = self.shard.keys([sample for sample, _ in firsts])
        return [f"{key} from token {first}" for key, (_, first) in zip(keys, firsts, strict=True)]


def document_lengths(shard: Shard) -> np.ndarray:
    """int64 [d]: the tokens of each document of a shard, parts put together."""
    lengths: list[np.ndarray] = []
    for number, part in enumerate(shard.parts.tolist()):
        if part and lengths:
            lengths[-1] = lengths[-1] + shard.tokens[number]
        else:
            lengths.append(shard.lengths(number))
    found = np.concatenate(lengths)
    if found.sum() != shard.tokens.sum():  # the index is of another file
        raise DataError(f"{shard.name}: the tokens of its documents do not add up: build or copy it again")
    return found
