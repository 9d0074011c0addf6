"""Tokenized documents as samples of bounded size: many short ones in a sample, a long one in several. No torch here."""

from array import array
from collections.abc import Iterator

import numpy as np

from powernap.train.data.sample import Documents

SAMPLE_TOKENS = 2**16  # so many that a tar's headers do not count, so few that a sample is read at once


class Bundle:
    """Gathers documents of one split; each sample comes with its key."""

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype
        self._whole: list[np.ndarray] = []  # documents that wait for a sample
        self._open: list[np.ndarray] = []  # pieces of the document that has not ended
        self._part: int | None = None  # of the open document's next sample; None: it is in no sample yet
        self._number = 0

    def add(self, tokens: list[int] | np.ndarray, ends: bool) -> Iterator[tuple[str, Documents]]:
        """Take the next tokens of a document, `ends` with its last. Yields the samples that are full."""
        if isinstance(tokens, list):  # four times as fast as NumPy reads a list
            tokens = np.frombuffer(array("I", tokens), np.uint32)
        if len(tokens):
            self._open.append(tokens.astype(self._dtype))
        while sum(map(len, self._open)) >= SAMPLE_TOKENS:
            yield from self._all_whole()
            together = np.concatenate(self._open)
            self._open = [together[SAMPLE_TOKENS:]] if len(together) > SAMPLE_TOKENS else []
            yield self._next_part(together[:SAMPLE_TOKENS])
        if ends:
            yield from self._end()

    def rest(self) -> Iterator[tuple[str, Documents]]:
        """The last samples; a document that has not ended goes on in another shard."""
        yield from self._end()
        yield from self._all_whole()

    def _end(self) -> Iterator[tuple[str, Documents]]:
        document = np.concatenate([np.zeros(0, self._dtype), *self._open])
        self._open = []
        if self._part is not None:
            if len(document):
                yield self._next_part(document)
            self._part, self._number = None, self._number + 1
        elif len(document):
            self._whole.append(document)
            if sum(map(len, self._whole)) >= SAMPLE_TOKENS:
                yield from self._all_whole()

    def _next_part(self, tokens: np.ndarray) -> tuple[str, Documents]:
        self._part = 0 if self._part is None else self._part + 1
        lengths = np.array([len(tokens)], np.uint32)
        return f"{self._number:06d}-part{self._part:06d}", Documents(tokens, lengths, part=self._part)

    def _all_whole(self) -> Iterator[tuple[str, Documents]]:
        if self._whole:
            lengths = np.array([len(document) for document in self._whole], np.uint32)
            yield f"{self._number:06d}", Documents(np.concatenate(self._whole), lengths)
            self._whole, self._number = [], self._number + 1
