"""Read one shard, wherever WebDataset can open it, and notice when it ends too early."""

import signal
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys

from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import local_path

END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE  # a tar file ends with two blocks of zeros
# What curl and a shell mean by their exit codes.
EXIT_CODES = {22: ": the server refused, such as 404 not found", 127: ": not installed"}
# How a command ends that was well until we stopped reading: SIGPIPE, as a signal or a shell's exit code; curl says 23.
STOPPED_EARLY = {-signal.SIGPIPE, 128 + signal.SIGPIPE, 23}


def read_shard(shard: str) -> Iterator[dict[str, object]]:
    """Samples of one shard, undecoded: __key__, __url__ and the bytes of each member.

    Raises:
        DataError: naming the shard, if it cannot be opened, is no tar, is damaged or cut off, or holds no sample.
    """
    source = None
    samples = 0
    try:
        source = gopen(shard)
        for sample in group_by_keys(_files(shard, _Watched(source))):
            samples += 1
            yield sample
        source.close()  # a command's exit code shows here
    except DataError:
        raise
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{shard}: cannot be read ({_explain(error, shard, source)})") from None
    finally:
        if source is not None:
            with suppress(OSError):
                source.close()
    if not samples:
        raise DataError(f"{shard}: holds no sample: build it again, or take it out of the list")


class _Watched:
    """A stream that remembers how much went through it and where the zeros at its end begin."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.total = 0
        self.zeros_from = 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        if content := data.rstrip(b"\0"):
            self.zeros_from = self.total + len(content)
        self.total += len(data)
        return data


def _files(shard: str, stream: _Watched) -> Iterator[dict[str, object]]:
    """The members of a tar, for WebDataset's group_by_keys.

    Python's tarfile, and WebDataset with it, takes a cut between two members or a damaged header for the end. So where
    the archive ended is compared with where its zeros are; the last sample is not handed out before.
    """
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isfile():
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": shard}
            tar.members = []  # tarfile would keep them all
        end = tar.offset
    while stream.read(1 << 20):
        pass
    if stream.zeros_from > end:
        raise DataError(f"{shard}: damaged after {end} bytes, or several tars in one: build or copy it again")
    if stream.total < end + END_OF_ARCHIVE:
        raise DataError(f"{shard}: cut off after {stream.total} bytes: build or copy it again")


def _explain(error: Exception, shard: str, source: BinaryIO | Pipe | None) -> str:
    if isinstance(error, FileNotFoundError) and local_path(shard) is None:
        return f"the command {error.filename} is not installed"  # WebDataset reads http: through curl
    if isinstance(source, Pipe):
        with suppress(OSError):
            source.close()
        code = source.proc.returncode
        if code and code not in STOPPED_EARLY:
            return f"its command ended with exit code {code}{EXIT_CODES.get(code, '')}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0]) if error.args else type(error).__name__  # WebDataset appends objects to args
    text = " ".join(text.split())
    return f"not a whole tar file: {text}" if isinstance(error, tarfile.TarError) else text
