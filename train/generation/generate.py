"""Generate from a trained run: streams that read prompts, generate token by token, and can be saved and resumed.

model = load_run("runs/mine")
stream = model.stream()
for piece in stream.generate(["the cat"], max_tokens=20):
    print(piece.text, end="", flush=True)
stream.save("cat.pt")            # later: model.load_stream("cat.pt").generate(...)
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from powernap.model.decoder import Decoder
from powernap.model.errors import PowernapError
from powernap.model.stage import HybridStage
from powernap.parallel.topology import alone
from powernap.train.data.vocabulary import Vocabulary, find_vocabulary
from powernap.train.generation.export import is_exported, load_exported_weights, read_exported
from powernap.train.generation.sampling import draw, token_probabilities
from powernap.train.run.folder import RunFolder

Prompt = str | Sequence[int]  # text, or tokens
FinishReason = Literal["length", "stop", "end"]


class GenerateError(PowernapError):
    """A prompt, an option or a saved state that cannot be used, in one line."""


@dataclass(frozen=True)
class TokenOutput:
    """A generated token, and the text that is final by now."""

    row: int
    token: int
    text: str  # a row's texts concatenate to its whole text; cut before a stop text, without the end token
    finish_reason: FinishReason | None = None  # why this is the row's last token


def load_run(path: Path | str, passes: int | None = None) -> "RunModel":
    """Load the newest valid checkpoint of the run in `path`, or a model that `powernap checkpoint export` wrote there.

    It runs in this process alone, whatever layout it was trained in.

    Args:
        passes: N of every sleep; None: the largest trained one.

    Raises:
        RecipeError, GenerateError, CheckpointError: no run there, no checkpoint, or one of another model.
    """
    if passes is not None and passes < 1:
        raise GenerateError(f"passes={passes}: write 1 or more")
    path = Path(path)
    if is_exported(path):
        exported = read_exported(path)
        model, sleep, name = exported.model, exported.sleep, exported.name
    else:
        folder = RunFolder(path)
        recipe = folder.recipe()
        newest = folder.newest_checkpoint()
        model, sleep, name = recipe.model, recipe.sleep, recipe.run.name
    topology = alone()
    if topology.world_size > 1:
        raise GenerateError(f"generation runs in one process, {topology.world_size} were started: start one")
    stage = HybridStage(model, sleep, topology.groups, draw=False).to(topology.device)
    if is_exported(path):
        load_exported_weights(path, stage)
        vocabulary = exported.vocabulary
    else:
        newest.load_weights(stage, recipe.train.precision)
        vocabulary = find_vocabulary(recipe.data)
    return RunModel(stage, name, passes or max(sleep.pass_choices), vocabulary)


class RunModel:
    """A trained model with its vocabulary.

    Attributes:
        passes: N of every sleep.
        vocabulary: of its tokens.
    """

    def __init__(self, stage: HybridStage, name: str, passes: int, vocabulary: Vocabulary):
        self.stage = stage
        self.name = name
        self.passes = passes
        self.vocabulary = vocabulary

    def stream(self, batch: int = 1, seed: int = 0) -> "Stream":
        """`batch` new streams. Row i draws from seed + i, so a row's output does not depend on the others."""
        return Stream(self, batch, seed)

    def generate(self, prompts: Sequence[Prompt], seed: int = 0, **options) -> Iterator[TokenOutput]:
        """`Stream.generate` with new streams, one per prompt."""
        return self.stream(len(prompts), seed).generate(prompts, **options)

    def load_stream(self, path: Path | str) -> "Stream":
        """The streams that `Stream.save` wrote.

        Raises:
            GenerateError: if the file holds something else, or streams of another model or N.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model, passes, state = saved["model"], saved["passes"], saved["decoder"]
            unread, random = saved["unread"], saved["random"]
        except FileNotFoundError:
            raise GenerateError(f"{path}: no such file: write one with --save-state") from None
        except Exception:  # torch and pickle raise many kinds
            raise GenerateError(f"{path}: not a state that powernap generate saved") from None
        if model != self.fingerprint():
            raise GenerateError(f"{path}: of another model: its run, or checkpoint, is not {self.name}'s newest")
        if passes != self.passes:
            raise GenerateError(
                f"{path}: its windows slept {passes} passes each, not {self.passes}: write --passes {passes}"
            )
        try:
            stream = self.stream(len(random))
            # Older files name conv_state history.
            stream.decoder.load_state({name.replace(".history", ".conv_state"): state[name] for name in state})
            stream.unread = [self.encode(tokens) for tokens in unread]
            for generator, numbers, _ in zip(stream.random, random, unread, strict=True):
                generator.set_state(numbers)
        except Exception:  # many kinds: any value in the file may be wrong
            raise GenerateError(f"{path}: damaged: write one with --save-state") from None
        return stream

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens.

        Raises:
            DataError, GenerateError: for a word or token that the model does not have.
        """
        tokens = self.vocabulary.encode(prompt) if isinstance(prompt, str) else list(prompt)
        size = self.stage.model.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < size]:
            raise GenerateError(f"token {wrong[0]} is none of the model's: they are 0 .. {size - 1}")
        return tokens

    def fingerprint(self) -> str:
        """A hash of all that a saved state depends on: sizes, sleep settings, weights."""
        sleep = self.stage.sleep.model_dump(mode="json", exclude={"passes", "backprop_passes"})
        about = json.dumps([self.stage.model.model_dump(mode="json"), sleep], sort_keys=True)
        digest = hashlib.sha256(about.encode())
        for name, parameter in self.stage.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class Stream:
    """A batch of token streams, each read and written at its own pace.

    Attributes:
        decoder: the model's state after the tokens read; its `feed_with_logits` returns the logits after every token.
        unread: generated tokens of each row that the decoder has not read yet.
        random: the random generator of each row.
    """

    def __init__(self, model: RunModel, batch: int, seed: int):
        self.model = model
        self.decoder = Decoder(model.stage, model.passes, batch)
        self.unread: list[list[int]] = [[] for _ in range(batch)]
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Restart the random generators, row i from seed + i."""
        self.random = [torch.Generator().manual_seed(seed + row) for row in range(self.decoder.batch)]

    def generate(
        self,
        prompts: Sequence[Prompt] | None = None,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> Iterator[TokenOutput]:
        """Read a prompt in every row, then generate up to `max_tokens`; the next call continues there.

        Args:
            prompts: one per row; a row that has read something may have an empty one. None: all are empty.
            max_tokens: 0 only reads the prompts.
            temperature, top_p: see `token_probabilities`; 0 is greedy.
            stop: a row ends when its text, or its words, contain one of these.

        Yields:
            every token, one per active row in turn. A row also ends with the vocabulary's end token.

        Raises:
            DataError, GenerateError: before anything is read.
        """
        if isinstance(prompts, str):
            raise GenerateError(f"prompts is one text: write a list of prompts, such as [{prompts[:20]!r}]")
        if max_tokens < 0:
            raise GenerateError(f"max_tokens={max_tokens}: write 0 or more")
        if temperature < 0:
            raise GenerateError(f"temperature={temperature}: write 0 (the likeliest token) or more")
        if not 0 < top_p <= 1:
            raise GenerateError(f"top_p={top_p}: write more than 0 and at most 1")
        stops = [list(self.model.vocabulary.units(text)) for text in stop]
        if not all(stops):
            raise GenerateError("stop: an empty text would stop at once: leave it out")
        prompts = [()] * self.decoder.batch if prompts is None else prompts
        if len(prompts) != self.decoder.batch:
            raise GenerateError(f"{len(prompts)} prompts for {self.decoder.batch} streams: write one for each, or none")
        tokens = [self.model.encode(prompt) for prompt in prompts]
        for row, length in enumerate(self.decoder.lengths):
            if not (length or self.unread[row] or tokens[row]):
                raise GenerateError("empty prompt: the model needs a token to continue from")
        return self._generate(tokens, max_tokens, temperature, top_p, stops)

    def ask(self, questions: Sequence[Prompt], **options) -> Iterator[TokenOutput]:
        """`generate`, then forget questions and answers: the streams continue as if they had not been asked.

        Abandoned halfway, they are forgotten as well.
        """
        outputs = self.generate(questions, **options)
        unread = [list(row) for row in self.unread]
        random = [generator.get_state() for generator in self.random]
        return self._ask(outputs, unread, random)

    def _ask(
        self, outputs: Iterator[TokenOutput], unread: list[list[int]], random: list[torch.Tensor]
    ) -> Iterator[TokenOutput]:
        self._read_all()
        with self.decoder.forgetting():
            try:
                yield from outputs
            finally:
                self.unread = [[] for _ in unread]
                for generator, state in zip(self.random, random, strict=True):
                    generator.set_state(state)

    def save(self, path: Path | str) -> None:
        """Write the streams to a file: tensors and numbers, no pickled objects. Replaces an existing file at the end.

        Raises:
            GenerateError: if it cannot be written.
        """
        state = {
            "model": self.model.fingerprint(),
            "passes": self.model.passes,
            "decoder": self.decoder.state(),
            "unread": self.unread,
            "random": [generator.get_state() for generator in self.random],
        }
        path = Path(path).resolve()
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(state, unfinished)
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise GenerateError(f"{path}: cannot be written ({reason})") from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _generate(
        self, tokens: list[list[int]], max_tokens: int, temperature: float, top_p: float, stops: list[list[str]]
    ) -> Iterator[TokenOutput]:
        self.unread = [unread + new for unread, new in zip(self.unread, tokens, strict=True)]
        texts = [_Text(self.model.vocabulary, stops) for _ in tokens]
        active = list(range(len(tokens)))
        if not max_tokens:
            self._read_all()
        for turn in range(1, max_tokens + 1):
            # Generated tokens are read only now: a window that they fill sleeps after the answer, not before.
            self._read_all()
            for row in list(active):
                probabilities = token_probabilities(self.decoder.logits[row], temperature, top_p)
                token = draw(probabilities, self.random[row])
                self.unread[row] = [token]
                text, finish_reason = texts[row].add(token, last=turn == max_tokens)
                if finish_reason:
                    active.remove(row)
                yield TokenOutput(row, token, text, finish_reason)
            if not active:
                return

    def _read_all(self) -> None:
        unread, self.unread = self.unread, [[] for _ in self.unread]
        self.decoder.feed(unread)


class _Text:
    """The text of a row, up to its end; units that may begin a stop text are held back."""

    def __init__(self, vocabulary: Vocabulary, stops: list[list[str]]):
        self._end, self._joiner = vocabulary.end, vocabulary.joiner
        self._detokenizer = vocabulary.detokenizer()
        self._stops = stops
        self._held: list[str] = []
        self._begun = False

    def add(self, token: int, last: bool) -> tuple[str, FinishReason | None]:
        """The text that is final now, and why the row ends with this token, if it does."""
        ended = token == self._end
        self._held += self._detokenizer.finish() if ended else self._detokenizer.step(token)
        if last and not ended:
            self._held += self._detokenizer.finish()
        matches = [start for stop in self._stops if (start := _find(self._held, stop)) is not None]
        if matches:
            return self._release(min(matches)), "stop"
        if ended or last:
            return self._release(len(self._held)), "end" if ended else "length"
        return self._release(
            len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ), None

    def _release(self, count: int) -> str:
        units, self._held = self._held[:count], self._held[count:]
        text = (self._joiner if self._begun and units else "") + self._joiner.join(units)
        self._begun = self._begun or bool(units)
        return text


def _find(units: list[str], stop: list[str]) -> int | None:
    """The index of the first `stop` in `units`."""
    starts = range(len(units) - len(stop) + 1)
    return next((start for start in starts if units[start : start + len(stop)] == stop), None)


def _overlap(units: list[str], stop: list[str]) -> int:
    """How many of the last units may be the beginning of `stop`."""
    lengths = range(min(len(units), len(stop) - 1), 0, -1)
    return next((length for length in lengths if units[len(units) - length :] == stop[:length]), 0)
