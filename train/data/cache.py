"""Remote shards as local files: fetched once per machine, with retries, and evicted when the cache is full.

Every wait has a limit, and a long one is logged: a thread reads the source while the waiting one watches the clock.
Nothing here imports torch until a URL needs it.
"""

import hashlib
import itertools
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from powernap.train.config import DataConfig
from powernap.train.data.manifest import MANIFEST
from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import local_path
from powernap.train.data.source import Unreachable, blocks_of, has_neighbours
from powernap.train.data.tar_index import Damaged, index_tar, load_index, read_index, save_index
from powernap.train.data.verify import Recorded, mismatch, not_recorded, recorded, recorded_in, sha256_of
from powernap.train.paths import cache_folder
from powernap.train.run.secrets import mask_secrets

FIRST_DELAY = 2.0  # seconds before the first retry; each further one waits twice as long
LONGEST_DELAY = 300.0  # seconds that a server may ask for: the other ranks wait for this one
SAY_EVERY = 10.0  # seconds between log lines while no bytes arrive; while they do, six times as long
DAMAGED_FOR = 24 * 3600.0  # seconds that a damaged copy is used with on_error=skip before the shard is fetched again
LARGEST_MANIFEST = 1 << 28

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Stopped(DataError):
    """The shard is no longer needed."""


