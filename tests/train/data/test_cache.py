"""Shards from servers, commands and object stores: fetched whole, or refused in one line within a limit, never in silence."""

import base64
import datetime
import ipaddress
import os
import pickle
import re
import threading
import time

import fsspec
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from filelock import FileLock

from powernap.train.data import cache as cache_module
from powernap.train.data import source
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.shard import Shard
from tests.helpers.cases import names
from tests.helpers.servers import breaks_off, says, serving, stalls
from tests.helpers.streams import (
    config,
    numbers,
    one_line,
    read,
)


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


class Impatient(threading.Event):
    """A cache's `stop` that notes how long each retry waits, and does not wait."""

    def __init__(self):
        super().__init__()
        self.delays = []

    def wait(self, timeout=None):
        self.delays.append(timeout)
        return False


PAGE = b"<!DOCTYPE html>\n<html>please log in</html>" * 50


def kept(cache):
    return sorted(path.name for path in (cache.folder / "shards").iterdir() if path.suffix != ".lock")


def refused(shard, cache):
    with pytest.raises(DataError) as error:
        Shard.open(shard, cache)
    assert one_line(error).startswith(f"{shard}: ")
    return str(error.value)


def test_shards_from_a_command(folder):
    assert numbers(read(f"pipe:cat {folder}/train-{{0..3}}.tar"), 5) == numbers(read(f"{folder}/train-{{0..3}}.tar"), 5)


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
    assert "cannot be read (its command ended with exit code 1), 2 tries in" in one_line(error)


def test_the_cache_drops_what_was_not_used_for_longest(folder, tmp_path):
    size = (folder / "train-0.tar").stat().st_size
    shards = ShardCache(tmp_path / "cache", limit=2 * size)
    names = [f"pipe:cat {folder}/train-{n}.tar" for n in (0, 2, 4)]
    first, second = shards.fetch(names[0])[0], shards.fetch(names[1])[0]
    open_file = Shard.open(names[1], shards)
    os.utime(second, (1, 1))
    third, _ = shards.fetch(names[2])
    assert first.exists() and third.exists() and not second.exists()
    assert len(list(open_file)) == 5  # whoever reads it reads on
    assert not list((tmp_path / "cache" / "shards").glob(".unfinished*"))


def test_object_stores_through_fsspec(folder):
    memory = fsspec.filesystem("memory")
    for n in range(4):
        memory.pipe(f"/bucket/train-{n}.tar", (folder / f"train-{n}.tar").read_bytes())
    local = numbers(read(f"{folder}/train-{{0..3}}.tar"), 6)
    assert numbers(read("memory://bucket/train-{0..3}.tar"), 6) == local
    with pytest.raises(DataError, match=r"memory://bucket/none.tar: cannot be read \(no such file\)"):
        next(read("memory://bucket/none.tar"))


