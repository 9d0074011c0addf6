"""The folder of a build: what it holds already, and where shards wait until all are there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from powernap.train.data.manifest import MANIFEST, read_manifest, unfinished_folder
from powernap.train.data.sample import DataError
from powernap.train.recipe_file import flatten

MAY_CHANGE = ("command", "files")  # when a build is continued: each job records its own input
_SHOWN = 5  # fields that differ, in a message
_WIDEST = 40  # letters of a field's value there
_RUNNING = ".running"


def finished_splits(folder: Path, about: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """The manifest's splits if the folder already holds exactly these shards; None if it is empty or missing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    manifest = read_manifest(folder / "train-000000.tar")
    if all(manifest.get(key) == value for key, value in about.items() if key != "command"):
        shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        if shards == {path.name: path.stat().st_size for path in folder.glob("*.tar")}:
            print(f"{folder} is built already")
            return manifest["splits"]
        raise DataError(
            f"{folder} was built with the same fields, but its shards are others now: choose another folder"
        )
    if manifest.get("shards"):
        raise DataError(
            f"{folder} is a finished build, which differs ({_differences(manifest, about)}): nothing is written over; choose "
            "another folder, or remove it"
        )
    raise DataError(f"{folder} exists and is not empty: nothing is written over; choose another folder")


def _differences(before: dict[str, Any], about: dict[str, Any]) -> str:
    """In which fields two builds differ, the first of them."""
    there, here = (
        flatten({key: value for key, value in values.items() if key not in MAY_CHANGE}) for values in (before, about)
    )
    found = [
        f"{key.removeprefix('fields.')}={_short(there.get(key))} there, {_short(value)} here"
        for key, value in here.items()
        if there.get(key) != value
    ]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more if found else "the input has changed"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


@contextmanager
def begun(folder: Path, about: dict[str, Any]) -> Iterator[Path]:
    """The folder to work in: new, or left by the same command when it was interrupted.

    Meanwhile a lock in it says that a process works there.
    """
    unfinished = unfinished_folder(folder)
    if _is_another(unfinished, about):
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    running = unfinished / f"{uuid4().hex}{_RUNNING}"
    with FileLock(running):
        _note_what_is_built(unfinished, about)
        with suppress(FileNotFoundError):
            folder.rmdir()  # it is empty
        try:
            yield unfinished
        finally:
            running.unlink(missing_ok=True)


def check_unfinished(folder: Path, about: dict[str, Any]) -> None:
    """Raise DataError if another build has begun there that `begun` would not put aside."""
    _is_another(unfinished_folder(folder), about)


def _is_another(unfinished: Path, about: dict[str, Any]) -> bool:
    """Whether another build has begun, which is over and has finished no shard. Raises DataError if it has, or goes on."""
    note = unfinished / MANIFEST
    if not note.exists():
        return False
    before = json.loads(note.read_text())
    if all(before.get(key) == about.get(key) for key in (before.keys() | about.keys()) - {*MAY_CHANGE}):
        return False
    other = f"part of another build ({_differences(before, about)})"
    for running in unfinished.glob(f"*{_RUNNING}"):
        try:
            with FileLock(running, timeout=0):
                pass
        except Timeout:
            raise DataError(f"{unfinished} holds {other}, which is running: choose another folder") from None
    if any(unfinished.glob("*.done")):
        raise DataError(f"{unfinished} holds {other}: finish that, or remove the folder")
    return True


def _note_what_is_built(unfinished: Path, about: dict[str, Any]) -> None:
    note = unfinished / MANIFEST
    if not note.exists():
        temporary = unfinished / f"manifest-{uuid4().hex}.tmp"  # other parts may begin now, too
        temporary.write_text(json.dumps(about))
        temporary.rename(note)