@dataclass(frozen=True)
class ShardCache:
    """Holds remote shards, and the indexes of all shards; shared by the processes of a machine.

    folder: holds shards/ and index/.
    limit: bytes of shards kept; the least recently used go first. None: no limit.
    retries: how often a failed fetch is retried.
    timeout: seconds without another 64 KiB after which an attempt is given up.
    stop: set to end all fetches.

    A URL's shard counts as unchanged as long as it is in the cache. A local shard with an index beside it is taken for the
    one that the build wrote if its size and three blocks are the same. Of any other, every byte is read and compared with
    its manifest, if it has one, before its index is cached.
    """

    folder: Path = field(default_factory=cache_folder)
    limit: int | None = None
    retries: int = 4
    timeout: float = 60.0
    stop: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def __reduce__(self) -> tuple:
        """For reader processes that are not forked: each has a `stop` of its own."""
        return type(self), (self.folder, self.limit, self.retries, self.timeout)

    def fetch(self, shard: str, keep_damaged: bool = False) -> tuple[Path, np.ndarray]:
        """A local file with the shard's bytes, and its index (see tar_index.index_tar).

        Args:
            keep_damaged: keep a damaged remote shard, too: the file is the Damaged error's path. Else it is deleted.

        Raises:
            DataError: naming the shard, if it cannot be fetched, is damaged, or does not match its manifest.
            OSError: if a local one cannot be read.
        """
        if path := local_path(shard):
            return path, self._index(shard, path)
        path = self.folder / "shards" / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(shard, path):
                return self._fetch(shard, path, keep_damaged)
        except OSError as error:
            raise DataError(
                f"{shard}: cannot be kept in data.cache={self.folder} ({error.strerror or error}): choose another folder"
            ) from None

    def copy(self, url: str, path: Path) -> None:
        """Copy any remote file to `path`, with as many tries. Raises DataError."""

        def once(attempt: int) -> None:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
                try:
                    self._copy(url, file, attempt)
                    os.replace(file.name, path)
                finally:
                    with suppress(OSError):
                        os.unlink(file.name)

        self._try(url, once)

    def index_file(self, path: Path) -> Path:
        """The path for the index of the file at `path` in its present state."""
        state = path.stat()
        # Replacing a file changes its inode, overwriting it its time; a cached shard's time also changes with each use.
        time = "" if path.parent == self.folder / "shards" else state.st_mtime_ns
        what = f"checked\0{path.absolute()}\0{state.st_size}\0{state.st_ino}\0{time}"
        return self.folder / "index" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"

    def _index(self, shard: str, path: Path) -> np.ndarray:
        """The cached index of the shard in the file `path`, or that beside it; else check the file and build it."""
        kept = self.index_file(path)
        index = load_index(kept, path.stat().st_size)
        if index is None:
            try:
                index = read_index(path, shard)
            except DataError as error:
                _log(f"{error}; until then the whole shard is read once")
            if index is None:
                index = self._check(shard, path)
            save_index(kept, index)
        return index

    def _check(self, shard: str, path: Path, sha256: str | None = None) -> np.ndarray:
        """The index of the file of a shard, once compared with its manifest."""
        index = index_tar(path, shard)
        if entry := self._recorded(shard):
            if problem := mismatch(entry, path.stat().st_size, sha256 or sha256_of(path)):
                raise not_recorded(shard, entry, problem)
        return index

    def _fetch(self, shard: str, path: Path, keep_damaged: bool) -> tuple[Path, np.ndarray]:
        """`fetch` a remote shard into `path`, or take it from there; the caller holds its lock."""
        if path.exists():
            try:
                index = self._index(shard, path)
                os.utime(path)  # mark as just used
                return path, index
            except DataError as error:  # left by an earlier version, or the disk is bad
                _log(f"{error}; so the copy of it in data.cache={self.folder} is dropped, and it is fetched again")
                path.unlink()
        damaged = path.with_suffix(".damaged")
        if keep_damaged and damaged.exists() and time.time() - damaged.stat().st_mtime < DAMAGED_FOR:
            return damaged, self._check(shard, damaged)
        damaged.unlink(missing_ok=True)
        hashes: list[str] = []

        def once(attempt: int) -> np.ndarray:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
                try:
                    sha256 = self._copy(shard, file, attempt)
                    file.close()
                    try:
                        index = self._check(shard, Path(file.name), sha256)
                    except DataError as error:
                        hashes.append(sha256)
                        same = sha256 in hashes[:-1]  # the source itself is damaged, not the transfer
                        if keep_damaged and (same or attempt > self.retries):
                            os.replace(file.name, damaged)
                            if isinstance(error, Damaged):
                                error.path = damaged
                        raise _Failed(error, may_pass=not same) from None
                    os.replace(file.name, path)
                    return index
                finally:
                    with suppress(OSError):
                        os.unlink(file.name)

        index = self._try(shard, once)
        save_index(self.index_file(path), index)
        self._make_room(path)
        return path, index

    def _try(self, shard: str, once: Callable[[int], T]) -> T:
        """Call `once` with the number of the attempt, again if that may help; returns its result.

        Raises:
            DataError: of the last attempt.
        """
        began = time.monotonic()
        tries = 1 + self.retries
        for attempt in itertools.count(1):
            try:
                return once(attempt)
            except _Failed as failed:
                failure = failed
            delay = max(FIRST_DELAY * 2 ** (attempt - 1), failure.delay) * random.uniform(1, 1.2)
            if not failure.may_pass or attempt == tries or failure.delay > LONGEST_DELAY:
                break
            _log(f"{failure}; try {attempt + 1} of {tries} in {delay:.0f} s")
            if self.stop.wait(delay):
                raise Stopped(f"{shard}: no longer needed")
        tried = f", {attempt} tries in {time.monotonic() - began:.0f} s" if attempt > 1 else ""
        failure.error.args = (f"{failure}{tried}",)
        raise failure.error

    def _copy(self, shard: str, file: IO[bytes], attempt: int) -> str:
        """Copy the source into `file`, and return its SHA-256.

        Raises:
            _Failed: if the source gives nothing, breaks off or stalls.
            OSError: if the file cannot be written.
        """
        transfer = _Transfer()
        threading.Thread(target=transfer.run, args=(shard, file, self.timeout), daemon=True).start()
        moved = logged = time.monotonic()
        seen = 0
        try:
            while not transfer.done.done():
                wait([transfer.done], min(1.0, self.timeout / 4))
                now = time.monotonic()
                if transfer.count > seen:
                    seen, moved = transfer.count, now
                if self.stop.is_set():
                    raise Stopped(f"{shard}: no longer needed")
                if now - moved >= self.timeout and not transfer.done.done():
                    raise Unreachable(
                        f"stalled after {_size(seen)}: less than 64 KiB in {self.timeout:g} s, data.timeout_seconds"
                    )
                if now - logged >= SAY_EVERY * (1 if now - moved >= SAY_EVERY else 6):
                    logged = now
                    pause = f", none for {now - moved:.0f} s" if now - moved >= SAY_EVERY else ""
                    _log(f"{shard}: being fetched, {_size(seen)} so far{pause}; try {attempt} of {1 + self.retries}")
            return transfer.done.result()
        except Unreachable as error:
            reason = DataError(f"{shard}: cannot be read ({error})")
            raise _Failed(reason, error.may_pass, error.delay) from None
        finally:
            transfer.end()

    @contextmanager
    def _locked(self, shard: str, path: Path) -> Iterator[None]:
        """Inside, no other process or thread of this machine fetches this shard."""
        from filelock import FileLock, Timeout

        lock = FileLock(path.with_suffix(".lock"))
        while True:
            try:
                lock.acquire(timeout=SAY_EVERY)
                break
            except Timeout:
                _log(f"{shard}: waiting for another process here, which fetches it")
            if self.stop.is_set():
                raise Stopped(f"{shard}: no longer needed")
        try:
            yield
        finally:
            lock.release()

    def _recorded(self, shard: str) -> Recorded | None:
        """A shard's entry in the manifest beside it, if one can be read."""
        if path := local_path(shard):
            return recorded(path)
        if not has_neighbours(shard):
            return None
        parts = urlsplit(shard)
        folder, _, file = parts.path.rpartition("/")
        url = urlunsplit(parts._replace(path=f"{folder}/{MANIFEST}"))
        if url not in _manifests:
            _manifests[url] = self._fetch_manifest(url)
        return _manifests[url].get(unquote(file))

    def _fetch_manifest(self, url: str) -> dict[str, Recorded]:
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                self._copy(url, file, 1)
            except _Failed as failure:
                if failure.may_pass:  # else there is none, or not for us: a signed link gives access to one shard only
                    _log(f"{failure}: the shards beside it are not compared with it")
                return {}
            file.seek(0)
            try:
                return recorded_in(json.loads(file.read(LARGEST_MANIFEST)), url.partition("?")[0])
            except (ValueError, RecursionError):  # such as an HTML page, from a server that answers every URL
                return {}

    def _make_room(self, newest: Path) -> None:
        """Delete the least recently used shards. A process that is reading one has it open, and can continue."""
        if self.limit is None:
            return
        files = []
        for path in newest.parent.iterdir():
            if path.suffix in (".tar", ".damaged"):
                with suppress(OSError):
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            if path != newest:
                with suppress(OSError):
                    path.unlink()
                    total -= size


