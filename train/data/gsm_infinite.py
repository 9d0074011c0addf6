"""GSM-Infinite as its authors publish it (arXiv 2502.05252), in lines of JSON or rows of Parquet: a sample of each.

    question problem [pad ...]              | Answer: N [end] [pad ...]
    whole windows                           | answer_length tokens, loss on N and [end]

A line or row has the fields problem, question, solution and op; others are ignored. The question comes first, so that
a reader knows what matters. The answer is the number that ends the solution, whose steps are not shown. An answer's
depth is op, the authors' count of operations. A hash of the problem assigns it to train or test.
"""

import itertools
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.train.data.corpus import Corpus
from powernap.train.data.documents import Part, Piece, Reader, Tally, read_object
from powernap.train.data.input_files import kind_of
from powernap.train.data.sample import DataError
from powernap.train.paths import SharedPath
from powernap.train.tasks.sample import Sample

FIELDS: dict[str, type] = {"problem": str, "question": str, "solution": str, "op": int}
CUE = "Answer:"
_ANSWER = re.compile(r"Answer: (-?\d+)\.?\s*\Z")  # both of the authors' generators end a solution so


class GsmInfinite(Corpus):
    """Which lines to read, and the sizes of their samples."""

    name: ClassVar[str] = "gsm_infinite"
    depth_name: ClassVar[str] = "operations"

    inputs: SharedPath | list[SharedPath] = Field(
        description="folder, file or glob of .jsonl (also .gz, .zst or .bz2) and .parquet, or a list of them"
    )
    window: int = Field(2000, ge=1, description="L")
    windows: int = Field(2, ge=1, description="windows of question and problem; a longer problem cannot be used")
    answer_length: int = Field(16, ge=2, description="tokens of 'Answer:', the answer and the end token, at most")
    test_share: float = Field(0.2, ge=0, le=1, description="problems held out for the test; 1: all")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.answer_length > self.window:
            raise ValueError(f"answer_length={self.answer_length} must not exceed window={self.window}")
        return self

    @property
    def context_length(self) -> int:
        return self.window * self.windows

    @property
    def sequence_length(self) -> int:
        return self.context_length + self.answer_length

    @cached_property
    def reader(self) -> Reader:
        return Reader("problem", "line", whole=True, columns=tuple(FIELDS))

    def files(self) -> tuple[list[str], dict[str, list[Path]]]:
        """See `find_files`. Raises DataError for what holds no records."""
        files, left_out = super().files()
        for file in files:
            if kind_of(file)[0] not in (".jsonl", ".parquet", ".arrow"):
                raise DataError(f"{file}: no .jsonl, .parquet or .arrow: name it so, or write other inputs=...")
        return files, left_out

    def samples(self, parts: list[Part], tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        number = itertools.count()
        for line in itertools.chain.from_iterable(self.reader.raw(part, tally) for part in parts):
            try:
                if isinstance(line, DataError):
                    raise line
                assert isinstance(line, Piece), "records are read as JSON"
                fields = _fields_of(line)
                sample = self._sample(line, fields, tally)
            except DataError as error:
                tally.skip(error)
            else:
                tally.documents += 1
                yield self._split(fields["problem"].encode()), f"{next(number):06d}", sample

    def _sample(self, line: Piece, fields: dict[str, Any], tally: Tally) -> Sample:
        answer = _answer_of(line, fields["solution"])
        context = self._read(line, f"{fields['question'].strip()} {fields['problem'].strip()}", tally)
        if len(context) > self.context_length:
            raise DataError(
                f"{line} takes {len(context)} tokens, more than windows={self.windows} hold: "
                f"write windows={-(-len(context) // self.window)}"
            )
        cue, reply = self._tokens(line, CUE), self._tokens(line, f"{CUE} {answer}")
        if reply[: len(cue)] != cue:
            raise DataError(
                f"{line}: tokenizer={self.tokenizer} reads '{CUE}' otherwise if ' {answer}' follows: write another tokenizer"
            )
        reply.append(self.vocabulary.end)
        if len(reply) > self.answer_length:
            raise DataError(
                f"{line}: the answer {answer} takes {len(reply)} tokens, more than answer_length={self.answer_length}: "
                f"write answer_length={len(reply)}"
            )
        tokens = np.full(self.sequence_length, self.vocabulary.pad, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        start, stop = self.context_length + len(cue), self.context_length + len(reply)
        tokens[: len(context)], tokens[self.context_length : stop] = context, reply
        loss_mask[start:stop] = True
        return Sample(tokens, loss_mask, np.array([(start, stop, fields["op"])], dtype=np.int32))


def _fields_of(line: Piece) -> dict[str, Any]:
    """Raises DataError unless a line has the published fields."""
    fields = read_object(line)
    for name, kind in FIELDS.items():
        if name not in fields:
            raise DataError(f"{line} has no '{name}': GSM-Infinite's problems have {', '.join(FIELDS)}")
        if type(fields[name]) is not kind or fields[name] == "":
            wanted = "a whole number" if kind is int else "text"
            raise DataError(f"{line}: '{name}' must be {wanted}, not {json.dumps(fields[name])[:40]}")
    if not 0 <= fields["op"] < 2**31:
        raise DataError(f"{line}: 'op' must count operations, not be {fields['op']}")
    return fields


def _answer_of(line: Piece, solution: str) -> int:
    """Raises DataError if a solution does not end with a number, as in the symbolic subset, which lists variables."""
    match = _ANSWER.search(solution)
    if match is None:
        raise DataError(f"{line}: 'solution' must end with '{CUE} N.', as in the medium and hard subsets")
    return int(match[1])
