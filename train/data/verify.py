"""Compare shards with the manifest beside them: size, SHA-256, samples. Nothing else detects bit flips in a tar.

Nothing here imports torch.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from powernap.train.data.manifest import MANIFEST, SPLITS, no_shards_yet, read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.tar_index import index_file, index_tar, read_index

BLOCK = 1 << 20


class Recorded(NamedTuple):
    """A shard's entry in a manifest."""

    manifest: str  # its path or URL
    bytes: int
    samples: int
    sha256: str
    tokens: int | None = None  # of documents


class Verified(NamedTuple):
    """The result of `verify`."""

    shards: int  # in the manifest
    bytes: int
    samples: int
    problems: list[tuple[str, str]]  # file, what is wrong with it


def recorded_in(manifest: object, where: str) -> dict[str, Recorded]:
    """file -> its entry in the manifest read from `where`; anything else in it is ignored."""
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    entries: dict[str, Recorded] = {}
    for shard in shards if isinstance(shards, list) else []:
        entry = shard if isinstance(shard, dict) else {}
        values: list[Any] = [entry.get(field) for field in ("file", "bytes", "samples", "sha256")]
        tokens = entry.get("tokens")
        if [type(value) for value in values] == [str, int, int, str]:
            found = Recorded(where, *values[1:])
            entries[values[0]] = found._replace(tokens=tokens if type(tokens) is int else None)
    return entries


def recorded(shard: Path) -> Recorded | None:
    """A local shard's entry in the manifest beside it; None if there is no manifest, or no entry."""
    path = shard.parent / MANIFEST
    try:
        state = path.stat()
    except OSError:
        return None
    return _recorded(path, state.st_mtime_ns, state.st_size).get(shard.name)


@lru_cache(maxsize=8)
def _recorded(path: Path, *_: int) -> dict[str, Recorded]:
    """Parsed once: a manifest may list a hundred thousand shards."""
    try:
        return recorded_in(read_manifest(path), str(path))
    except DataError:  # check_data refuses it
        return {}


def sha256_of(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The SHA-256 of a whole file; `progress` gets the size of each block read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def mismatch(found: Recorded, size: int, sha256: str | None) -> str | None:
    """How a shard's size and hash (None: unknown) differ from the recorded ones; None if they match."""
    if size != found.bytes:
        return f"{size:,} bytes, not {found.bytes:,}"
    if sha256 is not None and sha256 != found.sha256:
        return f"SHA-256 is {sha256[:12]}..., not {found.sha256[:12]}..."
    return None


def not_recorded(shard: str, found: Recorded, problem: str) -> DataError:
    """The error for a shard with a mismatch."""
    return DataError(
        f"{shard}: not the shard that {found.manifest} records ({problem}): copy or build it again, or delete the manifest "
        "if you changed the shard"
    )


def verify(folder: Path, progress: Callable[[int], object] = lambda _: None) -> Verified:
    """Read every byte of a folder's shards and compare with its manifest, on all cores.

    Args:
        progress: gets the size of each block read.

    Raises:
        DataError: if there is no manifest, or it lists no shards.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if message := no_shards_yet(folder):
            raise DataError(message)
        raise DataError(
            f"{path}: no such file: nothing says what the shards were when `powernap data build` wrote them"
        )
    manifest = read_manifest(path)
    listed = recorded_in(manifest, str(path))
    if not listed:
        raise DataError(f"{path}: lists no shards: an older one; build the shards again")
    lock = threading.Lock()

    def count(amount: int) -> None:
        with lock:
            progress(amount)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda file: _problem(folder / file, listed[file], count), listed))
    problems = [(file, problem) for file, problem in zip(listed, results, strict=True) if problem]
    extra = {other.name for other in folder.glob("*.tar")} - listed.keys()
    problems += [(file, f"not in {MANIFEST}") for file in sorted(extra)]
    if manifest_problem := _manifest_problem(manifest, listed):
        problems.append((MANIFEST, manifest_problem))
    size, samples = sum(shard.bytes for shard in listed.values()), sum(shard.samples for shard in listed.values())
    return Verified(len(listed), size, samples, problems)


def _problem(path: Path, listed: Recorded, progress: Callable[[int], None]) -> str | None:
    """What is wrong with a shard, if anything."""
    try:
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        sha256 = sha256_of(path, progress) if size == listed.bytes else None
        if problem := mismatch(listed, size, sha256):
            return problem
        index = index_tar(path, path.name)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except DataError as error:
        return str(error).removeprefix(f"{path.name}: ")
    try:
        beside = read_index(path, path.name)
    except DataError as error:
        return str(error)
    if beside is not None and not np.array_equal(beside, index):
        return f"{index_file(path)}: has other samples: delete it"
    samples, tokens = len(index), int(index[:, -1, 1].sum())
    if samples != listed.samples:
        return f"{samples:,} samples, not {listed.samples:,}"
    if listed.tokens is not None and tokens != listed.tokens:
        return f"documents of {tokens:,} tokens, not {listed.tokens:,}"
    return None


def _manifest_problem(manifest: dict[str, Any], listed: dict[str, Recorded]) -> str | None:
    """How the manifest's sums disagree with its list, if they do: this exposes a lost or changed entry."""
    everything = hashlib.sha256("".join(shard.sha256 for shard in listed.values()).encode()).hexdigest()
    counts = {split: [0, 0] for split in SPLITS}
    for file, shard in listed.items():
        for split in SPLITS:
            if file.startswith(split):
                counts[split][0] += 1
                counts[split][1] += shard.samples
    splits = manifest.get("splits")
    agree = isinstance(splits, dict) and all(
        isinstance(splits.get(split), dict) and [splits[split].get("shards"), splits[split].get("samples")] == count
        for split, count in counts.items()
    )
    if not agree or manifest.get("sha256") != everything:
        return "its list of shards does not agree with its sums: it has been changed"
    return None
