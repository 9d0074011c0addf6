"""The shards that a recipe names, and the number of lanes they are dealt to. Nothing here imports torch."""

import glob
from pathlib import Path
from urllib.parse import unquote, urlparse

from braceexpand import braceexpand

from powernap.train.data.sample import DataError

MOST_LANES = 64  # unless data.lanes sets more: each lane keeps a shard open
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


def expand_shards(spec: str | list[str], field: str = "data.train") -> list[str]:
    """Expand paths, globs, brace lists and URLs (http:, pipe:, whatever WebDataset opens) into shards.

    Args:
        spec: one entry or a list; braces are expanded first, then globs, each glob's matches in alphabetical order.
        field: the recipe's field, for the messages.

    Raises:
        DataError: if a local file is missing, a glob matches nothing, or a shard is named twice.
    """
    entries = [spec] if isinstance(spec, str) else spec
    shards = [shard for entry in entries for url in _expand_braces(entry, field) for shard in _expand_glob(url, field)]
    if not shards:
        raise DataError(f"{field} is empty: write the shards' paths, such as data/train-*.tar")
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise DataError(f"{field} names {shard} twice: name every shard once")
        seen.add(shard)
        if shard.endswith(COMPRESSED) and not shard.startswith("pipe:"):
            raise DataError(f"{field}: {shard} is compressed: write a plain .tar, or such as pipe:gzip -dc {shard}")
    return shards


def local_path(shard: str) -> Path | None:
    """The file behind a shard's name, or None if it is a URL or a pipe."""
    try:
        url = urlparse(shard)
    except ValueError as error:
        raise DataError(f"{shard}: no URL ({error})") from None
    if url.scheme == "file":
        return Path(unquote(url.path))
    return None if url.scheme else Path(shard)


def count_lanes(shards: int, lanes: int | None, field: str = "data.train") -> int:
    """How many lanes the training shards are dealt to (see order.py): data.lanes, or one per shard, at most 64.

    Raises:
        DataError: if some lane would get no shard.
    """
    if lanes is not None and shards < lanes:
        raise DataError(
            f"{field} has {shards} shards, fewer than data.lanes={lanes}: write data.lanes={shards} or null, "
            f"or build at least {lanes} shards (a smaller --samples-per-shard, of text --shard-size)"
        )
    return lanes or min(shards, MOST_LANES)


def _expand_braces(entry: str, field: str) -> list[str]:
    try:
        return list(braceexpand(entry)) if entry else []
    except ValueError as error:
        raise DataError(f"{field}={entry}: braces do not match ({error})") from None


def _expand_glob(url: str, field: str) -> list[str]:
    path = local_path(url)
    try:
        if path is None or path.is_file():
            return [url]
    except OSError as error:  # such as a name that is too long
        raise DataError(f"{field}={url}: cannot be read ({error.strerror})") from None
    if path.is_dir():
        raise DataError(f"{field}={url} is a folder: write the shards in it, such as {path / '*.tar'}")
    if glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"{field}={url}: no file matches: build the shards, or write where they are")
        if others := [match for match in matches if not Path(match).is_file()]:  # opening a named pipe would block
            raise DataError(f"{field}={url}: {others[0]} is no file: match the shards alone")
        return matches
    raise DataError(f"{field}={url}: no such file: build the shards, or write where they are")
