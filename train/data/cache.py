"""Remote shards as local files: fetched once per machine, with retries, and dropped when the cache is full.

Nothing here imports torch before a URL asks for it.
"""

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

from powernap.train.config import DataConfig
from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import local_path
from powernap.train.paths import expanded_path

# What curl and a shell mean by their exit codes.
EXIT_CODES = {22: ": the server refused, such as 404 not found or an expired link", 127: ": not installed"}
FIRST_DELAY = 0.5  # seconds before the first retry; each further one waits twice as long


@dataclass(frozen=True)
class ShardCache:
    """Where remote shards and the indexes of all shards are kept; processes of a machine share it.

    folder: holds shards/ and index/.
    limit: bytes of shards kept; the ones unused for longest go first. None: no limit.
    retries: how often a fetch that failed is tried again.

    A URL's shard is taken for unchanged as long as it is in the cache.
    """

    folder: Path = field(default_factory=lambda: expanded_path("~/.cache/powernap"))
    limit: int | None = None
    retries: int = 3

    def fetch(self, shard: str) -> Path:
        """A local file with the shard's bytes.

        Raises:
            DataError: naming the shard, if it cannot be fetched.
        """
        if path := local_path(shard):
            return path
        from filelock import FileLock

        path = self.folder / "shards" / f"{hashlib.sha256(shard.encode()).hexdigest()[:32]}.tar"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    self._fetch(shard, path)
                    self._make_room(path)
            os.utime(path)  # used now
        except OSError as error:
            raise DataError(
                f"{shard}: cannot be kept in data.cache={self.folder} ({error.strerror or error}): choose another folder"
            ) from None
        return path

    def index_file(self, path: Path) -> Path:
        """Where the index of the file at `path`, as it is now, belongs."""
        state = path.stat()
        # A file's inode changes when it is replaced, its time when it is written over; a cached shard's time, when it is used.
        time = "" if path.parent == self.folder / "shards" else state.st_mtime_ns
        what = f"{path.absolute()}\0{state.st_size}\0{state.st_ino}\0{time}"
        return self.folder / "index" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"

    def _fetch(self, shard: str, path: Path) -> None:
        for attempt in range(1 + self.retries):
            if attempt:
                time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
                try:
                    with _open(shard) as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                    file.close()
                    os.replace(file.name, path)
                    return
                except _Unreachable as error:
                    failure = error
                finally:
                    with suppress(OSError):
                        os.unlink(file.name)
            if not failure.may_pass:
                break
        tried = f", tried {attempt + 1} times" if attempt else ""
        raise DataError(f"{shard}: cannot be read ({failure}{tried})")

    def _make_room(self, newest: Path) -> None:
        """Delete the shards unused for longest. Who reads one meanwhile keeps it open, and reads on."""
        if self.limit is None:
            return
        files = []
        for path in newest.parent.glob("*.tar"):
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


def cache_of(data: DataConfig) -> ShardCache:
    """The cache that a recipe asks for."""
    return ShardCache(data.cache_folder, data.cache_bytes, data.retries)


class _Unreachable(Exception):
    """Why a source gave no shard, and whether trying again may help."""

    def __init__(self, reason: str, may_pass: bool = True):
        super().__init__(reason)
        self.may_pass = may_pass


@contextmanager
def _open(shard: str) -> Iterator[BinaryIO]:
    """Whatever WebDataset opens (http:, pipe:, gs:, ...), and else what fsspec does (s3:, abfs:, hdfs:, ...).

    Raises:
        _Unreachable: at the latest when it is closed.
    """
    from webdataset.gopen import Pipe, gopen_schemes

    scheme = urlparse(shard).scheme
    if scheme not in gopen_schemes:
        with _open_with_fsspec(shard, scheme) as source:
            yield source
        return
    try:
        source = gopen_schemes[scheme](shard, mode="rb", bufsize=1 << 16)
    except FileNotFoundError as error:  # WebDataset reads http: through curl, and others through other commands
        raise _Unreachable(f"the command {error.filename} is not installed", may_pass=False) from None
    except Exception as error:  # hf: asks a server first
        raise _Unreachable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None
    assert isinstance(source, Pipe), shard
    try:
        yield source.stream
        source.stream.close()
        source.proc.wait()
    finally:
        if source.proc.poll() is None:
            source.proc.kill()
            source.proc.wait()
    code = source.proc.returncode
    if code and code != -signal.SIGPIPE:
        reason = f"its command ended with exit code {code}{EXIT_CODES.get(code, '')}"
        raise _Unreachable(reason, may_pass=code != 127)


@contextmanager
def _open_with_fsspec(shard: str, scheme: str) -> Iterator[BinaryIO]:
    import fsspec

    try:
        with fsspec.open(shard, "rb") as source:
            yield source
    except ValueError:  # no such protocol
        raise _Unreachable(f"nothing here opens {scheme}: URLs", may_pass=False) from None
    except ImportError as error:  # it says which package to install
        raise _Unreachable(" ".join(str(error).split()), may_pass=False) from None
    except FileNotFoundError:
        raise _Unreachable("no such file", may_pass=False) from None
    except Exception as error:  # each object store has errors of its own
        raise _Unreachable(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from None
