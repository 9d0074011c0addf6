"""Show the content of shards: samples with their windows and loss tokens marked, and statistics of all."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Callable

import numpy as np

from powernap.model.segments import spans
from powernap.train.data.cache import ShardCache
from powernap.train.data.corpus import Corpus
from powernap.train.data.manifest import no_shards_yet, read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.sequences import Cutting, Sequences, document_lengths
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.data.task import Task
from powernap.train.data.tokenizer import Tokenizer
from powernap.train.data.vocabulary import UnknownTask, described_by
from powernap.train.tasks.sample import PAD, probes_of

COLUMNS = 80
INDENT = " " * 4
ROWS = 4  # of a window's text
LENGTH = 1025  # of sequences, if no manifest says what documents may be cut to
WINDOW = 256
LONGEST = 2**24


def inspect_shards(
    spec: str, cache: ShardCache, show: int = 2, window: int | None = None, sequence_length: int | None = None
) -> str:
    """A report of at most 80 columns.

    Args:
        spec: shards as a recipe names them, or a folder of them.
        show: sequences to print.
        window: L; None: the one in the manifest.
        sequence_length: T to which documents are cut; None: the one in the manifest.

    Raises:
        DataError: if a shard cannot be read, or a sample is malformed.
    """
    if folder := local_path(spec):
        if message := no_shards_yet(folder):
            raise DataError(message)
        if folder.is_dir():
            spec = f"{folder}/*.tar"
    opened = [Shard.open(name, cache) for name in expand_shards(spec, "SHARDS")]
    assert opened[0].path is not None
    manifest = read_manifest(opened[0].path)
    length = sequence_length or _size(manifest.get("sequence_length")) or LENGTH
    cutting = Cutting(length, pad_token_id=manifest.get("pad_token_id"))
    shards = [Sequences(shard, cutting if shard.holds_documents else Cutting(None)) for shard in opened]
    try:
        task, note = described_by(manifest), []
    except UnknownTask as error:
        task, note = None, [f"tokens are shown as numbers: {error}"]
    window = window or manifest.get("window")

    samples = ((shard, number) for shard in shards for number in range(len(shard)))
    blocks = [_show(*place, task, window) for place in itertools.islice(samples, show)]
    return "\n\n".join([*blocks, *note, _statistics(shards, manifest)])


def suggested_sizes(spec: str) -> tuple[int, int, int | None]:
    """T, L and the pad token of the manifest beside the first of some shards; T and L of text, where there is none."""
    folder = local_path(spec)
    first = f"{folder}/x" if folder and folder.is_dir() else expand_shards(spec, "SHARDS")[0]
    path = local_path(first)
    manifest = read_manifest(path) if path else {}
    length = _size(manifest.get("sequence_length")) or LENGTH
    return length, manifest.get("window") or min(WINDOW, length - 1), manifest.get("pad_token_id")


def _names(task: Task | Corpus) -> Callable[[int], str]:
    """A task's names for its tokens; shards beside a wrong manifest may have more tokens."""
    size = task.vocab_size
    return lambda token: task.token_name(token) if token < size else f"<{token}>"


def _size(value: object) -> int | None:
    return value if type(value) is int and 2 <= value <= LONGEST else None


def _show(shard: Sequences, number: int, task: Task | Corpus | None, window: int | None) -> str:
    sample = shard[number]
    tokens, loss_mask = sample.tokens, sample.loss_mask
    pad = getattr(task, "pad_token_id", PAD)
    everywhere = bool(loss_mask[1:][tokens[1:] != pad].all())
    marks = "loss on all tokens" if everywhere else "*loss tokens* in stars"
    lines = [f"{shard.names([number])[0]}: {len(tokens)} tokens, {marks}"]
    show = _text_of(task.vocabulary, pad) if isinstance(task, Corpus) else _words_of(_names(task) if task else str)
    stars = np.zeros_like(loss_mask) if everywhere else loss_mask
    windows, inputs = itertools.count(), len(tokens) - 1
    for start, stop, probe in spans(inputs, window or inputs, probes_of(sample)):
        # A window predicts if the target of one of its inputs, the next token, is a loss token.
        predicts = loss_mask[start + 1 : stop + 1].any()
        name = "probe" if probe else f"window {next(windows)}"
        if isinstance(task, Corpus) and not len(sample.answers):
            name += "" if predicts else ", no loss"
        elif not probe:
            name += ", answers" if predicts else ", slept on"
        end = len(tokens) if stop == inputs else stop  # the last token is a target only
        lines += show(f"  {name}: ", tokens[start:end], stars[start:end])
    name_token = _names(task) if task else str
    for start, stop, depth in sample.answers.tolist():
        answer = " ".join(name_token(int(token)) for token in tokens[start:stop])
        lines.append(f"  depth {depth}: {answer}  (tokens {start}..{stop - 1})")
    return "\n".join(lines)


