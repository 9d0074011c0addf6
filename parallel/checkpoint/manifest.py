"""manifest.json: the files of a checkpoint. One that verifies proves that no file is missing or modified.

{
  "format": "powernap-checkpoint-1",
  "step": 500, "written": "2026-11-25T18:00:00+00:00",
  "layout": {"parallel.data": 2, "parallel.tensor": 2, "parallel.pipeline": 1, "zero.stage": 1},
  "versions": {"powernap": ..., "torch": ..., ...},
  "config": {...},      the resolved recipe
  "state": {...},       of the trainer: position in the data, counters, MLflow's run id
  "groups": [{"kinds": ["exp_avg", "exp_avg_sq"], "scalars": {"step": ...}}, ...],        of the optimizer
  "parameters": {"embedding.weight": {"shape": [V, D], "split": [0, 1], "group": 1 or null: frozen}, ...},
  "lanes": {"count": 8, "blocks": {"1": [heads, d_k, d_v]}} or null,
  "files": {"rank-00000.safetensors": {"bytes": ..., "sha256": ..., "tensor": 0, "data": 0,
                                       "fragments": {"embedding.weight": [start, stop]}, "blocks": ["1"]}},
  "sha256": ...         of this file, with 64 zeros in this place
}
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from powernap.model.errors import PowernapError

FORMAT = "powernap-checkpoint-1"
NAME = "manifest.json"
_FOLDER = re.compile(r"step_(\d{8,})$")
_FILE = re.compile(r"rank-\d{5,}\.safetensors$")
_BLANK = "0" * 64

# Top-level fields and their types; the hash covers their contents, which are checked on use.
_FIELDS = {"format": str, "step": int, "written": str, "layout": dict, "versions": dict, "config": dict, "state": dict,
           "groups": list, "parameters": dict, "files": dict, "sha256": str}  # fmt: skip


class CheckpointError(PowernapError):
    """A checkpoint that cannot be used or written, in one line."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The number of optimizer steps behind a checkpoint, from its folder's name."""
    match = _FOLDER.match(folder.name)
    assert match is not None
    return int(match.group(1))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, oldest first; judged by their names alone."""
    return sorted((path for path in folder.glob("step_*") if _FOLDER.match(path.name)), key=step_of)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `content`, all fields but format and sha256, as the folder's manifest."""
    text = json.dumps({"format": FORMAT, **content, "sha256": _BLANK}, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / NAME).write_text(text.removesuffix(f'{_BLANK}"\n}}') + f'{digest}"\n}}', encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking its hash.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: the checkpoint is not whole, or of an earlier version") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = json.loads(data)
        assert isinstance(content, dict)
    except (ValueError, AssertionError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not a JSON object") from None
    claimed = content.get("sha256")
    blank = data.replace(str(claimed).encode(), _BLANK.encode(), 1)
    if not isinstance(claimed, str) or hashlib.sha256(blank).hexdigest() != claimed:
        raise CheckpointError(f"{path}: damaged: its content does not have its SHA-256")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{path}: '{name}' is missing or no {kind.__name__}")
    for name in content["files"]:
        if not _FILE.match(name):  # nothing outside the folder is ever read
            raise CheckpointError(f"{path}: names a file '{name[:80]}' that is none of a checkpoint's")
    if content["step"] != step_of(folder):
        raise CheckpointError(f"{path}: of step {content['step']}: the folder has been renamed")
    return content


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint, in one line; None if size and SHA-256 are those of the manifest."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: {size:,} bytes in place of {expected['bytes']:,}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return (
        None if digest == expected["sha256"] else f"{path}: damaged: not the content that was written (SHA-256 differs)"
    )


def verify(folder: Path, progress: Callable[[int], object] = lambda _: None) -> dict[str, Any]:
    """Read every byte of a checkpoint; return its manifest.

    Args:
        progress: called with each file's size once it has been read.

    Raises:
        CheckpointError: naming the first file that is missing or modified.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if problem := check_file(folder, name, expected):
            raise CheckpointError(problem)
        progress(expected["bytes"])
    return manifest


def newest_valid(
    candidates: list[Path], verify: Callable[[Path], dict[str, Any]] = verify
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest whole checkpoint, its manifest, and a line for each newer one on why it is not whole.

    Args:
        verify: reads one; raises CheckpointError if it is not whole.
    """
    passed_over: list[str] = []
    for candidate in sorted(candidates, key=step_of, reverse=True):
        try:
            return candidate, verify(candidate), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, {}, passed_over


def prune(folder: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete all checkpoints but the last `keep_last` and those of steps that `keep_every` divides; return the deleted.

    Call it right after writing one. A checkpoint that is not whole neither counts among the last nor is deleted:
    somebody may need it as evidence.
    """
    whole = []
    for path in checkpoints(folder):
        try:
            read_manifest(path)
            whole.append(path)
        except CheckpointError:
            continue
    assert keep_last >= 1
    old = [path for path in whole[:-keep_last] if not (keep_every and step_of(path) % keep_every == 0)]
    for path in old:
        # Under its own name a half-deleted checkpoint would look like a broken one.
        doomed = path.with_suffix(".deleted")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old