def test_shards_over_http(folder, server):
    local = numbers(read(f"{folder}/train-{{0..3}}.tar", workers=2), 12)
    assert numbers(read(f"{server.url}/train-{{0..3}}.tar", workers=2), 12) == local


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("{server}/none.tar", "cannot be read (HTTP 404 File not found)"),
        ("http://127.0.0.1:9/none.tar", "cannot be read (Connection refused), 2 tries in"),
        ("http://no.invalid/none.tar", "cannot be read (Name or service not known), 2 tries in"),
        ("pipe:no-such-command", "exit code 127: not installed"),
        ("pipe:cat {folder}/none.tar 2>/dev/null", "exit code 1"),
        ("pipe:cat {folder}/train-0.tar; exit 3", "exit code 3"),
        ("pipe:head -c 3000 {folder}/train-0.tar", "cannot be read (not a whole tar file: unexpected end of data"),
        ("pipe:echo text", "cannot be read (text, not a tar: 'text'), 2 tries in"),
        ("s3://bucket/a.tar", "cannot be read (Install s3fs to access S3"),
        ("nowhere://bucket/a.tar", "cannot be read (nothing here opens nowhere: URLs"),
    ],
)
def test_a_url_that_gives_no_tar(folder, server, shard, message):
    shard = shard.format(folder=folder, server=server.url)
    with pytest.raises(DataError) as error:
        numbers(read(shard, retries=1), 3)
    assert f"{shard}: " in one_line(error) and message in one_line(error)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (says(PAGE), "cannot be read (an HTML page, not a tar)"),
        (says(b"<?xml version='1.0'?><Error>expired</Error>"), "cannot be read (an XML document, not a tar)"),
        (says(b"version https://git-lfs.github.com/spec/v1\noid"), "cannot be read (a Git LFS pointer, not a tar)"),
        (says(b"\x1f\x8b\x08\0" + bytes(600)), "cannot be read (a gzip file, not a tar)"),
        (says(b'{"error": "later"}'), "cannot be read (text, not a tar: '{\"error\": \"later\"}')"),
        (says(b""), "cannot be read (an empty file, not a tar)"),
        (lambda handler: breaks_off(whole_of(handler)[:3000])(handler), "not a whole tar file: unexpected end of data"),
        (lambda handler: breaks_off(whole_of(handler)[:9216])(handler), "cut off after 9216 bytes"),
        (lambda handler: breaks_off(whole_of(handler)[:3000], 9000)(handler), "broke off after 3,000 bytes, 6,000 are missing"),
    ],
    ids=["page", "xml", "pointer", "gzip", "json", "empty", "cut", "cut-at-a-border", "cut-of-a-length"],
)  # fmt: skip
def test_what_is_no_tar_is_fetched_again_and_never_kept(server, tmp_path, bad, words):
    cache = ShardCache(tmp_path / "cache", retries=2)
    server.answers["/train-0.tar"] = [bad]
    text = refused(f"{server.url}/train-0.tar", cache)
    assert words in text and " tries in " in text
    assert kept(cache) == []
    asked = [path for path, _ in server.requests].count("/train-0.tar")
    assert asked == (3 if "broke off" in words else 2)  # the same bytes twice: it is not the way to the server
    server.answers["/train-0.tar"] = [bad, lambda handler: says(whole_of(handler))(handler)]
    assert len(Shard.open(f"{server.url}/train-0.tar", cache)) == 5
    assert len(kept(cache)) == 1


def whole_of(handler):
    return (handler.server.folder / "train-0.tar").read_bytes()