def _words_of(name_token: Callable[[int], str]) -> Callable[[str, np.ndarray, np.ndarray], list[str]]:
    """Shows tokens as their names: title, tokens, which bear loss -> lines."""

    def show(title: str, tokens: np.ndarray, loss: np.ndarray) -> list[str]:
        words = [name_token(int(token)) for token in tokens]
        words = [f"*{word}*" if star else word for word, star in zip(words, loss, strict=True)]
        return _wrap(" ".join(_fold(words)), title)

    return show


def _text_of(vocabulary: Tokenizer, pad: int) -> Callable[[str, np.ndarray, np.ndarray], list[str]]:
    """Shows tokens as the beginning of their text, with the lines that it has."""

    def show(title: str, tokens: np.ndarray, loss: np.ndarray) -> list[str]:
        text = ""
        for (is_pad, star), group in itertools.groupby(
            zip(tokens.tolist(), loss, strict=True), lambda t: (t[0] == pad, t[1])
        ):
            run = [token for token, _ in group]
            detokenizer = vocabulary.detokenizer()
            part = "".join([*itertools.chain.from_iterable(map(detokenizer.step, run)), *detokenizer.finish()])
            part = f"[pad] x{len(run)}" if is_pad else part
            text += f"*{part}*" if star else part
        text = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
        rows = [row for line in text.splitlines() for row in textwrap.wrap(line, COLUMNS - len(INDENT)) or [""]]
        more = [f"... {len(rows) - ROWS} lines more"] if len(rows) > ROWS + 1 else []
        return [title.rstrip(), *(f"{INDENT}{row}".rstrip() for row in (rows[:ROWS] + more if more else rows))]

    return show


def _wrap(text: str, title: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=title, subsequent_indent=INDENT, break_on_hyphens=False)


def _fold(words: list[str]) -> list[str]:
    """Fold four or more equal words in a row, such as pads, into one with its count."""
    folded = []
    for word, group in itertools.groupby(words):
        count = len(list(group))
        folded += [f"{word} x{count}"] if count > 3 else [word] * count
    return folded


def _statistics(shards: list[Sequences], manifest: dict) -> str:
    lengths: Counter[int] = Counter()
    depths: Counter[int] = Counter()
    tokens = losses = largest = 0
    for sample in itertools.chain.from_iterable(shards):
        lengths[len(sample.tokens)] += 1
        depths.update(sample.answers[:, 2].tolist())
        tokens += len(sample.tokens)
        losses += int(sample.loss_mask.sum())
        largest = max(largest, int(sample.tokens.max()))
    size = sum(shard.shard.path.stat().st_size for shard in shards if shard.shard.path)
    short, long = min(lengths, default=0), max(lengths, default=0)
    rows = [
        ("shards", f"{len(shards)}, {size / 1e6:.1f} MB"),
        ("samples", f"{sum(lengths.values()):,}"),
        (
            "tokens",
            f"{tokens:,}, {short if short == long else f'{short} to {long}'} a sample; the largest token id is {largest}",
        ),
        ("loss tokens", f"{losses:,}, {losses / max(tokens, 1):.1%}"),
    ]
    if held := [document_lengths(shard.shard) for shard in shards if shard.shard.holds_documents]:
        documents = np.concatenate(held)
        rows.insert(
            1,
            (
                "documents",
                f"{len(documents):,} of {documents.sum():,} tokens, {documents.min():,} to {documents.max():,}, median "
                f"{np.median(documents):,.0f}; {size / documents.sum():.2f} bytes a token. Below, cut into sequences:",
            ),
        )
    if depths:
        most = max(depths.values())
        rows.append(("answers", f"{sum(depths.values()):,}, by depth:"))
        rows += [
            (f"  {depth}", f"{depths[depth]:>8,} {'#' * round(50 * depths[depth] / most)}") for depth in sorted(depths)
        ]
    if manifest:
        rows.append(("built by", manifest.get("command") or "an older version"))
    lines = []
    for name, value in rows:
        lines += textwrap.wrap(
            value, COLUMNS, initial_indent=f"{name:<14}", subsequent_indent=" " * 14, break_on_hyphens=False
        ) or [name]
    return "\n".join(lines)
