"""What a build says when it ends, in lines of a terminal."""

import textwrap
from pathlib import Path
from typing import Any

from powernap.train.data.manifest import MANIFEST, SPLITS

COLUMNS = 80
_SHOWN = 5  # skipped documents


def say(text: str) -> None:
    """Print a sentence in lines of at most COLUMNS, unless a word is longer."""
    print("\n  ".join(wrap(text, COLUMNS - 2)))


def wrap(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)


def summarize(folder: Path, splits: dict[str, dict[str, int]]) -> None:
    train, test = (_describe(**splits[split]) for split in SPLITS)
    tokens = {split: splits[split].get("tokens", 0) for split in SPLITS}
    share = f", {tokens['test'] / sum(tokens.values()):.1%} of the tokens" if all(tokens.values()) else ""
    say(f"{folder}: {train} to train on, {test} held out{share}")


def report(manifest: dict[str, Any]) -> None:
    """Print what was skipped or changed."""
    for reason, count in (manifest.get("left_out") or {}).items():
        say(f"{count:,} documents left out: {reason}")
    if skipped := manifest.get("skipped"):
        print(f"{len(skipped)} documents skipped:")
        for reason in skipped[:_SHOWN]:
            say(f"- {reason}")
        if len(skipped) > _SHOWN:
            print(f"- ... the others are listed in {MANIFEST}")
    if changed := manifest.get("changed"):
        say(
            f"{changed} of {manifest['decoded']} texts that were decoded again do not come back as they were; the first: "
            f"{manifest['changed_example']}"
        )


def _describe(samples: int, shards: int, documents: int | None = None, tokens: int = 0, **_: int) -> str:
    what = f"{samples} samples" if documents is None else f"{documents:,} documents of {tokens:,} tokens"
    return f"{what} in {shards} shard{'' if shards == 1 else 's'}"
