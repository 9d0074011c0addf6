"""Shards against the manifest beside them: size, SHA-256, samples. A bit that flips in a tar's members shows nowhere else.

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

from powernap.train.data.build import MANIFEST, SPLITS, read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.tar_index import index_tar

BLOCK = 1 << 20


class Recorded(NamedTuple):
    """What a manifest says of a shard."""

    manifest: str  # its path or URL
    bytes: int
    samples: int
    sha256: str


class Verified(NamedTuple):
    """What `verify` found."""

    shards: int  # in the manifest
    bytes: int
    samples: int
    problems: list[tuple[str, str]]  # file, what is wrong with it


def recorded_in(manifest: object, where: str) -> dict[str, Recorded]:
    """file -> what the manifest read from `where` says of it; whatever else it holds is passed over."""
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    found: dict[str, Recorded] = {}
    for shard in shards if isinstance(shards, list) else []:
        told = shard if isinstance(shard, dict) else {}
        values: list[Any] = [told.get(field) for field in ("file", "bytes", "samples", "sha256")]
        if [type(value) for value in values] == [str, int, int, str]:
            found[values[0]] = Recorded(where, *values[1:])
    return found


def recorded(shard: Path) -> Recorded | None:
    """What the manifest beside a local shard says of it; None if there is none, or it is not in it."""
    path = shard.parent / MANIFEST
    try:
        state = path.stat()
    except OSError:
        return None
    return _recorded(path, state.st_mtime_ns, state.st_size).get(shard.name)


@lru_cache(maxsize=8)
def _recorded(path: Path, *_: int) -> dict[str, Recorded]:
    """Parsed once: it may list a hundred thousand shards."""
    try:
        return recorded_in(read_manifest(path), str(path))
    except DataError:  # check_data refuses it
        return {}


def sha256_of(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Read a whole file; `progress` gets the bytes of each block."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def mismatch(found: Recorded, size: int, sha256: str | None) -> str | None:
    """How a shard of this size and hash (None: not known) differs from what is recorded of it; None: it does not."""
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
    """Read every byte of a folder's shards and compare with its manifest; on all cores.

    Args:
        progress: gets the bytes of each block that was read.

    Raises:
        DataError: if there is no manifest, or it lists no shards.
    """
    path = folder / MANIFEST
    if not path.is_file():
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
        found = list(pool.map(lambda file: _problem(folder / file, listed[file], count), listed))
    problems = [(file, problem) for file, problem in zip(listed, found, strict=True) if problem]
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
        samples = len(index_tar(path, path.name))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except DataError as error:
        return str(error).removeprefix(f"{path.name}: ")
    return None if samples == listed.samples else f"{samples:,} samples, not {listed.samples:,}"


def _manifest_problem(manifest: dict[str, Any], listed: dict[str, Recorded]) -> str | None:
    """Whether the manifest's own sums agree with its list: an entry that was lost or changed shows there."""
    everything = hashlib.sha256("".join(shard.sha256 for shard in listed.values()).encode()).hexdigest()
    counts = {split: [0, 0] for split in SPLITS}
    for file, shard in listed.items():
        for split in SPLITS:
            if file.startswith(split):
                counts[split][0] += 1
                counts[split][1] += shard.samples
    told = manifest.get("splits")
    agree = isinstance(told, dict) and all(
        isinstance(told.get(split), dict) and [told[split].get("shards"), told[split].get("samples")] == count
        for split, count in counts.items()
    )
    if not agree or manifest.get("sha256") != everything:
        return "its list of shards does not agree with its sums: it has been changed"
    return None
