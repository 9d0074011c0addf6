"""Text for next-token training: documents from files, split into train and test, cut into sequences.

Each document is ended by a token of its own. Packed, they follow each other and are cut every T-1 tokens; a sequence begins
with the last token of the one before, so that every token is a target once. Whole documents are cut each by itself, the
last sequence padded, for training that carries the fast weights from one to the next. A document belongs to train or test
by its content.
"""

import glob
import itertools
import json
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.config import Section
from powernap.train.data.sample import DataError
from powernap.train.data.tokenizer import Tokenizer, load_tokenizer
from powernap.train.paths import SharedPath
from powernap.train.tasks.sample import Sample

SUFFIXES = (".txt", ".jsonl", ".parquet")

# file, and of a .jsonl the bytes [start, stop) in which a line begins, of a .parquet the row groups, of a .txt all
Part = tuple[str, int, int]


class Text(Section):
    """What text to read, and how to cut it."""

    inputs: SharedPath | list[SharedPath] = Field(
        description="folder, file or glob of .txt, .jsonl and .parquet, or a list of them"
    )
    tokenizer: SharedPath = Field(
        "bytes", description="bytes, tiktoken:NAME, or the path of a Hugging Face tokenizer.json"
    )
    text_field: str = Field("text", description="where .jsonl and .parquet keep the text")
    window: int = Field(256, ge=1, description="L")
    windows: int = Field(4, ge=1, description="windows in a sequence")
    documents: Literal["packed", "whole"] = Field(
        "packed", description="packed: one after the other; whole: each in sequences of its own, for sleep.carry"
    )
    test_share: float = Field(0.01, ge=0, lt=1, description="documents held out for the test")

    @model_validator(mode="after")
    def _some_input(self) -> Self:
        if not self.inputs:
            raise ValueError("inputs is empty: write a folder, such as inputs=corpus")
        return self

    @cached_property
    def vocabulary(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

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
        """Every window bears loss."""

    def token_name(self, token: int) -> str:
        return self.vocabulary.token_name(token)

    def files(self) -> list[Path]:
        """All input files, in order.

        Raises:
            DataError: if an entry names none.
        """
        found: list[Path] = []
        for entry in [self.inputs] if isinstance(self.inputs, str) else self.inputs:
            path = Path(entry)
            names = path.rglob("*") if path.is_dir() else map(Path, glob.glob(entry, recursive=True))
            files = sorted(name for name in names if name.suffix in SUFFIXES and name.is_file())
            if not files:
                raise DataError(f"inputs={entry}: no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file there")
            found += files
        return list(dict.fromkeys(found))

    def jobs(self, size: int) -> list[tuple[list[Part], int]]:
        """The input in pieces of about `size` bytes, each to be made into a shard by itself: (parts, bytes)."""
        jobs: list[tuple[list[Part], int]] = []
        parts, total = [], 0
        for part, weight in self._parts(size):
            parts.append(part)
            total += weight
            if total >= size:
                jobs.append((parts, total))
                parts, total = [], 0
        return jobs + ([(parts, total)] if parts else [])

    def _parts(self, size: int) -> Iterator[tuple[Part, int]]:
        for file in self.files():
            total = file.stat().st_size
            if file.suffix == ".jsonl":
                for start in range(0, total, size):
                    stop = min(start + size, total)
                    yield (str(file), start, stop), stop - start
            elif file.suffix == ".parquet":
                groups = _open_parquet(file, self.text_field).num_row_groups
                for group in range(groups):
                    yield (str(file), group, group + 1), total // groups
            else:
                yield (str(file), 0, total), total

    def samples(self, parts: list[Part]) -> Iterator[tuple[str, str, Sample]]:
        """Split, key within the split and sample, of all documents in `parts`."""
        return self._whole(parts) if self.documents == "whole" else self._packed(parts)

    def _packed(self, parts: list[Part]) -> Iterator[tuple[str, str, Sample]]:
        open_tokens: dict[str, list[int]] = {"train": [], "test": []}
        number = itertools.count()
        for split, tokens in self._tokenized(parts):
            open_tokens[split] += tokens
            yield from ((split, f"{next(number):06d}", sample) for sample in self._cut(open_tokens[split], last=False))
        for split, tokens in open_tokens.items():
            yield from ((split, f"{next(number):06d}", sample) for sample in self._cut(tokens, last=True))

    def _whole(self, parts: list[Part]) -> Iterator[tuple[str, str, Sample]]:
        for number, (split, tokens) in enumerate(self._tokenized(parts)):
            for part, sample in enumerate(self._cut(tokens, last=True)):
                yield split, f"{number:06d}-part{part:06d}", sample

    def _tokenized(self, parts: list[Part]) -> Iterator[tuple[str, list[int]]]:
        """Split and tokens of each document."""
        for part in parts:
            for document in self._documents(part):
                data = document.encode()
                split = "test" if zlib.crc32(data) % 10_000 < 10_000 * self.test_share else "train"
                yield split, [*self.vocabulary.encode(document), self.vocabulary.end]

    def _cut(self, tokens: list[int], last: bool) -> Iterator[Sample]:
        """Sequences from the front of `tokens`, which keeps what is left; with `last` that becomes a padded one."""
        while len(tokens) >= self.sequence_length:
            yield self._sample(tokens[: self.sequence_length])
            del tokens[: self.sequence_length - 1]
        if last and len(tokens) > 1:
            yield self._sample(tokens)

    def _sample(self, tokens: list[int]) -> Sample:
        missing = self.sequence_length - len(tokens)
        loss_mask = np.arange(self.sequence_length) < len(tokens)
        loss_mask[0] = False  # nothing precedes it
        padded = np.array(tokens + [self.vocabulary.pad] * missing, dtype=np.int32)
        return Sample(padded, loss_mask, np.zeros((0, 3), np.int32))

    def _documents(self, part: Part) -> Iterator[str]:
        file, start, stop = part
        path = Path(file)
        try:
            if path.suffix == ".txt":
                yield path.read_text(encoding="utf-8")
            elif path.suffix == ".parquet":
                opened = _open_parquet(path, self.text_field)
                for group in range(start, stop):
                    yield from opened.read_row_group(group, columns=[self.text_field])[0].to_pylist()
            else:
                yield from self._lines(path, start, stop)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None

    def _lines(self, path: Path, start: int, stop: int) -> Iterator[str]:
        """The documents of the lines that begin in [start, stop)."""
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()  # the rest of a line that began before
            while file.tell() < stop and (line := file.readline()):
                where = file.tell() - len(line)
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)[self.text_field]
                except (ValueError, TypeError, KeyError):
                    raise DataError(
                        f"{path}: the line at byte {where} is no JSON object with '{self.text_field}': write text_field=..."
                    ) from None
                if not isinstance(document, str):
                    raise DataError(f"{path}: the line at byte {where} has no text in '{self.text_field}'")
                yield document


def _open_parquet(path: Path, field: str):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: no Parquet file ({' '.join(str(error).split())})") from None
    if field not in opened.schema_arrow.names:
        names = ", ".join(opened.schema_arrow.names)
        raise DataError(f"{path}: no column '{field}': write text_field=... with one of {names}")
    return opened
