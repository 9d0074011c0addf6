"""manifest.json beside shards: their task, its fields, their counts and hashes. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from powernap.model.section import LARGEST
from powernap.train.data.sample import DataError

MANIFEST = "manifest.json"
# The fields that are read back, and their types; all are optional.
_FIELDS = {"task": str, "fields": dict, "command": str, "vocab_size": int, "window": int, "context_length": int,
           "end_token_id": int, "pad_token_id": int, "holds": str}  # fmt: skip
DOCUMENTS = "documents"  # what shards hold that are cut when they are read; without the field: sequences
SPLITS = ("train", "test")


def end_and_pad(manifest: dict[str, Any]) -> tuple[int | None, int | None]:
    """The tokens that end a document and pad a sequence; older manifests imply the end: the pad minus 1."""
    end, pad = manifest.get("end_token_id"), manifest.get("pad_token_id")
    return (pad - 1 if end is None and pad else end), pad


def unfinished_folder(folder: Path) -> Path:
    """Where shards are until all of a build are there."""
    return folder.parent / f".{folder.name}.unfinished"


def no_shards_yet(folder: Path) -> str | None:
    """What to do about a folder that a build has not finished; None if none has begun."""
    unfinished = unfinished_folder(folder)
    if not unfinished.is_dir() or (folder / MANIFEST).exists():
        return None
    built = len(list(unfinished.glob("*.done")))
    return (
        f"{folder}: its build is not finished, {built} shard{'' if built == 1 else 's'} of it are in {unfinished}: repeat the "
        "command that began it, or wait for its other parts"
    )


def read_manifest(shard: Path) -> dict[str, Any]:
    """The manifest beside a shard; empty if there is none.

    Raises:
        DataError: if the file is not a manifest.
    """
    path = shard.parent / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
        valid = isinstance(manifest, dict) and all(
            _is_field(manifest.get(name), kind) for name, kind in _FIELDS.items()
        )
    except (OSError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise DataError(f"{path}: not a manifest: delete it, or build the shards again")
    return manifest


def _is_field(value: object, kind: type) -> bool:
    if isinstance(value, int):
        return kind is int and 0 <= value <= LARGEST
    return value is None or isinstance(value, kind)
