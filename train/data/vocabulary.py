"""The vocabulary of shards, from the corpus or task that their manifest records. No torch here."""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from powernap.model.plugins import PluginError
from powernap.train.config import DataConfig
from powernap.train.data.corpora import CORPORA
from powernap.train.data.corpus import Corpus
from powernap.train.data.manifest import MANIFEST, end_and_pad, read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.data.task import Task
from powernap.train.data.tokenizer import Detokenizer, Tokenizer
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks import task_kind

MOST_WORDS = 2**20
_WORD = re.compile(r"\[[^\[\]]*\]|\S+")  # [hop 3] is one word


class UnknownTask(DataError):
    """Shards of a task whose package is not installed here, in one line."""


class Vocabulary(Protocol):
    """Prompts as tokens, and tokens for display: as characters, or as words with blanks between them."""

    end: int | None  # the token that nothing follows
    joiner: str  # between units

    def encode(self, text: str) -> list[int]: ...

    def units(self, text: str) -> Sequence[str]:
        """The text, split into the units of the detokenizer."""

    def detokenizer(self) -> Detokenizer: ...


class TextVocabulary:
    """Text, shown a character at a time."""

    joiner = ""

    def __init__(self, tokenizer: Tokenizer):
        self.end: int | None = tokenizer.end
        self.encode, self.detokenizer = tokenizer.encode, tokenizer.detokenizer

    def units(self, text: str) -> str:
        return text


class Words:
    """Words as `powernap data inspect` shows them, one per token.

    Args:
        names: the words of all tokens, in order.
    """

    joiner = " "

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._tokens = {name: token for token, name in enumerate(names)}
        self.end = self._tokens.get("[end]")

    def encode(self, text: str) -> list[int]:
        """Raises DataError for an unknown word."""
        return [self._token(word) for word in self.units(text)]

    def units(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def detokenizer(self) -> Detokenizer:
        return self

    def step(self, token: int) -> list[str]:
        return [self._names[token] if token < len(self._names) else f"<{token}>"]

    def finish(self) -> list[str]:
        return []

    def _token(self, word: str) -> int:
        if word not in self._tokens:
            near = difflib.get_close_matches(word, self._tokens, 3) or list(self._names[1:6])
            raise DataError(f"unknown word '{word}': the run's data has words such as {', '.join(near)}")
        return self._tokens[word]


class Numbers:
    """Tokens shown as numbers, if nothing records what they stand for."""

    end: int | None = None
    joiner = " "

    def __init__(self, why: str):
        self._why = why

    def encode(self, text: str) -> list[int]:
        raise DataError(f"{self._why}: write the prompt as --tokens 1,2,3")

    def units(self, text: str) -> list[str]:
        return text.split()

    def detokenizer(self) -> Detokenizer:
        return self

    def step(self, token: int) -> list[str]:
        return [str(token)]

    def finish(self) -> list[str]:
        return []


def find_vocabulary(data: DataConfig) -> Vocabulary:
    """The vocabulary of the training shards, if known and shared by all datasets of a mixture; else numbers."""
    try:
        return vocabulary_of(find_task(data))
    except DataError as error:
        return Numbers(str(error))


def find_task(data: DataConfig) -> Task | Corpus:
    """The corpus or task that the training shards were built from; for a mixture, any of them: they share a vocabulary.

    Raises:
        DataError: if no manifest records it, or several vocabularies are mixed.
    """
    vocabularies = {}
    for name, (spec, _) in data.datasets.items():
        field = f"data.train.{name}" if name else "data.train"
        path = local_path(expand_shards(spec, field)[0])
        task = described_by(read_manifest(path)) if path else None
        if task is None:
            raise DataError(f"{field}={spec}: no {MANIFEST} beside the shards says what their tokens stand for")
        vocabularies[name] = f"{task.tokenizer} {task.ids}" if isinstance(task, Corpus) else repr(task)
    if len(set(vocabularies.values())) > 1:
        raise DataError(f"data.train mixes vocabularies ({', '.join(vocabularies)})")
    assert task is not None
    return task


def vocabulary_of(task: Task | Corpus) -> Vocabulary:
    """Raises DataError if a corpus's tokenizer cannot be read, or there are too many words."""
    if isinstance(task, Corpus):
        return TextVocabulary(task.vocabulary)
    if task.vocab_size > MOST_WORDS:
        raise DataError(f"{MANIFEST}: a vocabulary of {task.vocab_size:,} words")
    return Words([task.token_name(token) for token in range(task.vocab_size)])


def described_by(manifest: dict) -> Task | Corpus | None:
    """The corpus or task that shards were built from; None if unknown.

    Raises:
        UnknownTask: if the task is not installed here.
        DataError: if it does not accept the recorded fields.
    """
    name = manifest.get("task")
    if name is None:
        return None
    try:
        task = check(CORPORA.get(name) or task_kind(name), manifest.get("fields"))
    except PluginError as error:
        raise UnknownTask(f"{MANIFEST}: {error}") from None
    except RecipeError as error:
        raise DataError(f"{MANIFEST}: {error}") from None
    return task.built_with(*end_and_pad(manifest)) if isinstance(task, Corpus) else task


def depth_name_of(manifest: dict | None) -> str:
    """What the depth of a task's answers counts; "depth" if its package is not installed here."""
    with suppress(DataError):
        return getattr(described_by(manifest or {}), "depth_name", "depth")
    return "depth"
