"""Text for next-token training: documents, tokenized and split into train and test, many to a sample.

An end token closes each document. Nothing is cut: sequences are made of the documents when they are read, as the recipe
says (sequences.py). A hash of its content assigns a document to train or test.
"""

import hashlib
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.train.data.bundle import Bundle
from powernap.train.data.conversations import ASSISTANT, TEMPLATES, Turn, around, turns_of
from powernap.train.data.corpus import Corpus
from powernap.train.data.documents import HEAD, Part, Piece, Reader, Tally, Tokens, bytes_at_once, field_of, read_object
from powernap.train.data.input_files import kind_of
from powernap.train.data.manifest import DOCUMENTS, SPLITS
from powernap.train.data.sample import DataError, Documents, token_type
from powernap.train.data.tokenizer import token_array
from powernap.train.data.unique import HASH

# Split and tokens of a document, whether it ends with them, whether they bear loss.
_Piece = tuple[str, np.ndarray, bool, bool]
# Split and a piece of a document, or why it cannot be used, or whether the document ends with those before.
_Read = tuple[str, Piece | Tokens | DataError | bool]
MOST_READ = 1024  # pieces that wait to be tokenized


class Text(Corpus):
    """Which text to read, and the sizes that the recipe may begin with."""

    name: ClassVar[str] = "text"
    holds: ClassVar[str | None] = DOCUMENTS

    text_field: str = Field(
        "text",
        description="what holds the text, or tokens as whole numbers: a field of .jsonl, a column of .parquet and .arrow (nested: "
        "a.b), a member of .tar (txt, tokens.npy, json.text)",
    )
    answer_field: str | None = Field(
        None, description="of records with a question in text_field: where the answer is, which alone bears the loss"
    )
    chat_field: str | None = Field(
        None,
        description="of records with a conversation: where its list of {role, content} or {from, value} is; what the assistant says "
        "bears the loss. Both want data.documents=separate",
    )
    turn: str = Field(
        "plain",
        description="a turn of a conversation or question: plain, chatml, or a text with {role} and {content} of your own; special tokens "
        "in it are the tokenizer's, in a content they are text",
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
    min_tokens: int = Field(
        1, ge=1, description="a document with fewer tokens, its end among them, is left out and counted"
    )
    max_tokens: int | None = Field(None, ge=1, description="and so is one with more; null: none is")
    unique: bool = Field(
        False,
        description="of documents with the same tokens the first is kept, in the order of the files; the others are left out and "
        "counted. A .txt that is one document is then not divided between shards",
    )
    test_share: float = Field(0.01, ge=0, lt=1, description="documents held out for the test")

    @model_validator(mode="after")
    def _conversations_fit(self) -> Self:
        if self.answer_field and self.chat_field:
            raise ValueError("answer_field and chat_field are both given: records hold questions or conversations")
        if TEMPLATES.get(self.turn, self.turn).count("{content}") != 1:
            raise ValueError(f"turn={self.turn}: write {', '.join(TEMPLATES)} or a text with one {{content}}")
        return self

    @property
    def sequence_length(self) -> int:
        """T: whole windows of inputs, and one more token as the last target."""
        return self.window * self.windows + 1

    @property
    def context_length(self) -> None:
        """Every window has loss tokens."""

    @cached_property
    def reader(self) -> Reader:
        fields = (
            [self.chat_field] if self.chat_field else [self.text_field, self.answer_field] if self.answer_field else []
        )
        return Reader(
            self.text_field,
            self.txt_document,
            whole=self.documents == "whole" or self.unique or not self.vocabulary.separable,
            one_piece=not self.vocabulary.separable,
            columns=tuple(dict.fromkeys(field.partition(".")[0] for field in fields if field)),
        )

    def files(self) -> tuple[list[str], dict[str, list[Path]]]:
        """See `find_files`. Raises DataError for what holds no records, if conversations are wanted."""
        files, left_out = super().files()
        if self.reader.columns:
            for file in files:
                if kind_of(file)[0] not in (".jsonl", ".parquet", ".arrow"):
                    raise DataError(f"{file}: no .jsonl, .parquet or .arrow, which hold conversations and questions")
        return files, left_out

    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Documents]]:
        bundles = {split: Bundle(token_type(self.vocab_size)) for split in SPLITS}
        pieces = self._bearing_loss(parts, tally)
        if self.min_tokens > 1 or self.max_tokens is not None:
            pieces = self._of_fitting_length(pieces, tally)
        if self.unique:
            pieces = self._hashed(pieces, tally)
        for split, tokens, ends, loss in pieces:
            for key, sample in bundles[split].add(tokens, ends, loss):
                yield split, key, sample
        for split, bundle in bundles.items():
            yield from ((split, key, sample) for key, sample in bundle.rest())

    def _of_fitting_length(self, pieces: Iterator[_Piece], tally: Tally) -> Iterator[_Piece]:
        """The pieces of documents whose length is allowed; no more than `max_tokens` wait for a document's end."""
        held: list[_Piece] = []
        count, dropped = 0, False
        for piece in pieces:
            _, tokens, ends, _ = piece
            held.append(piece)
            count += len(tokens)
            if self.max_tokens is not None and count > self.max_tokens:
                held, dropped = [], True
            if ends and (dropped or count < self.min_tokens):
                tally.leave_out("more than max_tokens" if dropped else "fewer than min_tokens")
                held = []
            elif count >= self.min_tokens and (ends or self.max_tokens is None):
                yield from held
                held = []
            if ends:
                held, count, dropped = [], 0, False
        yield from held  # of a document that continues in the next shard

    def _hashed(self, pieces: Iterator[_Piece], tally: Tally) -> Iterator[_Piece]:
        """The same pieces, while the tally gets the hash of each document."""
        digest = hashlib.blake2b(digest_size=HASH.itemsize)
        for piece in pieces:
            split, tokens, ends, _ = piece
            digest.update(tokens.astype("<u4").tobytes())
            if ends:
                tally.hashes.setdefault(split, []).append(digest.digest())
                digest = hashlib.blake2b(digest_size=HASH.itemsize)
            yield piece

    def _bearing_loss(self, parts: list[Part], tally: Tally) -> Iterator[_Piece]:
        """`_tokenized`, and whether the tokens bear loss."""
        if not self.reader.columns:
            yield from ((*piece, True) for piece in self._tokenized(parts, tally))
            return
        for record in itertools.chain.from_iterable(self.reader.raw(part, tally) for part in parts):
            try:
                if isinstance(record, DataError):
                    raise record
                assert isinstance(record, Piece), "records are read as JSON"
                turns = self._turns(record)
                pieces = list(self._conversation(record, turns, tally))
            except DataError as error:
                tally.skip(error)
                continue
            split = self._split("".join(turn.content for turn in turns).encode()[:HEAD])
            tally.documents += 1
            for tokens, loss in pieces:
                yield split, token_array(tokens), False, loss
            yield split, token_array([self.vocabulary.end]), True, turns[-1].role == ASSISTANT

    def _turns(self, record: Piece) -> list[Turn]:
        fields = read_object(record)
        if self.chat_field:
            return turns_of(field_of(fields, self.chat_field, record, "chat_field"), record)
        assert self.answer_field
        question = field_of(fields, self.text_field, record)
        answer = field_of(fields, self.answer_field, record, "answer_field")
        return turns_of([{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}], record)

    def _conversation(self, record: Piece, turns: list[Turn], tally: Tally) -> Iterator[tuple[list[int], bool]]:
        """Tokens of what stands around each turn's content, and of the content; whether they bear loss."""
        for role, content in turns:
            before, after = around(self.turn, role)
            loss = role == ASSISTANT
            yield self.vocabulary.encode_template(before), False
            yield self._read(record, content, tally), loss
            yield self.vocabulary.encode_template(after), loss  # so that the end of an answer is learned

    def _tokenized(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, np.ndarray, bool]]:
        """Split and tokens of each document, a piece at a time, and whether it ends with them."""
        end = token_array([self.vocabulary.end])
        held: np.ndarray | None = None  # the piece before, of the same document: it may be the last
        for batch in self._batches(parts, tally):
            for (split, piece), tokens in zip(batch, self._encoded(batch), strict=True):
                if isinstance(tokens, DataError):
                    tally.skip(tokens)
                elif tokens is not None:
                    if isinstance(piece, Piece):
                        self._count(split, piece, tokens, tally)
                    if held is not None:
                        yield split, held, False
                    held = tokens
                elif held is not None:
                    if piece:
                        tally.documents += 1
                        held = held if held[-1:].tolist() == end.tolist() else np.concatenate((held, end))
                    yield split, held, bool(piece)
                    held = None

    def _batches(self, parts: list[Part], tally: Tally) -> Iterator[list[_Read]]:
        """What is read, in order, so much at a time as is tokenized at once; of each document at last whether it ends here."""
        batch: list[_Read] = []
        size = 0
        for document in itertools.chain.from_iterable(self.reader.documents(part, tally) for part in parts):
            if isinstance(document, DataError):
                batch.append(("", document))
                continue
            split = self._split(document.head)
            for piece in document.pieces:
                batch.append((split, piece))
                size += 0 if isinstance(piece, DataError) else len(piece.data)
                if size >= bytes_at_once() or len(batch) > MOST_READ:
                    yield batch
                    batch, size = [], 0
            batch.append((split, document.ends))
        yield batch

    def _encoded(self, batch: list[_Read]) -> list[np.ndarray | DataError | None]:
        """The tokens of each piece in a batch, or why it cannot be used; None for a document's end."""
        found: list[np.ndarray | DataError | None] = []
        texts: dict[int, str] = {}
        for number, (_, piece) in enumerate(batch):
            tokens: np.ndarray | DataError | None = None
            try:
                if isinstance(piece, Tokens):
                    tokens = self._known(piece)
                elif isinstance(piece, Piece):
                    texts[number] = piece.text()
            except DataError as error:
                tokens = error
            found.append(piece if isinstance(piece, DataError) else tokens)
        for number, encoded in zip(texts, self.vocabulary.encode_batch(list(texts.values())), strict=True):
            piece = batch[number][1]
            found[number] = DataError(f"{piece} {encoded}") if isinstance(encoded, DataError) else encoded
        return found

    def _count(self, split: str, piece: Piece, tokens: np.ndarray, tally: Tally) -> None:
        """Count the text of a piece; of some it is counted, too, whether its tokens decode to another."""
        tally.text_bytes[split] = tally.text_bytes.get(split, 0) + len(piece.data)
        if tally.to_decode(len(piece.data)):
            tally.decode(piece, self.vocabulary.difference(piece.text(), tokens.tolist()))

    def _known(self, piece: Tokens) -> np.ndarray:
        """A document that is tokens already. Raises DataError for tokens that the vocabulary does not have."""
        if (largest := int(piece.tokens.max())) >= self.vocab_size:
            raise DataError(
                f"{piece} has token {largest}, tokenizer={self.tokenizer} counts {self.vocab_size}: write the tokenizer that "
                f"made them, or tokenizer=ids:{largest + 1}"
            )
        return piece.tokens
