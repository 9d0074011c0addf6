"""What a manifest records of shards is compared with what they are: when they are first read, and by `data verify`."""

import hashlib
import json
import shutil

import pytest

from powernap.launch.cli import main
from powernap.train.data.build import build_task
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.shard import Shard
from powernap.train.tasks.depo import Depo
from tests.helpers.servers import breaks_off, says, serving
from tests.helpers.streams import one_line, read


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three training shards and one of held-out samples."""
    folder = tmp_path_factory.mktemp("built") / "data"
    task = Depo(nodes=8, max_hop=4, queries=5, names="ends")
    build_task("depo", task, folder, train_samples=6, test_samples=2, samples_per_shard=2, seed=0, workers=1)
    return folder


@pytest.fixture
def data(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def change(manifest, **values):
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


def test_no_bit_flips_in_silence(data, tmp_path):
    """Among 61 of 10,240 that the tar's own checksums and the arrays' headers do not show: in tokens, mask and answers."""
    path = data / "train-000000.tar"
    whole = path.read_bytes()
    for place in range(0, len(whole), 31):
        path.write_bytes(whole)
        flip(path, place, place % 8)
        with pytest.raises(DataError) as error:
            Shard.open(str(path), ShardCache(tmp_path / "cache"))
        assert str(path) in one_line(error)
    path.write_bytes(whole)
    assert len(Shard.open(str(path), ShardCache(tmp_path / "cache"))) == 2


def in_tokens(path):
    """A place where the tar shows nothing."""
    content = path.read_bytes()
    place = content.index(b"\x93NUMPY", content.index(b".tokens.npy")) + 128
    assert content[place + 1 : place + 4] == bytes(3)  # of an int32 below 21
    return place


def test_a_shard_that_is_not_the_manifests_stops_a_run_or_is_left_out(data):
    bad = data / "train-000001.tar"
    flip(bad, in_tokens(bad))
    settings = dict(sequence_length=33, lanes=3, batch_size=6)
    with pytest.raises(DataError) as error:
        next(read(data / "train-*.tar", **settings))
    text = one_line(error)
    assert text.startswith(f"{bad}: not the shard that {data}/manifest.json records (SHA-256 is ")
    batch = next(read(data / "train-*.tar", on_error="skip", **settings))
    assert [skipped.partition(" (")[0] for skipped in batch.unusable] == [
        f"{bad}: not the shard that {data}/manifest.json records"
    ]
    assert "train-000001" not in " ".join(name for name, _ in batch.sample_ids)
    (data / "manifest.json").unlink()  # nothing says what it was: read as before
    assert len(next(read(data / "train-*.tar", **settings)).sample_ids) == 6


def test_a_manifest_of_other_shards_or_of_none_says_nothing(data, tmp_path):
    path = data / "train-000000.tar"
    for shards in ([], None, [1, {"file": "train-000000.tar", "bytes": "x"}], [{"file": "other.tar"}]):
        change(data / "manifest.json", shards=shards)
        assert len(Shard.open(str(path), ShardCache(tmp_path / "cache"))) == 2
        shutil.rmtree(tmp_path / "cache")


def test_an_index_that_was_kept_without_a_check_is_made_again(data, tmp_path, monkeypatch):
    """By an earlier version. One that is checked is not read again."""
    path, cache = data / "train-000000.tar", ShardCache(tmp_path / "cache")
    Shard.open(str(path), cache)
    monkeypatch.setattr("powernap.train.data.cache.sha256_of", None)
    Shard.open(str(path), cache)
    state = path.stat()
    before = f"{path.absolute()}\0{state.st_size}\0{state.st_ino}\0{state.st_mtime_ns}"
    assert hashlib.sha256(before.encode()).hexdigest()[:32] != cache.index_file(path).stem


def test_a_remote_shard_is_compared_with_the_manifest_beside_it(data, tmp_path, caplog):
    whole = (data / "train-000000.tar").read_bytes()
    bad = bytearray(whole)
    bad[in_tokens(data / "train-000000.tar")] ^= 1
    with serving(data) as server:
        shard = f"{server.url}/train-000000.tar?sig=x"
        server.answers["/train-000000.tar"] = [says(bytes(bad)), says(whole)]
        assert len(Shard.open(shard, ShardCache(tmp_path / "once", retries=1))) == 2
        assert (
            f"{server.url}/train-000000.tar?sig=*** not the shard that {server.url}/manifest.json records"
            in caplog.text
        )
        server.answers["/train-000000.tar"] = [says(bytes(bad))]
        with pytest.raises(DataError) as error:
            Shard.open(shard, ShardCache(tmp_path / "always"))
        assert f"not the shard that {server.url}/manifest.json records (SHA-256" in one_line(
            error
        ) and ", 2 tries in" in str(error.value)
        assert not list((tmp_path / "always" / "shards").glob("*.tar"))
        assert [path for path, _ in server.requests if "manifest" in path] == ["/manifest.json?sig=x"]  # asked for once


@pytest.mark.parametrize("answer", [says(status=404), says(b"<html>"), says(b"[1]"), breaks_off(b"{", 9)])
def test_a_remote_shard_without_a_manifest_is_read(data, tmp_path, caplog, answer):
    with serving(data) as server:
        server.answers["/manifest.json"] = [answer]
        assert len(Shard.open(f"{server.url}/train-000000.tar", ShardCache(tmp_path / "cache"))) == 2
    broken = (
        "manifest.json: cannot be read (broke off after 1 bytes, 8 are missing): the shards beside it are not compared"
    )
    assert (broken in caplog.text) == (len(caplog.records) > 0)


def verify(folder, capsys):
    code = main(["data", "verify", str(folder)])
    return code, *capsys.readouterr()


def test_shards_as_they_were_written(data, capsys):
    code, out, err = verify(data, capsys)
    size = sum(path.stat().st_size for path in data.glob("*.tar"))
    assert (code, out, err) == (0, f"{data}  whole  8 samples, {size:,} bytes in 4 shards\n", "")


def test_verify_names_what_is_not_what_was_written(data, capsys):
    flip(data / "train-000000.tar", in_tokens(data / "train-000000.tar"))
    cut = data / "train-000001.tar"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-512])
    (data / "train-000002.tar").rename(data / "train-000009.tar")
    code, out, _ = verify(data, capsys)
    lines = [line.removeprefix(f"{data}/") for line in out.splitlines()]
    assert code == 1 and len(lines) == 4
    assert lines[0].startswith("train-000000.tar  BROKEN  SHA-256 is ")
    assert lines[1:] == [
        f"train-000001.tar  BROKEN  {size - 512:,} bytes, not {size:,}",
        "train-000002.tar  BROKEN  missing",
        "train-000009.tar  BROKEN  not in manifest.json",
    ]


def test_verify_compares_the_counts_and_the_manifests_sums(data, capsys):
    manifest = data / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    shards[0]["samples"] = 3
    change(manifest, shards=shards)
    code, out, _ = verify(data, capsys)
    assert code == 1 and "train-000000.tar  BROKEN  2 samples, not 3" in out
    assert "manifest.json  BROKEN  its list of shards does not agree with its sums" in out
    shards[0]["samples"] = 2
    (data / shards.pop()["file"]).unlink()  # a shard that is gone from both
    change(manifest, shards=shards)
    code, out, _ = verify(data, capsys)
    assert code == 1 and out.startswith(f"{manifest}  BROKEN  its list")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "manifest.json: no such file"), ("[", "not a manifest"), ("{}", "lists no shards: an older one")],
)
def test_verify_without_a_manifest(data, capsys, content, words):
    manifest = data / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    code, out, err = verify(data, capsys)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_a_build_that_is_not_finished_is_named(tmp_path, capsys):
    (tmp_path / ".data.unfinished").mkdir()
    (tmp_path / ".data.unfinished" / "000000.done").touch()
    for command in ("verify", "inspect"):
        assert main(["data", command, str(tmp_path / "data")]) == 2
        assert "data: its build is not finished, 1 shard of it" in capsys.readouterr().err
