"""Check a command's output paths when it starts, so that no result is computed that cannot be saved. No torch here."""

import os
import tempfile
from pathlib import Path

from powernap.model.errors import PowernapError


class OutputError(PowernapError):
    """A file or folder that cannot be written: one line naming the option."""


def check_file(path: Path, option: str) -> None:
    """Check that the file `path` of a command's `option` can be written or replaced.

    Raises:
        OutputError: if its folder is missing or not writable, or `path` is something other than a file.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path}: is a folder: write a file in it")
    if path.exists() and not path.is_file():
        raise OutputError(f"{option} {path}: is no file: choose another name")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"{option} {path}: no folder {folder}: make it first, or choose another one")
    _check_writable(folder, f"{option} {path}")


def check_folder(path: Path, option: str) -> None:
    """Check that files can be written into the folder `path`, which is created later if missing.

    Args:
        option: the command's option; empty if there is none.

    Raises:
        OutputError: if it, or the nearest existing parent, is no folder or not writable.
    """
    what = f"{option} {path}".strip()
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise OutputError(f"{what}: {existing} is no folder: choose another one")
    _check_writable(existing, what)


def _check_writable(folder: Path, what: str) -> None:
    """Try with an unnamed file that vanishes when closed: permission bits alone do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{what}: {folder} cannot be written ({error.strerror}): choose another folder") from None
