"""Vocabularies for text: bytes, a Hugging Face tokenizer.json, or one of tiktoken's. Nothing here imports torch."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from powernap.train.data.sample import DataError


class Decoder(Protocol):
    """Tokens back to text, one after the other, in units that are never taken back: characters, or words."""

    def step(self, token: int) -> Sequence[str]: ...

    def finish(self) -> Sequence[str]:
        """What was held back for want of more tokens."""


class Tokenizer(Protocol):
    """Text as tokens. Two more tokens follow the vocabulary's own: the end of a document, and the pad."""

    vocab_size: int  # with both
    end: int
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def token_name(self, token: int) -> str: ...

    def decoder(self) -> Decoder: ...


class _WithEndAndPad:
    def __init__(self, own: int):
        self.end, self.pad, self.vocab_size = own, own + 1, own + 2

    def token_name(self, token: int) -> str:
        """A token as a person reads it; spaces and line breaks are shown."""
        if token in (self.end, self.pad):
            return "[end]" if token == self.end else "[pad]"
        return self._name(token).replace("\n", "\\n").replace(" ", "_")

    def decoder(self) -> Decoder:
        return _Utf8Decoder(self._spelled)

    def _spelled(self, token: int) -> bytes:
        if token >= self.end:  # a model may have more tokens than its vocabulary
            return (self.token_name(token) if token < self.vocab_size else f"<{token}>").encode()
        return self._bytes(token)


class _Utf8Decoder:
    """Bytes as characters: a character waits for its last byte, what is no UTF-8 becomes U+FFFD."""

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
        super().__init__(256)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _name(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 or token == 10 else f"<{token:02x}>"

    def _bytes(self, token: int) -> bytes:
        return bytes([token])


class HuggingFace(_WithEndAndPad):
    """A tokenizer.json; special tokens of its own are not added to a document."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Loaded

        try:
            self._tokenizer = Loaded.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"tokenizer={path}: cannot be read ({' '.join(str(error).split())})") from None
        super().__init__(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _name(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def decoder(self) -> Decoder:
        return _HuggingFaceDecoder(self._tokenizer, self._spelled, self.end)


class _HuggingFaceDecoder:
    """Only the library knows what its tokens are next to each other."""

    def __init__(self, tokenizer, spelled: Callable[[int], bytes], end: int):
        self._tokenizer, self._spelled, self._end = tokenizer, spelled, end
        self.finish()

    def step(self, token: int) -> str:
        if token >= self._end:
            return self.finish() + self._spelled(token).decode()
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # the library's own, where tokens are no UTF-8
            return self.finish() + "\ufffd"

    def finish(self) -> str:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=False)
        return ""


class Tiktoken(_WithEndAndPad):
    """One of tiktoken's encodings by name, such as gpt2 or o200k_base; it is fetched once, and kept."""

    def __init__(self, name: str):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding(name)
        except ValueError:
            names = ", ".join(tiktoken.list_encoding_names())
            raise DataError(f"tokenizer=tiktoken:{name}: no such encoding: choose one of {names}") from None
        except OSError as error:  # requests' errors are OSErrors
            raise DataError(f"tokenizer=tiktoken:{name}: cannot be fetched ({type(error).__name__})") from None
        super().__init__(self._encoding.n_vocab)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _name(self, token: int) -> str:
        return self._encoding.decode([token])

    def _bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # some numbers stand for nothing
            return f"<{token}>".encode()


def load_tokenizer(name: str) -> Tokenizer:
    """The vocabulary that a name stands for: bytes, tiktoken:NAME, or the path of a tokenizer.json.

    Raises:
        DataError: if there is none.
    """
    try:
        if name == "bytes":
            return Bytes()
        if name.startswith("tiktoken:"):
            return Tiktoken(name.removeprefix("tiktoken:"))
        if Path(name).is_file():
            return HuggingFace(Path(name))
    except ImportError as error:
        raise DataError(f"tokenizer={name}: needs {error.name}: pip install 'powernap[text]'") from None
    raise DataError(f"tokenizer={name}: write bytes, tiktoken:NAME or the path of a tokenizer.json")