@pytest.mark.parametrize("poison", [PAGE, b"", bytes(3000)], ids=["page", "empty", "zeros"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_an_earlier_version_left_in_the_cache_is_fetched_again(folder, server, tmp_path, caplog, poison, on_error):
    shard = f"{server.url}/train-0.tar"
    cache = ShardCache(tmp_path / "cache")
    Shard.open(shard, cache)
    (path,) = (cache.folder / "shards").glob("*.tar")
    path.write_bytes(poison)
    assert len(Shard.open(shard, cache, keep_readable=on_error == "skip")) == 5
    assert path.read_bytes() == (folder / "train-0.tar").read_bytes()
    assert f"the copy of it in data.cache={cache.folder} is dropped" in caplog.text
    asked = len(server.requests)
    Shard.open(shard, cache)
    assert len(server.requests) == asked


def test_a_damaged_remote_shard_is_skipped_but_not_kept_for_those_who_stop(server, tmp_path, monkeypatch):
    shard = f"{server.url}/train-0.tar"
    cache = ShardCache(tmp_path / "cache", retries=2)
    server.answers["/train-0.tar"] = [lambda handler: breaks_off(whole_of(handler)[:8000])(handler)]
    for _ in range(2):  # the second time without the server
        readable = Shard.open(shard, cache, keep_readable=True)
        assert len(list(readable)) == len(readable) == 2
        assert str(readable.damage).startswith(f"{shard}: cannot be read (not a whole tar file")
        assert [path for path, _ in server.requests].count("/train-0.tar") == 2
    assert "2 tries in" in refused(shard, cache)
    assert len(Shard.open(shard, cache, keep_readable=True)) == 2
    del server.answers["/train-0.tar"]
    monkeypatch.setattr(cache_module, "DAMAGED_FOR", 0)
    assert len(Shard.open(shard, cache, keep_readable=True)) == 5  # it is asked for again after a while
    assert [name.rpartition(".")[2] for name in kept(cache)] == ["tar"]


class Stalling:
    """A file of an object store that gives no more."""

    def __init__(self):
        self.released = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, _):
        self.released.wait(60)
        return b""


def command_of(process: psutil.Process) -> list[str]:
    """Empty for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.faults
@pytest.mark.parametrize("source", names(["body", "pipe", "fsspec"], ["silent", "pipe-silent", "pipe-open"]))
def test_a_source_that_stalls_is_given_up_and_said(folder, server, tmp_path, monkeypatch, caplog, source):
    monkeypatch.setattr(cache_module, "SAY_EVERY", 0.1)
    file = Stalling()
    monkeypatch.setattr(fsspec, "open", lambda *_: file)
    server.answers["/silent.tar"], server.answers["/body.tar"] = [stalls()], [stalls(bytes(100_000))]
    shard = {
        "pipe": "pipe:head -c 100000 /dev/zero; (sleep 987; true)",
        "pipe-silent": "pipe:sleep 987",
        "pipe-open": "pipe:head -c 15360 /dev/zero; exec >&-; sleep 987",
        "fsspec": "s3://bucket/a.tar",
    }.get(source, f"{server.url}/{source}.tar")
    began = time.monotonic()
    text = refused(shard, ShardCache(tmp_path / "cache", retries=1, timeout=0.5))
    file.released.set()
    assert time.monotonic() - began < 10
    # Up to 65,536 bytes, where the machine is not too busy.
    stalled = r"cannot be read \(stalled after [\d,]+ bytes: less than 64 KiB in 0.5 s, data.timeout_seconds\)"
    assert re.search(f"{stalled}, 2 tries in", text)
    assert f"{shard}: being fetched, " in caplog.text and " so far, none for " in caplog.text
    assert re.search(f"{re.escape(shard)}: {stalled}; try 2 of 2 in 0 s", caplog.text)
    left = [process for process in psutil.Process().children(recursive=True) if "987" in command_of(process)]
    assert not psutil.wait_procs(left, timeout=5)[1]  # killed with what it had started


def test_bytes_that_trickle_are_a_stall(server, tmp_path):
    def trickle(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not handler.server.released.wait(0.05):
            handler.wfile.write(b"x")

    server.answers["/a.tar"] = [trickle]
    assert "stalled after 0 bytes" in refused(
        f"{server.url}/a.tar", ShardCache(tmp_path / "cache", retries=0, timeout=0.5)
    )


def test_who_waits_for_another_process_says_so(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "SAY_EVERY", 0.1)
    shard, cache = f"{server.url}/train-0.tar", ShardCache(tmp_path / "cache")
    Shard.open(shard, cache)
    (lock,) = (cache.folder / "shards").glob("*.lock")
    with FileLock(lock):
        opening = threading.Thread(target=Shard.open, args=(shard, cache))
        opening.start()
        while f"{shard}: waiting for another process here, which fetches it" not in caplog.text:
            assert opening.is_alive()
            time.sleep(0.01)
    opening.join()


def test_a_fetch_ahead_that_stalls_does_not_hold_up_the_end(server):
    place = dict(lanes=1, batch_size=1)
    needed = next(read(f"{server.folder}/train-{{0,1}}.tar", **place)).sample_ids[0][0]
    (ahead,) = {"train-0.tar", "train-1.tar"} - {needed.rpartition("/")[2]}
    asked = threading.Event()

    def stalls_when_asked(handler):
        asked.set()
        stalls(b"")(handler)

    server.answers = {f"/{ahead}": [stalls_when_asked]}
    batches = read(f"{server.url}/train-{{0,1}}.tar", **place, timeout_seconds=20, retries=0)
    next(batches)
    assert asked.wait(10)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_status_that_may_pass(server, tmp_path, caplog, status):
    stop = Impatient()
    cache = ShardCache(tmp_path / "cache", retries=2, stop=stop)
    server.answers["/train-0.tar"] = [says(b"busy", status), says(b"busy", status, Retry_After=7), says(b"", status)]
    text = refused(f"{server.url}/train-0.tar", cache)
    assert f"cannot be read (HTTP {status} " in text and "), 3 tries in " in text
    assert f"cannot be read (HTTP {status} " in caplog.text and ", asks to wait 7 s); try 3 of 3 in " in caplog.text
    assert stop.delays[0] < 1 and 7 <= stop.delays[1] < 9
    server.answers["/train-0.tar"] = [says(b"busy", status), lambda handler: says(whole_of(handler))(handler)]
    assert len(Shard.open(f"{server.url}/train-0.tar", cache)) == 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(status=404), "HTTP 404 Not Found"),
        (says(status=403), "HTTP 403 Forbidden"),
        (says(status=410), "HTTP 410 Gone"),
        (says(status=501), "HTTP 501 Not Implemented"),
        (says(status=429, Retry_After=3600), "HTTP 429 Too Many Requests, asks to wait 3600 s"),
        (says(status=302, Location="/train-0.tar"), "Exceeded 30 redirects."),
        (says(status=302, Location="ftp://127.0.0.1/a"), "No connection adapters were found"),
    ],
)
def test_a_status_that_will_not_pass_is_not_tried_again(server, tmp_path, answer, words):
    server.answers["/train-0.tar"] = [answer]
    stop = Impatient()
    text = refused(f"{server.url}/train-0.tar", ShardCache(tmp_path / "cache", stop=stop))
    assert f"cannot be read ({words}" in text and stop.delays == []


def test_waits_double(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FIRST_DELAY", 2.0)
    stop = Impatient()
    refused("http://127.0.0.1:9/a.tar", ShardCache(tmp_path / "cache", stop=stop))
    assert [delay // wait for delay, wait in zip(stop.delays, (2, 4, 8, 16), strict=True)] == [1, 1, 1, 1]


def authorization(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_credentials_are_those_of_the_url_or_of_netrc_and_go_to_one_host(folder, server, tmp_path, monkeypatch):
    monkeypatch.delenv("NETRC", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine 127.0.0.1 login me password kept\n")
    host = server.url.removeprefix("http://")
    cache = ShardCache(tmp_path / "cache")
    with serving(folder) as other:
        other.answers["/train-2.tar"] = [
            says(status=302, Location=f"http://localhost:{server.server_port}/train-2.tar")
        ]
        for url, expected in [
            (f"http://a%40b:s%2Fe:t@{host}/train-0.tar", authorization("a@b:s/e:t")),
            (f"http://token@{host}/train-0.tar", authorization("token:")),
            (f"{server.url}/train-1.tar", authorization("me:kept")),
            (f"http://a:b@{other.url.removeprefix('http://')}/train-2.tar", None),
        ]:
            server.requests.clear()
            assert len(Shard.open(url, cache)) in (5, 6)
            assert server.requests[0][1].get("Authorization") == expected


def test_proxies_of_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    cache = ShardCache(tmp_path / "cache", retries=0)
    assert len(Shard.open("http://far.invalid/train-0.tar", cache)) == 5
    assert server.requests[0][0] == "http://far.invalid/train-0.tar"
    assert "Connection refused" in refused("http://127.0.0.1:9/train-0.tar", cache)


def self_signed(place):
    """A certificate of 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = builder.add_extension(x509.SubjectAlternativeName([address]), False).sign(key, hashes.SHA256())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    place.write_bytes(signed.public_bytes(Encoding.PEM) + secret)
    return place


def test_certificates_are_the_systems_or_those_of_the_environment(folder, tmp_path, monkeypatch):
    """The system's are what OpenSSL finds, SSL_CERT_FILE among it."""
    file = self_signed(tmp_path / "server.pem")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    stop = Impatient()
    with serving(folder, file) as server:
        unknown = refused(f"{server.url}/train-0.tar", ShardCache(tmp_path / "none", stop=stop))
        assert "certificate verify failed: self-signed certificate" in unknown and not stop.delays
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            source._system_certificates.cache_clear()
            with monkeypatch.context() as patch:
                patch.setenv(name, str(file))
                assert len(Shard.open(f"{server.url}/train-0.tar", ShardCache(tmp_path / name, retries=0))) == 5
    source._system_certificates.cache_clear()


def test_a_signed_link_stays_as_it_is(server, tmp_path):
    Shard.open(f"{server.url}/train-0.tar?X-Amz-Credential=A%2Fb&sig=a%2Bb%3D&x=~", ShardCache(tmp_path / "cache"))
    assert server.requests[0][0] == "/train-0.tar?X-Amz-Credential=A%2Fb&sig=a%2Bb%3D&x=~"


def test_a_full_disk_is_no_fault_of_the_source(folder, tmp_path, monkeypatch):
    """Of an object store's least: its errors are of all kinds."""
    fsspec.filesystem("memory").pipe("/bucket/a.tar", (folder / "train-0.tar").read_bytes())

    class Full:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            self.file.close()

    original = cache_module.ShardCache._copy
    monkeypatch.setattr(ShardCache, "_copy", lambda self, shard, file, n: original(self, shard, Full(file), n))
    text = refused("memory://bucket/a.tar", ShardCache(tmp_path / "cache", retries=0))
    assert "cannot be kept in data.cache=" in text and "No space left on device" in text


def test_limits_come_from_the_recipe():
    cache = cache_module.cache_of(config("a.tar", timeout_seconds=7, retries=2, cache_limit_gb=1))
    assert (cache.timeout, cache.retries, cache.limit) == (7, 2, 10**9)
    assert pickle.loads(pickle.dumps(cache)) == cache  # reader processes that are not forked get it so
