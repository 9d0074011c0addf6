"""Text for next-token training: documents, tokenized and split into train and test, many to a sample.

An end token closes each document. Nothing is cut: sequences are made of the documents when they are read, as the recipe
says (sequences.py). A hash of its content assigns a document to train or test.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from powernap.train.data.bundle import Bundle
from powernap.train.data.corpus import Corpus
from powernap.train.data.documents import Document, Part, Piece, Reader, Tally, Tokens
from powernap.train.data.manifest import DOCUMENTS, SPLITS
from powernap.train.data.sample import DataError, Documents, token_type


class Text(Corpus):
    """Which text to read, and the sizes that the recipe may begin with."""

    name: ClassVar[str] = "text"
    holds: ClassVar[str | None] = DOCUMENTS

    text_field: str = Field(
        "text",
        description="what holds the text, or tokens as whole numbers: a field of .jsonl, a column of .parquet and .arrow (nested: "
        "a.b), a member of .tar (txt, tokens.npy, json.text)",
    )
    txt_document: Literal["file", "paragraph", "line"] = Field(
        "file", description="what a document of a .txt is: the file, a paragraph between blank lines, or a line"
    )
    window: int = Field(256, ge=1, description="L in the lines for the recipe, which may take another")
    windows: int = Field(4, ge=1, description="windows in a sequence there")
    documents: Literal["packed", "whole"] = Field(
        "packed",
        description="data.documents there. whole: no document is divided between shards, so that it can be carried to its end; "
        "packed: a .txt above --shard-size is",
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

    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Documents]]:
        bundles = {split: Bundle(token_type(self.vocab_size)) for split in SPLITS}
        for split, tokens, ends in self._tokenized(parts, tally):
            yield from ((split, key, sample) for key, sample in bundles[split].add(tokens, ends))
        for split, bundle in bundles.items():
            yield from ((split, key, sample) for key, sample in bundle.rest())

    def _tokenized(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, list[int], bool]]:
        """Split and tokens of each document, a piece at a time, and whether it ends with them."""
        for document in itertools.chain.from_iterable(self.reader.documents(part, tally) for part in parts):
            if isinstance(document, DataError):
                tally.skip(document)
                continue
            split = self._split(document.head)
            used = False
            for tokens in self._pieces(document, split, tally):
                used = True
                yield split, tokens, False
            if used and document.ends:
                tally.documents += 1
                yield split, [] if tokens[-1:] == [self.vocabulary.end] else [self.vocabulary.end], True

    def _pieces(self, document: Document, split: str, tally: Tally) -> Iterator[list[int]]:
        for piece in document.pieces:
            try:
                if isinstance(piece, DataError):
                    raise piece
                tokens = self._known(piece) if isinstance(piece, Tokens) else self._read(piece, piece.text(), tally)
            except DataError as error:
                tally.skip(error)
            else:
                if isinstance(piece, Piece):
                    tally.text_bytes[split] = tally.text_bytes.get(split, 0) + len(piece.data)
                yield tokens

    def _known(self, piece: Tokens) -> list[int]:
        """A document that is tokens already. Raises DataError for tokens that the vocabulary does not have."""
        if (largest := int(piece.tokens.max())) >= self.vocab_size:
            raise DataError(
                f"{piece} has token {largest}, tokenizer={self.tokenizer} counts {self.vocab_size}: write the tokenizer that "
                f"made them, or tokenizer=ids:{largest + 1}"
            )
        return piece.tokens.tolist()
