"""Text for next-token training: documents split into train and test, tokenized, and cut into sequences.

An end token closes each document. Packed documents follow each other and are cut every T-1 tokens; a sequence begins
with the last token of the one before, so that every token is a target once. Whole documents are cut separately, the
last sequence padded, for training that carries the fast weights from one sequence to the next. A hash of its content
assigns a document to train or test.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from powernap.train.data.corpus import Corpus
from powernap.train.data.documents import Document, Part, Reader, Tally
from powernap.train.data.sample import DataError
from powernap.train.tasks.sample import Sample


class Text(Corpus):
    """Which text to read, and how to cut it."""

    name: ClassVar[str] = "text"

    text_field: str = Field("text", description="where .jsonl and .parquet keep the text")
    txt_document: Literal["file", "paragraph", "line"] = Field(
        "file", description="what a document of a .txt is: the file, a paragraph between blank lines, or a line"
    )
    window: int = Field(256, ge=1, description="L")
    windows: int = Field(4, ge=1, description="windows in a sequence")
    documents: Literal["packed", "whole"] = Field(
        "packed", description="packed: one after the other; whole: each in sequences of its own, for sleep.carry"
    )
    test_share: float = Field(0.01, ge=0, lt=1, description="documents held out for the test")

    @property
    def sequence_length(self) -> int:
        """T: whole windows of inputs, and one more token as the last target."""
        return self.window * self.windows + 1

    @property
    def context_length(self) -> None:
        """Every window has loss tokens."""

    @cached_property
    def reader(self) -> Reader:
        return Reader(
            self.text_field, self.txt_document, whole=self.documents == "whole" or not self.vocabulary.separable
        )

    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        return (self._whole if self.documents == "whole" else self._packed)(parts, tally)

    def _packed(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        open_tokens: dict[str, list[int]] = {"train": [], "test": []}
        number = itertools.count()
        for split, tokens, _ in self._tokenized(parts, tally):
            open_tokens[split] += tokens
            yield from ((split, f"{next(number):06d}", sample) for sample in self._cut(open_tokens[split], last=False))
        for split, tokens in open_tokens.items():
            yield from ((split, f"{next(number):06d}", sample) for sample in self._cut(tokens, last=True))

    def _whole(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        open_tokens: list[int] = []
        number = part = 0
        for split, tokens, ends in self._tokenized(parts, tally):
            open_tokens += tokens
            for sample in self._cut(open_tokens, last=ends):
                yield split, f"{number:06d}-part{part:06d}", sample
                part += 1
            if ends:
                open_tokens, number, part = [], number + 1, 0

    def _tokenized(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, list[int], bool]]:
        """Split and tokens of each document, a piece at a time, and whether it ends with them."""
        for document in itertools.chain.from_iterable(self.reader.documents(part, tally) for part in parts):
            if isinstance(document, DataError):
                tally.skip(document)
                continue
            split = self._split(document.head)
            used = False
            for tokens in self._pieces(document, tally):
                used = True
                yield split, tokens, False
            if used and document.ends:
                tally.documents += 1
                yield split, [self.vocabulary.end], True

    def _pieces(self, document: Document, tally: Tally) -> Iterator[list[int]]:
        for piece in document.pieces:
            try:
                if isinstance(piece, DataError):
                    raise piece
                tokens = self._read(piece, piece.text(), tally)
            except DataError as error:
                tally.skip(error)
            else:
                yield tokens

    def _cut(self, tokens: list[int], last: bool) -> Iterator[Sample]:
        """Cut sequences off the front of `tokens`, which keeps the rest; with `last`, the rest becomes a padded one."""
        start = 0
        while len(tokens) - start >= self.sequence_length:
            yield self._sample(tokens[start : start + self.sequence_length])
            start += self.sequence_length - 1
        del tokens[:start]  # once: each deletion moves all that follow
        if last and len(tokens) > 1:
            yield self._sample(tokens)

    def _sample(self, tokens: list[int]) -> Sample:
        missing = self.sequence_length - len(tokens)
        loss_mask = np.arange(self.sequence_length) < len(tokens)
        loss_mask[0] = False  # nothing precedes it
        padded = np.array(tokens + [self.vocabulary.pad] * missing, dtype=np.int32)
        return Sample(padded, loss_mask, np.zeros((0, 3), np.int32))
