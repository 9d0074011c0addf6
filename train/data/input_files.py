"""Input files of text: which are there, of which kind, and why others are left out."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from powernap.train.data.sample import DataError

KINDS = (".txt", ".jsonl", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # of .txt and .jsonl


def find_files(inputs: list[str]) -> tuple[list[Path], dict[str, list[Path]]]:
    """All readable files, in order, and the others by the reason why they are left out.

    Folders are searched with their subfolders, symbolic links included.

    Raises:
        DataError: if an entry has no file to read, or a folder cannot be read.
    """
    files: dict[Path, None] = {}
    left_out: dict[str, dict[Path, None]] = {}
    for entry in inputs:
        named = [Path(entry)] if Path(entry).exists() else sorted(map(Path, glob.glob(entry, recursive=True)))
        readable: list[Path] = []
        others: dict[str, list[Path]] = {}
        for name in named:
            for path, reason in _walk(name) if name.is_dir() else [(name, _why_not(name))]:
                if reason:
                    others.setdefault(reason, []).append(path)
                else:
                    readable.append(path)
        if not readable:
            reasons = f" (left out: {describe_left_out(others)})" if others else ""
            raise DataError(f"inputs={entry}: no {', '.join(KINDS[:-1])} or {KINDS[-1]} file there{reasons}")
        files |= dict.fromkeys(sorted(readable))
        for reason, paths in others.items():
            left_out.setdefault(reason, {}).update(dict.fromkeys(sorted(paths)))
    return list(files), {reason: list(paths) for reason, paths in left_out.items()}


def describe_left_out(left_out: dict[str, list[Path]]) -> str:
    """3 .csv (a.csv, ...), 1 hidden (.a.txt)"""
    return ", ".join(
        f"{len(paths)} {reason} ({paths[0]}{', ...' if len(paths) > 1 else ''})" for reason, paths in left_out.items()
    )


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, and why it cannot be read, if so. A hidden folder is one entry."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_searched):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        for name in [name for name in folders if _is_hidden(name)]:
            folders.remove(name)
            yield Path(parent, name), "hidden"
        folders.sort()
        for name in names:
            path = Path(parent, name)
            yield path, "hidden" if _is_hidden(name) else _why_not(path)


def _cannot_be_searched(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # AppleDouble files are called ._NAME


def _why_not(path: Path) -> str:
    """Why a file cannot be read; empty if it can."""
    kind, codec = kind_of(path)
    if kind not in KINDS or (kind == ".parquet" and codec):
        return "".join(path.suffixes[-2:] if codec else path.suffixes[-1:]) or "without an ending"
    if not path.is_file():
        return "broken link" if path.is_symlink() and not path.exists() else "not a file"
    return "" if path.stat().st_size else "empty"


def kind_of(path: Path) -> tuple[str, str | None]:
    """.txt, .jsonl, .parquet or another ending, in lower case, and the codec that the file is compressed with."""
    endings = [ending.lower() for ending in path.suffixes]
    if codec := CODECS.get(endings[-1]) if endings else None:
        return "".join(endings[-2:-1]), codec
    return "".join(endings[-1:]), None


def foreign_format(file: str) -> str:
    """What a file is instead of text, by its first bytes; empty if unknown."""
    path = Path(file)
    if kind_of(path)[1] or kind_of(path)[0] == ".parquet":
        return ""
    with open(path, "rb") as opened:
        head = opened.read(8)
    formats = {
        b"\x1f\x8b": "gzip-compressed, not text: name it .gz",
        b"\x28\xb5\x2f\xfd": "zstd-compressed, not text: name it .zst",
        b"BZh": "bzip2-compressed, not text: name it .bz2",
        b"\xfd7zXZ": "xz-compressed, not text: decompress it",
        b"PK\x03\x04": "a zip archive, not text: unpack it",
        b"PAR1": "a Parquet file, not text: name it .parquet",
        b"\xff\xfe": "UTF-16, not UTF-8 text: convert it with iconv -f UTF-16 -t UTF-8",
        b"\xfe\xff": "UTF-16, not UTF-8 text: convert it with iconv -f UTF-16 -t UTF-8",
    }
    return next((name for magic, name in formats.items() if head.startswith(magic)), "")
