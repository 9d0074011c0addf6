"""A corpus: input files, the tokenizer that reads them, and the share that is held out.

A subclass says what is made of the documents: text.py cuts them into sequences, gsm_infinite.py makes a sample of each.
"""

import zlib
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from powernap.model.section import Section
from powernap.train.data.documents import Part, Piece, Reader, Tally
from powernap.train.data.input_files import find_files
from powernap.train.data.sample import DataError, Documents
from powernap.train.data.tokenizer import Tokenizer, load_tokenizer
from powernap.train.paths import SharedPath
from powernap.train.tasks.sample import Sample


class Corpus(Section):
    """Which files to read, and how."""

    name: ClassVar[str]  # of the task, as `powernap data build` and a manifest call it
    holds: ClassVar[str | None] = None  # what a manifest says of the samples (manifest.DOCUMENTS); None: sequences

    inputs: SharedPath | list[SharedPath] = Field(
        description="folder, file, glob or URL (http, and s3, gs, hf, ... with fsspec's packages), or a list of them: .txt, .jsonl, .arrow "
        "(each also .gz, .zst or .bz2), .parquet, Megatron's .bin beside .idx, datatrove's .ds, and .tar by name"
    )
    tokenizer: SharedPath = Field(
        "bytes",
        description="bytes, tiktoken:NAME, the path of a Hugging Face tokenizer.json, or ids:N for tokens below N without text",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a document that cannot be used stops the build, or is reported and skipped"
    )
    skip_budget: int = Field(100, ge=0, description="with on_error=skip: documents a build may do without")
    window: int
    test_share: float
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
        """The end and pad tokens of shards that were built from this corpus; None if none are built yet."""
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
    @abstractmethod
    def sequence_length(self) -> int:
        """T."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """As a task's (task.py)."""

    def token_name(self, token: int) -> str:
        return self.vocabulary.token_name(token)

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """What reads the documents of a file."""

    @abstractmethod
    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample | Documents]]:
        """Split, key within the split and sample, of all documents in `parts`.

        Raises:
            DataError: naming the place of a document that cannot be used and is not to be skipped.
        """

    def tally(self) -> Tally:
        return Tally(self.skip_budget if self.on_error == "skip" else None)

    def files(self) -> tuple[list[str], dict[str, list[Path]]]:
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

    def _split(self, head: bytes) -> str:
        """Whether a document that begins with `head` is for training or test: the same in every build."""
        return "test" if zlib.crc32(head) % 10_000 < 10_000 * self.test_share else "train"

    def _tokens(self, piece: Piece, text: str) -> list[int]:
        """The tokens of `text`, which is of `piece` or about it."""
        try:
            return self.vocabulary.encode(text)
        except DataError as error:
            raise DataError(f"{piece} {error}") from None

    def _read(self, piece: Piece, text: str, tally: Tally) -> list[int]:
        """The tokens of `text`, which is of `piece`; of some it is counted whether they decode to another."""
        tokens = self._tokens(piece, text)
        if tally.to_decode(len(text)):
            tally.decode(piece, self.vocabulary.difference(text, tokens))
        return tokens
