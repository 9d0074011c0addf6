"""Vocabularies for text: bytes, a Hugging Face tokenizer.json, or a tiktoken encoding. Nothing here imports torch."""

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from powernap.train.data.sample import DataError


def use_threads(count: int) -> None:
    """Tokenize on so many cores, in this process and those that it starts. Counts until the first text is tokenized."""
    os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = str(count > 1).lower()


def threads() -> int:
    return int(os.environ.get("RAYON_NUM_THREADS", "1"))


def token_array(tokens: list[int]) -> np.ndarray:
    """uint32 [n]; four times as fast as NumPy reads a list."""
    return np.frombuffer(array("I", tokens), np.uint32)


class Detokenizer(Protocol):
    """Turns tokens into text one by one, in units that are final: characters, or words."""

    def step(self, token: int) -> Sequence[str]: ...

    def finish(self) -> Sequence[str]:
        """The units that were held back, waiting for more tokens."""


class Tokenizer(Protocol):
    """Text as tokens. An end token closes a document, pad tokens fill a sequence: the model's own ids, or new ones."""

    vocab_size: int  # the largest id, plus one
    end: int
    pad: int
    appended_from: int  # the end token's id in shards built before a model's own was used
    notes: list[str]  # what differs from the tokenizer's own settings, and where end and pad come from
    separable: bool  # a text cut at a line end or before a word has the tokens of the whole

    def encode(self, text: str) -> list[int]:
        """Raises DataError for a text that no tokens represent unambiguously."""

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray | DataError]:
        """The tokens of each text, unsigned integers [n], or the error that `encode` raises for it."""

    def encode_template(self, text: str) -> list[int]:
        """As `encode`, but the tokenizer's special tokens in it are these."""

    def difference(self, text: str, tokens: list[int]) -> str:
        """The first place where the tokens decode to another text; empty if they decode to the same."""

    def use(self, end: int, pad: int) -> None:
        """Use the end and pad that shards were built with."""

    def token_name(self, token: int) -> str: ...

    def detokenizer(self) -> Detokenizer: ...


class _WithEndAndPad:
    """End and pad are the tokenizer's own, each with its origin, or the next free ids.

    Args:
        size: the largest id of the vocabulary, plus one.
        count: of its tokens; smaller where ids have gaps.
    """

    notes: list[str]
    separable = True

    def __init__(
        self,
        name: str,
        size: int,
        count: int | None = None,
        end: tuple[int, str] | None = None,
        pad: tuple[int, str] | None = None,
    ):
        self.vocab_size, self.appended_from = size, size if count is None else count
        self.end, end_origin = end or (size, "added: it has none")
        self.pad, pad_origin = pad or (max(size, self.end + 1), "added: it has none of its own")
        self.use(self.end, self.pad)
        self.notes = [
            f"tokenizer={name}: {size} ids; a document ends with {self.end} ({end_origin}), pads are {self.pad} ({pad_origin})"
        ]

    def use(self, end: int, pad: int) -> None:
        self.end, self.pad, self.vocab_size = end, pad, max(self.vocab_size, end + 1, pad + 1)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray | DataError]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> np.ndarray | DataError:
        try:
            return token_array(self.encode(text))
        except DataError as error:
            return error

    def encode_template(self, text: str) -> list[int]:
        return self.encode(text)

    def difference(self, text: str, tokens: list[int]) -> str:
        return ""

    def token_name(self, token: int) -> str:
        """A token for display, with visible spaces and line breaks."""
        if token in (self.end, self.pad):
            return "[end]" if token == self.end else "[pad]"
        return self._name(token).replace("\n", "\\n").replace(" ", "_")

    def detokenizer(self) -> Detokenizer:
        return _Utf8Detokenizer(self._spelled)

    def _name(self, token: int) -> str:
        raise NotImplementedError

    def _bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def _is_text(self, token: int) -> bool:
        return token < self.vocab_size and token not in (self.end, self.pad)

    def _spelled(self, token: int) -> bytes:
        if not self._is_text(token):  # a model may have more tokens than its vocabulary
            return (self.token_name(token) if token < self.vocab_size else f"<{token}>").encode()
        return self._bytes(token)


class _Utf8Detokenizer:
    """Bytes as characters: a character waits for its last byte, invalid UTF-8 becomes U+FFFD."""

    def __init__(self, spelled: Callable[[int], bytes]):
        self._spelled = spelled
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def step(self, token: int) -> str:
        return self._decode(self._spelled(token))

    def finish(self) -> str:
        return self._decode(b"", final=True)


