"""What shards hold, by source: documents and their lengths, loss tokens, and what cutting them into sequences cuts and pads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from powernap.train.data.cache import ShardCache
from powernap.train.data.manifest import read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.sequences import Cutting, Sequences, document_lengths
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards, local_path

BINS_PER_OCTAVE = 2  # of the histogram


@dataclass(frozen=True)
class Stats:
    """Of the shards of one source."""

    shards: int
    bytes: int
    lengths: np.ndarray  # int64 [d]: tokens of each document; of stored sequences those of each, pads included
    loss_tokens: int
    sequences: int
    windows: int  # of a sequence
    room: int  # tokens of all sequences, of which
    padded: int  # so many only fill them
    cut: int  # documents whose targets lie in several sequences
    stored: bool  # as sequences
    left_out: Mapping[str, int] = field(default_factory=dict)  # documents by the reason why the build left them out

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def row(self) -> dict[str, str]:
        """The figures for a table."""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        quantiles = [f"{length:,.0f}" for length in np.quantile(self.lengths, [0, 0.5, 0.9, 1])]
        return {
            "shards": f"{self.shards:,}",
            "bytes a token": f"{self.bytes / self.tokens:.2f}",
            "sequences" if self.stored else "documents": f"{len(self.lengths):,}",
            "tokens": f"{self.tokens:,}",
            "loss tokens": f"{self.loss_tokens:,} ({self.loss_tokens / self.tokens:.1%})",
            "shortest, median, 90 %, longest": ", ".join(quantiles),
            **({} if self.stored else {"cut into sequences": f"{self.sequences:,} of {self.windows} windows"}),
            **({} if self.stored else {"documents cut": f"{self.cut:,} ({self.cut / len(self.lengths):.1%})"}),
            "padded": f"{self.padded:,} ({self.padded / max(self.room, 1):.1%})",
            **({"left out by the build": left_out} if left_out else {}),
        }


def stats_of(spec: str, cache: ShardCache, cutting: Cutting, window: int) -> Stats:
    """Of the shards that `spec` names, or of a folder's.

    Raises:
        DataError: if a shard cannot be read, or some hold documents and others sequences.
    """
    if (folder := local_path(spec)) and folder.is_dir():
        spec = f"{folder}/*.tar"
    shards = [Shard.open(name, cache) for name in expand_shards(spec, "SHARDS")]
    stored = not shards[0].holds_documents
    if other := next((shard for shard in shards if shard.holds_documents == stored), None):
        raise DataError(
            f"{other.name} holds {'documents' if stored else 'sequences'}, {shards[0].name} does not: ask for each apart"
        )
    size = sum(shard.path.stat().st_size for shard in shards if shard.path)
    if stored:
        return _of_sequences(shards, size, cutting, window)
    lengths, loss_tokens, sequences, padded, cut = [], 0, 0, 0, 0
    for shard in shards:
        found = Sequences(shard, cutting)
        here = document_lengths(shard)
        lengths.append(here)
        loss_tokens += sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in map(shard.loss_spans, range(len(shard))))
        sequences += len(found)
        padded += found.padded
        cut += documents_cut(here, cutting)
    assert cutting.sequence_length
    return Stats(
        len(shards),
        size,
        np.concatenate(lengths),
        loss_tokens,
        sequences,
        windows=-(-(cutting.sequence_length - 1) // window),
        room=sequences * cutting.sequence_length,
        padded=padded,
        cut=cut,
        stored=False,
        left_out=_left_out(shards[0]),
    )


def _left_out(shard: Shard) -> dict[str, int]:
    """What the manifest beside a shard says that the build left out."""
    found = read_manifest(shard.path).get("left_out") if shard.path else None
    return found if isinstance(found, dict) else {}


def documents_cut(lengths: np.ndarray, cutting: Cutting) -> int:
    """Documents whose targets, all tokens but the first, lie in several sequences."""
    assert cutting.sequence_length
    step = cutting.sequence_length - 1
    if cutting.documents != "packed":
        return int((lengths - 1 > step).sum())
    starts = lengths.cumsum() - lengths
    return int(((lengths > 1) & (starts // step != (starts + lengths - 2) // step)).sum())


def _of_sequences(shards: list[Shard], size: int, cutting: Cutting, window: int) -> Stats:
    lengths, loss_tokens, padded = [], 0, 0
    for shard in shards:
        for sample in Sequences(shard, Cutting(None)):
            lengths.append(len(sample.tokens))
            loss_tokens += int(sample.loss_mask.sum())
            padded += int((sample.tokens == cutting.pad_token_id).sum())
    windows = -(-(max(lengths) - 1) // window)
    return Stats(
        len(shards),
        size,
        np.array(lengths),
        loss_tokens,
        len(lengths),
        windows,
        room=sum(lengths),
        padded=padded,
        cut=0,
        stored=True,
    )


def table(found: Mapping[str, Stats]) -> str:
    """A column for each source, and each one's share of all tokens."""
    tokens = sum(stats.tokens for stats in found.values())
    rows = {name: stats.row() for name, stats in found.items()}
    for name, stats in found.items():
        rows[name]["share of tokens"] = f"{stats.tokens / tokens:.1%}"
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    lines = [["", *rows], *([title, *(row.get(title, "") for row in rows.values())] for title in titles)]
    if len(found) == 1:
        lines = [line for line in lines[1:] if line[0] != "share of tokens"]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw_lengths(found: Mapping[str, Stats], sequence_length: int, to: Path) -> None:
    """The share of tokens by the length of their document, on a logarithmic axis; a line for each source."""
    from powernap.train.evaluation.pictures import GREY, new_figure

    figure, axes = new_figure()
    longest = max(int(stats.lengths.max()) for stats in found.values())
    edges = 2.0 ** (np.arange(BINS_PER_OCTAVE * (int(np.log2(longest)) + 1) + 1) / BINS_PER_OCTAVE)
    for name, stats in found.items():
        share, _ = np.histogram(stats.lengths, edges, weights=stats.lengths / stats.tokens)
        axes.stairs(share, edges, label=name)
    axes.axvline(sequence_length, color=GREY, linestyle=":", label=f"T = {sequence_length:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("share of all tokens")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(to, bbox_inches="tight")
