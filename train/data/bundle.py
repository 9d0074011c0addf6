"""Tokenized documents as samples of bounded size: many short ones in a sample, a long one in several. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from powernap.train.data.sample import Documents

SAMPLE_TOKENS = 2**16  # so many that a tar's headers do not count, so few that a sample is read at once


class Bundle:
    """Gathers documents of one split; each sample comes with its key."""

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype
        self._whole: list[_Tokens] = []  # documents that wait for a sample
        self._whole_tokens = 0
        self._open: list[_Tokens] = []  # pieces of the document that has not ended
        self._waiting = 0  # tokens of them
        self._part: int | None = None  # of the open document's next sample; None: it is in no sample yet
        self._number = 0

    def add(self, tokens: np.ndarray, ends: bool, loss: bool = True) -> Iterator[tuple[str, Documents]]:
        """Take the next tokens of a document, `ends` with its last. Yields the samples that are full.

        loss: whether they bear loss.
        """
        if len(tokens):
            self._open.append(_Tokens(tokens.astype(self._dtype), None if loss else np.zeros(len(tokens), bool)))
            self._waiting += len(tokens)
        if self._waiting >= SAMPLE_TOKENS:
            yield from self._all_whole()
            together = self._join(self._open)
            full = self._waiting - self._waiting % SAMPLE_TOKENS
            for start in range(0, full, SAMPLE_TOKENS):
                yield self._next_part(together[start : start + SAMPLE_TOKENS])
            self._open, self._waiting = [together[full:]] if full < self._waiting else [], self._waiting - full
        if ends:
            yield from self._end()

    def rest(self) -> Iterator[tuple[str, Documents]]:
        """The last samples; a document that has not ended continues in another shard."""
        yield from self._end()
        yield from self._all_whole()

    def _end(self) -> Iterator[tuple[str, Documents]]:
        document = self._join(self._open)
        self._open, self._waiting = [], 0
        if self._part is not None:
            if len(document):
                yield self._next_part(document)
            self._part, self._number = None, self._number + 1
        elif len(document):
            self._whole.append(document)
            self._whole_tokens += len(document)
            if self._whole_tokens >= SAMPLE_TOKENS:
                yield from self._all_whole()

    def _next_part(self, tokens: "_Tokens") -> tuple[str, Documents]:
        self._part = 0 if self._part is None else self._part + 1
        return f"{self._number:06d}-part{self._part:06d}", tokens.sample([len(tokens)], self._part)

    def _all_whole(self) -> Iterator[tuple[str, Documents]]:
        if self._whole:
            yield f"{self._number:06d}", self._join(self._whole).sample(list(map(len, self._whole)))
            self._whole, self._whole_tokens, self._number = [], 0, self._number + 1

    def _join(self, parts: list["_Tokens"]) -> "_Tokens":
        if len(parts) == 1:
            return parts[0]
        tokens = np.concatenate([np.zeros(0, self._dtype), *(part.tokens for part in parts)])
        if all(part.loss is None for part in parts):
            return _Tokens(tokens)
        return _Tokens(tokens, np.concatenate([part.bears_loss() for part in parts]))


@dataclass(frozen=True)
class _Tokens:
    tokens: np.ndarray
    loss: np.ndarray | None = None  # bool [n]: which of them bear loss; None: all

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> "_Tokens":
        return _Tokens(self.tokens[where], None if self.loss is None else self.loss[where])

    def bears_loss(self) -> np.ndarray:
        return np.ones(len(self), bool) if self.loss is None else self.loss

    def sample(self, lengths: list[int], part: int = 0) -> Documents:
        spans = None
        if self.loss is not None and not self.loss.all():
            borders = np.flatnonzero(np.diff(self.loss, prepend=False, append=False))
            spans = borders.reshape(-1, 2).astype(np.uint32)
        return Documents(self.tokens, np.array(lengths, np.uint32), spans, part)