_manifests: dict[str, dict[str, Recorded]] = {}  # of remote folders, by URL: one request for each


def cache_of(data: DataConfig) -> ShardCache:
    """The cache that a recipe asks for."""
    return ShardCache(data.cache_folder, data.cache_bytes, data.retries, data.timeout_seconds)


class _Failed(Exception):
    """A failed attempt, with the error to raise if it was the last, and the seconds to wait before another one."""

    def __init__(self, error: DataError, may_pass: bool = True, delay: float = 0.0):
        super().__init__(str(error))
        self.error, self.may_pass, self.delay = error, may_pass, delay


class _Transfer:
    """A thread's reading of a source: its progress and result."""

    def __init__(self) -> None:
        self.done: Future[str] = Future()  # the SHA-256 of all
        self.count = 0
        self._ended = threading.Event()
        self._at_end: list[Callable[[], None]] = []  # end the command that is being read

    def run(self, shard: str, file: IO[bytes], timeout: float) -> None:
        digest = hashlib.sha256()
        try:
            for block in blocks_of(shard, timeout, self._call_at_end):
                if self._ended.is_set():
                    return
                file.write(block)
                digest.update(block)
                self.count += len(block)
            self.done.set_result(digest.hexdigest())
        except BaseException as error:
            self.done.set_exception(error)

    def _call_at_end(self, call: Callable[[], None]) -> None:
        self._at_end.append(call)
        if self._ended.is_set():
            call()

    def end(self) -> None:
        """Give up on the source. A thread that cannot be woken is left alone."""
        self._ended.set()
        for call in self._at_end:
            call()


def _log(message: str) -> None:
    logger.warning("%s", mask_secrets(message))  # masked here: some ranks do not have our formatter


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count:,} bytes"
