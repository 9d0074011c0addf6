"""Input files of text: which are there, of which kind, and why others are left out; remote ones are fetched to be read."""

import atexit
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from powernap.train.data.sample import DataError

KINDS = (".txt", ".jsonl", ".parquet", ".arrow", ".bin", ".ds")
NAMED = (".tar",)  # read if named, not if found in a folder: there it may be anything
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # of .txt, .jsonl and .arrow
PLAIN = (".parquet", ".bin", ".ds", ".tar")  # kinds without a codec
BESIDE = {".bin": ".idx", ".ds": ".ds.index"}  # what a file of tokens needs beside it


def find_files(inputs: list[str]) -> tuple[list[str], dict[str, list[Path]]]:
    """All readable files and URLs, in order, and the others by the reason why they are left out.

    Folders are searched with their subfolders, symbolic links included, and so are those of object stores.

    Raises:
        DataError: if an entry has no file to read, or a folder cannot be read.
    """
    files: dict[str, None] = {}
    left_out: dict[str, dict[Path, None]] = {}
    for entry in inputs:
        if is_remote(entry):
            files |= dict.fromkeys(_find_remote(entry))
            continue
        named = [Path(entry)] if Path(entry).exists() else sorted(map(Path, glob.glob(entry, recursive=True)))
        readable: list[Path] = []
        others: dict[str, list[Path]] = {}
        for name in named:
            for path, reason in _walk(name) if name.is_dir() else [(name, _why_not(name, KINDS + NAMED))]:
                if reason:
                    others.setdefault(reason, []).append(path)
                else:
                    readable.append(path)
        if not readable:
            reasons = f" (left out: {describe_left_out(others)})" if others else ""
            raise DataError(f"inputs={entry}: no {', '.join(KINDS[:-1])} or {KINDS[-1]} file there{reasons}")
        files |= dict.fromkeys(map(str, sorted(readable)))
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
            if _belongs_to_tokens(path):
                continue
            yield path, "hidden" if _is_hidden(name) else _why_not(path)


def _belongs_to_tokens(path: Path) -> bool:
    """Whether a file is the index of another one, or what datatrove says of it."""
    name = path.name
    ends = [(".idx", ".bin"), (".ds.index", ".ds"), (".ds.metadata", ".ds")]
    return any(name.endswith(end) and path.with_name(name.removesuffix(end) + kind).is_file() for end, kind in ends)


def _cannot_be_searched(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # AppleDouble files are called ._NAME


def _why_not(path: Path, kinds: tuple[str, ...] = KINDS) -> str:
    """Why a file cannot be read; empty if it can."""
    kind, codec = kind_of(str(path))
    if kind not in kinds or (kind in PLAIN and codec):
        return "".join(path.suffixes[-2:] if codec else path.suffixes[-1:]) or "without an ending"
    if not path.is_file():
        return "broken link" if path.is_symlink() and not path.exists() else "not a file"
    if kind in BESIDE and not path.with_name(path.name.removesuffix(kind) + BESIDE[kind]).is_file():
        return f"{kind} without {BESIDE[kind]}"
    return "" if path.stat().st_size else "empty"


def is_remote(name: str) -> bool:
    return "://" in name


def _find_remote(entry: str) -> list[str]:
    """The URLs that an entry stands for: itself, a pattern's matches, or the readable files of a folder."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(entry)
        is_web = entry.startswith(("http://", "https://"))
        if glob.has_magic(path) and not is_web:
            found = [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
        elif not is_web and system.isdir(path):
            found = [system.unstrip_protocol(match) for match in sorted(system.find(path))]
            found = [url for url in found if kind_of(url)[0] in KINDS]
        else:
            found = [entry]
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"inputs={entry}: cannot be listed ({' '.join(str(error).split())})") from None
    if not found:
        raise DataError(f"inputs={entry}: no file there")
    for url in found:
        kind, codec = kind_of(url)
        if kind not in KINDS + NAMED or (kind in PLAIN and codec) or kind in BESIDE:
            raise DataError(f"inputs={entry}: {url} is no .txt, .jsonl, .parquet, .arrow or .tar")
    return found


@cache
def _remote_info(url: str) -> dict[str, Any]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        return system.info(path)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except Exception as error:  # each store has errors of its own
        raise DataError(
            f"{url}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None


def size_of(name: str) -> int:
    """The bytes of a file or URL; 0 if a server does not say."""
    return (_remote_info(name).get("size") or 0) if is_remote(name) else os.stat(name).st_size


def version_of(name: str) -> list[Any]:
    """What changes when a file is written again: its size and time, of a URL what its server says of them."""
    if is_remote(name):
        info = _remote_info(name)
        return [
            info.get("size"),
            str(next((info[key] for key in ("ETag", "mtime", "LastModified") if key in info), "")),
        ]
    state = os.stat(name)
    return [state.st_size, state.st_mtime_ns]


def on_disk(name: str) -> Path:
    """A file's path; of a URL that of a copy, which is kept until this process needs another one. Raises DataError."""
    return _fetched(name) if is_remote(name) else Path(name)


@lru_cache(maxsize=1)
def _copies() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="powernap-inputs-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _fetched(url: str) -> Path:
    from powernap.train.data.cache import ShardCache

    path = _copies() / hashlib.sha256(url.encode()).hexdigest()[:32]
    if not path.exists():
        for other in path.parent.iterdir():
            other.unlink()
        ShardCache().copy(url, path)
    return path


def kind_of(name: str) -> tuple[str, str | None]:
    """.txt, .jsonl, .parquet or another ending, in lower case, and the codec that the file is compressed with."""
    endings = [ending.lower() for ending in Path(name.partition("?")[0] if is_remote(name) else name).suffixes]
    if codec := CODECS.get(endings[-1]) if endings else None:
        return "".join(endings[-2:-1]), codec
    return "".join(endings[-1:]), None


def foreign_format(file: str) -> str:
    """What a file is instead of text, by its first bytes; empty if unknown."""
    kind, codec = kind_of(file)
    if codec or kind not in (".txt", ".jsonl"):
        return ""
    with open(on_disk(file), "rb") as opened:
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