class Bytes(_WithEndAndPad):
    """UTF-8."""

    def __init__(self):
        super().__init__("bytes", 256)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encoded(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def _name(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 or token == 10 else f"<{token:02x}>"

    def _bytes(self, token: int) -> bytes:
        return bytes([token])


class Ids(_WithEndAndPad):
    """Tokens of which nothing but their number is known; they are shown as numbers."""

    def __init__(self, count: int):
        super().__init__(f"ids:{count}", count)

    def encode(self, text: str) -> list[int]:
        raise DataError("is text, and tokenizer=ids:... knows numbers alone: write the tokenizer that made them")

    def _name(self, token: int) -> str:
        return f"<{token}>"

    def _bytes(self, token: int) -> bytes:
        return f"<{token}>".encode()


# Names of end and pad tokens in published tokenizers; the first one present is used.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>")
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>", "<|PAD_TOKEN|>")
_SAMPLE = "Émile paid １２ ﬁne  Ducats"


class HuggingFace(_WithEndAndPad):
    """A tokenizer.json as a plain vocabulary: nothing is truncated, padded or added; special tokens in a text are text.

    End and pad are those named in tokenizer_config.json or special_tokens_map.json beside it, or special tokens with
    well-known names.

    Raises:
        DataError: if a file cannot be read.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Loaded

        self._path = path
        try:
            self._tokenizer = Loaded.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"tokenizer={path}: cannot be read ({' '.join(str(error).split())})") from None
        self._tokenizer.encode_special_tokens = True
        changes = self._switch_off()
        settings = json.loads(self._tokenizer.to_str())
        special = {token["content"]: token["id"] for token in settings["added_tokens"] if token["special"]}
        unknown = self._unknown(settings["model"])
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        end = self._find("eos_token", END_TOKENS, special, ())
        pad = self._find("pad_token", PAD_TOKENS, special, (end and end[0], unknown))
        super().__init__(str(path), max(ids, default=-1) + 1, len(ids), end, pad)
        self._is_control = np.zeros(self.vocab_size, dtype=bool)
        self._is_control[[*({*special.values()} - {unknown} | {self.end, self.pad})]] = True
        self.notes += [f"tokenizer={path}: {change}" for change in changes + self._describe(settings)]
        self.separable = self._is_separable()
        if not self.separable:
            self.notes.append(
                f"tokenizer={path}: its tokens depend on where a text begins, so a document is tokenized in one piece"
            )

    def __reduce__(self):
        return _reloaded, (self._path, self.end, self.pad)  # the library's own pickle forgets encode_special_tokens

    def _is_separable(self) -> bool:
        texts = (("The cat, (it) sat.\n", "On 2 mats;\n"), ("on the", " mat"))
        try:
            return all(self._ids(one + other) == self._ids(one) + self._ids(other) for one, other in texts)
        except DataError:  # a vocabulary without such words
            return False

    def _switch_off(self) -> list[str]:
        """Switch off truncation, padding and dropout; a note on each that was on."""
        tokenizer, changes = self._tokenizer, []
        if tokenizer.truncation:
            changes.append(f"its stored truncation to {tokenizer.truncation['max_length']} tokens is switched off")
            tokenizer.no_truncation()
        if tokenizer.padding:
            changes.append("its stored padding is switched off")
            tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            changes.append(f"its dropout={tokenizer.model.dropout:g} of merges is switched off")
            tokenizer.model.dropout = None
        return changes

    def _describe(self, settings: dict[str, Any]) -> list[str]:
        changes = []
        if names := ", ".join(_types(settings["normalizer"])):
            normal = self._tokenizer.normalizer.normalize_str(_SAMPLE)
            example = f"changes text: '{_SAMPLE}' becomes '{normal}'" if normal != _SAMPLE else "may change text"
            changes.append(f"its normalizer ({names}) {example}")
        if self._tokenizer.num_special_tokens_to_add(is_pair=False):
            names = ", ".join(_types(settings["post_processor"]))
            changes.append(f"its post_processor ({names}) is not applied: no special tokens are added to a document")
        return changes

    def _unknown(self, model: dict[str, Any]) -> int | None:
        if (token := model.get("unk_token")) is not None:
            return self._tokenizer.token_to_id(token)
        return model.get("unk_id")

    def _find(
        self, role: str, names: Sequence[str], special: dict[str, int], taken: Sequence[int | None]
    ) -> tuple[int, str] | None:
        """The id of the token with this role, and its origin; None if there is none, or only one that is `taken`."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            content = _read_settings(self._path.parent / file).get(role)
            content = content.get("content") if isinstance(content, dict) else content
            token = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
            if token is not None and token not in taken:
                return token, f"{content}, the {role} of {file}"
        for content in names:
            if (token := special.get(content)) is not None and token not in taken:
                return token, f"{content}, a special token of its own"
        return None

    def encode(self, text: str) -> list[int]:
        ids = self._ids(text)
        if isinstance(found := self._checked(ids), DataError):
            raise found
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray | DataError]:
        try:  # without offsets, a fifth faster
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # the library does not say of which text
            return super().encode_batch(texts)
        return [self._checked(encoding.ids) for encoding in encodings]

    def _checked(self, ids: list[int]) -> np.ndarray | DataError:
        tokens = token_array(ids)
        control = self._is_control[tokens]
        if not control.any():
            return tokens
        name = self._tokenizer.id_to_token(int(tokens[control.argmax()]))
        return DataError(f"holds '{name}' as text, which tokenizer={self._path} cannot tell from its special token")

    def encode_template(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return self._ids(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def _ids(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises Exception itself, such as for an unknown word without unk_token
            raise DataError(f"cannot be tokenized by {self._path} ({' '.join(str(error).split())})") from None

    def difference(self, text: str, tokens: list[int]) -> str:
        decoded = self._tokenizer.decode(tokens, skip_special_tokens=False)
        if decoded == text:
            return ""
        pairs = enumerate(zip(text, decoded, strict=False))
        first = next((n for n, (one, other) in pairs if one != other), min(len(text), len(decoded)))
        shown = slice(max(0, first - 10), first + 10)
        return f"{text[shown]!r} became {decoded[shown]!r}"

    def _is_text(self, token: int) -> bool:
        return super()._is_text(token) and self._tokenizer.id_to_token(token) is not None  # ids may have gaps

    def _name(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False) if self._is_text(token) else f"<{token}>"

    def detokenizer(self) -> Detokenizer:
        return _HuggingFaceDetokenizer(self._tokenizer, self._spelled, self._is_text)


def _reloaded(path: Path, end: int, pad: int) -> HuggingFace:
    tokenizer = HuggingFace(path)
    tokenizer.use(end, pad)
    return tokenizer


def _types(part: dict[str, Any] | None) -> list[str]:
    """The type of a normalizer or post-processor, or the types of its steps."""
    if part is None:
        return []
    steps = part.get("normalizers") or part.get("processors") or []
    return [name for step in steps for name in _types(step)] or [part["type"]]


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    return settings if isinstance(settings, dict) else {}


class _HuggingFaceDetokenizer:
    """Decodes with the library: only it knows how neighbouring tokens join."""

    def __init__(self, tokenizer, spelled: Callable[[int], bytes], is_text: Callable[[int], bool]):
        self._tokenizer, self._spelled, self._is_text = tokenizer, spelled, is_text
        self.finish()

    def step(self, token: int) -> str:
        if not self._is_text(token):
            return self.finish() + self._spelled(token).decode()
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # the library's own, for tokens that are not UTF-8
            return self.finish() + "\ufffd"

    def finish(self) -> str:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=False)
        return ""


class Tiktoken(_WithEndAndPad):
    """A tiktoken encoding by name, such as gpt2 or o200k_base; fetched once and cached."""

    def __init__(self, name: str):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except ValueError:
            names = ", ".join(tiktoken.list_encoding_names())
            raise DataError(f"tokenizer=tiktoken:{name}: no such encoding: choose one of {names}") from None
        except OSError as error:  # requests' errors are OSErrors
            raise DataError(f"tokenizer=tiktoken:{name}: cannot be fetched ({type(error).__name__})") from None
        has_end = "<|endoftext|>" in self._encoding.special_tokens_set
        end = (self._encoding.eot_token, "<|endoftext|>, its own") if has_end else None
        super().__init__(f"tiktoken:{name}", self._encoding.n_vocab, end=end)

    def encode(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            raise _panic(error) from None

    def _encoded(self, text: str) -> np.ndarray | DataError:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            return _panic(error)

    def encode_template(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def _name(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # some ids are unused
            return f"<{token}>".encode()


def _panic(error: BaseException) -> DataError:
    """Raises `error` unless it is tiktoken's; a panic of its regex engine, as on a million blanks, is no Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return DataError(f"cannot be tokenized by tiktoken ({' '.join(str(error).split())})")
    raise error


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: bytes, ids:N, tiktoken:NAME, or the path of a tokenizer.json.

    Raises:
        DataError: if there is none.
    """
    try:
        if name == "bytes":
            return Bytes()
        if re.fullmatch(r"ids:[1-9]\d{0,9}", name):
            return Ids(int(name.removeprefix("ids:")))
        if name.startswith("tiktoken:"):
            return Tiktoken(name.removeprefix("tiktoken:"))
        if Path(name).is_file():
            return HuggingFace(Path(name))
    except ImportError as error:
        raise DataError(f"tokenizer={name}: needs {error.name}: pip install 'powernap[text]'") from None
    raise DataError(f"tokenizer={name}: write bytes, ids:N, tiktoken:NAME or the path of a tokenizer.json")
