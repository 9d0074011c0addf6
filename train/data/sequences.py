"""A shard as the sequences that a recipe reads: those that are stored, or documents cut to its length. No torch here.

Documents are cut when they are read. The cut is a function of the tokens of a shard's documents and of the recipe's
fields alone, so order, cursors and resume are those of stored sequences.

Packed documents follow each other in the order of the shard and are cut every T-1 tokens; a sequence begins with the last
token of the one before, so that every token is a target once. Whole documents are cut each by itself, for training that
carries the fast weights from one sequence to the next. The last sequence of a shard, or of a whole document, is padded.

Separate documents share sequences, too, but know nothing of each other: each begins at a window, where fast weights and
attention begin anew, and its last window is padded. One that is longer than a sequence is cut as a whole one, and what is
left of it begins anew. Best fit (Johnson, 1974), the longest first, puts them into sequences.
"""

from collections.abc import Iterator
from dataclasses import replace
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
    documents: Literal["packed", "separate", "whole"] = "packed"
    pad_token_id: int | None = None  # fills the end of a sequence that is not a target; None: any token would do
    vocab_size: int | None = None  # None: any
    window: int | None = None  # L, for separate documents

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig) -> Self:
        return cls(data.sequence_length, data.documents, model.pad_token_id, model.vocab_size, model.window)


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


def pack(lengths: np.ndarray, window: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: put pieces of documents into sequences of whole windows.

    Args:
        lengths: int64 [p], tokens of each piece: at most window * windows, or one more where it fills a sequence.

    Returns:
        int64 [p] each: a piece's sequence, and its first window there
    """
    needed = np.minimum(-(-lengths // window), windows)
    sequence, first = np.zeros_like(needed), np.zeros_like(needed)
    room: list[list[int]] = [[] for _ in range(windows + 1)]  # windows that are free -> sequences
    count = 0
    for piece in np.argsort(-needed, kind="stable").tolist():
        need = int(needed[piece])
        free = next((free for free in range(need, windows) if room[free]), windows)
        if free < windows:
            sequence[piece] = room[free].pop()
        else:
            sequence[piece], count = count, count + 1
        first[piece] = windows - free
        room[free - need].append(int(sequence[piece]))
    return sequence, first


class Sequences:
    """The sequences of a shard by number."""

    def __init__(self, shard: Shard, cutting: Cutting):
        """Raises DataError if the shard's documents cannot be read."""
        self.shard, self.name, self.damage, self._cutting = shard, shard.name, shard.damage, cutting
        self._parts = shard.parts
        if shard.holds_documents:
            assert cutting.sequence_length
            self._ends = shard.tokens.cumsum()
            stretches = self._ends[-1:] if cutting.documents == "packed" else document_lengths(shard)
            self._starts, self._stops, self._parts = cut(stretches, cutting.sequence_length)
            # Of each stretch of tokens: its sequence, and its place there.
            self._rows, self._places = np.arange(len(self._starts)), np.zeros_like(self._starts)
            if cutting.documents == "separate":
                self._pack(cutting.sequence_length - 1, cutting.window)
            elif cutting.documents == "packed":
                self._parts = np.zeros_like(self._parts)

    def _pack(self, inputs: int, window: int | None) -> None:
        """Put the stretches of separate documents together; each begins at a window."""
        assert window and inputs % window == 0
        rows, firsts = pack(self._stops - self._starts, window, inputs // window)
        order = np.lexsort((firsts, rows))
        self._starts, self._stops = self._starts[order], self._stops[order]
        self._rows, self._places = rows[order], firsts[order] * window
        self._parts = np.zeros(int(rows.max(initial=-1)) + 1, dtype=np.int64)

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
        length, mode, pad, vocab_size, _ = self._cutting
        if not self.shard.holds_documents:
            return decode(self.shard[number], length, vocab_size)
        assert length
        tokens = np.full(length, pad or 0, dtype=np.int64)
        loss_mask, document_starts = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
        for sample, first, last, at in self._contents(number):
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
        document_starts[self._places[slice(*self._stretches(number))]] = True
        loss_mask[document_starts] = False  # nothing precedes it
        sequence = Sample(tokens, loss_mask, np.zeros((0, 3), np.int32))
        return replace(sequence, document_starts=document_starts) if mode == "separate" else sequence

    def _stretches(self, number: int) -> tuple[int, int]:
        """The first stretch of tokens in a sequence, and the one behind the last."""
        first, behind = np.searchsorted(self._rows, (number, number + 1))
        return int(first), int(behind)

    def _contents(self, number: int) -> Iterator[tuple[int, int, int, int]]:
        """What a sequence holds, in order: (sample, first token in it, the one behind the last, place in the sequence)."""
        for stretch in range(*self._stretches(number)):
            place = int(self._places[stretch])
            for sample, first, last, at in self._pieces(int(self._starts[stretch]), int(self._stops[stretch])):
                yield sample, first, last, place + at

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
        firsts = [next(self._contents(number))[:2] for number in numbers]
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
