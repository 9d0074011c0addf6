"""Shards from servers, commands and object stores."""

import functools
import http.server
import os
import shutil
import threading

import pytest

from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.shard import Shard
from streams import (
    numbers,
    one_line,
    read,
)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="WebDataset reads http: through curl")


def test_shards_from_a_command(folder):
    assert numbers(read(f"pipe:cat {folder}/train-{{0..3}}.tar"), 5) == numbers(read(f"{folder}/train-{{0..3}}.tar"), 5)


def test_http_without_curl_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        DataError, match=r"http://127.0.0.1:9/a.tar: cannot be read \(the command curl is not installed"
    ):
        numbers(read("http://127.0.0.1:9/a.tar"), 1)


def test_a_remote_shard_is_fetched_once_and_tried_again(folder, tmp_path):
    """By a command that fails twice and counts."""
    count = tmp_path / "count"
    shard = f"pipe:echo >> {count}; test $(wc -l < {count}) -gt 2 && cat {folder}/train-0.tar"
    assert numbers(read(shard, workers=2), 3) == numbers(read(folder / "train-0.tar"), 3)
    assert numbers(read(shard), 3) == numbers(read(folder / "train-0.tar"), 3)
    assert count.read_text() == 3 * "\n"
    count.unlink()
    with pytest.raises(DataError) as error:
        numbers(read(f"{shard} ", retries=1), 3)  # another URL
    assert "cannot be read (its command ended with exit code 1, tried 2 times)" in one_line(error)


def test_the_cache_drops_what_was_not_used_for_longest(folder, tmp_path):
    size = (folder / "train-0.tar").stat().st_size
    shards = ShardCache(tmp_path / "cache", limit=2 * size)
    names = [f"pipe:cat {folder}/train-{n}.tar" for n in (0, 2, 4)]
    first, second = shards.fetch(names[0]), shards.fetch(names[1])
    open_file = Shard.open(names[1], shards)
    os.utime(second, (1, 1))
    third = shards.fetch(names[2])
    assert first.exists() and third.exists() and not second.exists()
    assert len(list(open_file)) == 5  # whoever reads it reads on
    assert not list((tmp_path / "cache" / "shards").glob(".unfinished*"))


def test_object_stores_through_fsspec(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for n in range(4):
        memory.pipe(f"/bucket/train-{n}.tar", (folder / f"train-{n}.tar").read_bytes())
    local = numbers(read(f"{folder}/train-{{0..3}}.tar"), 6)
    assert numbers(read("memory://bucket/train-{0..3}.tar"), 6) == local
    with pytest.raises(DataError, match=r"memory://bucket/none.tar: cannot be read \(no such file\)"):
        next(read("memory://bucket/none.tar"))


@needs_curl
def test_shards_over_http(folder, server):
    local = numbers(read(f"{folder}/train-{{0..3}}.tar", workers=2), 12)
    assert numbers(read(f"{server}/train-{{0..3}}.tar", workers=2), 12) == local


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        pytest.param("{server}/none.tar", "exit code 22: the server refused, such as 404", marks=needs_curl),
        pytest.param("http://127.0.0.1:9/none.tar", "exit code 7", marks=needs_curl),
        ("pipe:no-such-command", "exit code 127: not installed"),
        ("pipe:cat {folder}/none.tar 2>/dev/null", "exit code 1"),
        ("pipe:cat {folder}/train-0.tar; exit 3", "exit code 3"),
        ("pipe:head -c 3000 {folder}/train-0.tar", "cannot be read (not a whole tar file: unexpected end of data"),
        ("pipe:echo text", "cannot be read (not a whole tar file: truncated header"),
        ("s3://bucket/a.tar", "cannot be read (Install s3fs to access S3"),
        ("nowhere://bucket/a.tar", "cannot be read (nothing here opens nowhere: URLs"),
    ],
)
def test_a_url_that_gives_no_tar(folder, server, shard, message):
    shard = shard.format(folder=folder, server=server)
    with pytest.raises(DataError) as error:
        numbers(read(shard), 3)
    assert f"{shard}: " in one_line(error) and message in one_line(error)
