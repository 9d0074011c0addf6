"""Show the content of shards: samples with their windows and loss tokens marked, and statistics of all."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Callable

import numpy as np

from powernap.model.segments import spans
from powernap.train.data.cache import ShardCache
from powernap.train.data.corpus import Corpus
from powernap.train.data.manifest import read_manifest
from powernap.train.data.sequences import Cutting, Sequences, document_lengths
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.data.task import Task
from powernap.train.data.vocabulary import UnknownTask, described_by
from powernap.train.tasks.sample import probes_of

COLUMNS = 80
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
    if (folder := local_path(spec)) and folder.is_dir():
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
    name_token = _names(task) if task else str
    window = window or manifest.get("window")

    samples = ((shard, number) for shard in shards for number in range(len(shard)))
    blocks = [_show(*place, name_token, window) for place in itertools.islice(samples, show)]
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


def _show(shard: Sequences, number: int, name_token: Callable[[int], str], window: int | None) -> str:
    sample = shard[number]
    lines = [f"{shard.names([number])[0]}: {len(sample.tokens)} tokens, *loss tokens* in stars"]
    words = [name_token(int(token)) for token in sample.tokens]
    words = [f"*{word}*" if loss else word for word, loss in zip(words, sample.loss_mask, strict=True)]
    windows = itertools.count()
    for start, stop, probe in spans(len(words), window or len(words), probes_of(sample)):
        # A window predicts if the target of one of its inputs, the next token, is a loss token.
        predicts = sample.loss_mask[start + 1 : stop + 1].any()
        title = "probe: " if probe else f"window {next(windows)}, {'answers' if predicts else 'slept on'}: "
        text = " ".join(_fold(words[start:stop]))
        lines += textwrap.wrap(
            text, COLUMNS, initial_indent=f"  {title}", subsequent_indent="    ", break_on_hyphens=False
        )
    for start, stop, depth in sample.answers.tolist():
        answer = " ".join(name_token(int(token)) for token in sample.tokens[start:stop])
        lines.append(f"  depth {depth}: {answer}  (tokens {start}..{stop - 1})")
    return "\n".join(lines)


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
            f"{tokens:,}, {short if short == long else f'{short} to {long}'} a sample, the largest is {largest}",
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
