"""Text for next-token training: documents split into train and test, tokenized, and cut into sequences.

An end token closes each document. Packed documents follow each other and are cut every T-1 tokens; a sequence begins
with the last token of the one before, so that every token is a target once. Whole documents are cut separately, the
last sequence padded, for training that carries the fast weights from one sequence to the next. A hash of its content
assigns a document to train or test.
"""

import itertools
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from powernap.model.section import Section
from powernap.train.data.documents import Document, Part, Piece, Reader, Tally
from powernap.train.data.input_files import find_files
from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import Tokenizer, load_tokenizer
from powernap.train.paths import SharedPath
from powernap.train.tasks.sample import Sample


class Text(Section):
    """Which text to read, and how to cut it."""

    inputs: SharedPath | list[SharedPath] = Field(
        description="folder, file or glob of .txt, .jsonl (both also .gz, .zst or .bz2) and .parquet, or a list of them"
    )
    tokenizer: SharedPath = Field(
        "bytes", description="bytes, tiktoken:NAME, or the path of a Hugging Face tokenizer.json"
    )
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
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a document that cannot be used stops the build, or is reported and skipped"
    )
    skip_budget: int = Field(100, ge=0, description="with on_error=skip: documents a build may do without")
    _ids: tuple[int | None, int | None] | None = PrivateAttr(None)  # end and pad that shards were built with

    @model_validator(mode="after")
    def _some_input(self) -> Self:
        if not self.inputs:
            raise ValueError("inputs is empty: write a folder, such as inputs=corpus")
        return self

    @cached_property
    def vocabulary(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.tokenizer)
        if self._ids:
            end, pad = self._ids
            end = tokenizer.appended_from if end is None else end
            tokenizer.use(end, end + 1 if pad is None else pad)
        return tokenizer

    @property
    def ids(self) -> tuple[int | None, int | None] | None:
        """The end and pad tokens of shards that were built from this text; None if none are built yet."""
        return self._ids

    def built_with(self, end: int | None, pad: int | None) -> Self:
        """Decode with the end and pad tokens of existing shards. None: those that older builds appended."""
        self._ids = end, pad
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    @property
    def pad_token_id(self) -> int:
        return self.vocabulary.pad

    @property
    def sequence_length(self) -> int:
        """T: whole windows of inputs, and one more token as the last target."""
        return self.window * self.windows + 1

    @property
    def context_length(self) -> None:
        """Every window has loss tokens."""

    def token_name(self, token: int) -> str:
        return self.vocabulary.token_name(token)

    @cached_property
    def reader(self) -> Reader:
        return Reader(
            self.text_field, self.txt_document, whole=self.documents == "whole" or not self.vocabulary.separable
        )

    def tally(self) -> Tally:
        return Tally(self.skip_budget if self.on_error == "skip" else None)

    def files(self) -> tuple[list[Path], dict[str, list[Path]]]:
        """See `find_files`."""
        return find_files([self.inputs] if isinstance(self.inputs, str) else self.inputs)

    def jobs(self, size: int) -> list[tuple[list[Part], int]]:
        """The input in pieces of about `size` bytes, one per shard: (parts, bytes)."""
        jobs: list[tuple[list[Part], int]] = []
        parts, total = [], 0
        for file in self.files()[0]:
            for part, weight in self.reader.parts(file, size, check=self.on_error == "stop"):
                parts.append(part)
                total += weight
                if total >= size:
                    jobs.append((parts, total))
                    parts, total = [], 0
        return jobs + ([(parts, total)] if parts else [])

    def digest(self, parts: list[Part]) -> str:
        """A hash of the content of the parts, wherever it lies in them; equal to tally.digest after reading them."""
        tally = self.tally()
        for part in parts:
            for _ in self.reader.raw(part, tally):
                pass
        return tally.digest.hexdigest()

    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        """Split, key within the split and sample, of all documents in `parts`.

        Raises:
            DataError: naming the place of a document that cannot be used and is not to be skipped.
        """
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
            split = "test" if zlib.crc32(document.head) % 10_000 < 10_000 * self.test_share else "train"
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
                tokens = self._encode(piece, tally)
            except DataError as error:
                tally.skip(error)
            else:
                yield tokens

    def _encode(self, piece: Piece, tally: Tally) -> list[int]:
        text = piece.text()
        try:
            tokens = self.vocabulary.encode(text)
        except DataError as error:
            raise DataError(f"{piece} {error}") from None
        if difference := self.vocabulary.difference(text, tokens):
            tally.change(piece, difference)
        return tokens

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
