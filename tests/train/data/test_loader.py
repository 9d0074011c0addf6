"""Reading shards: one order for every layout, exact skips, and every bad shard told in one line."""

import functools
import http.server
import itertools
import multiprocessing
import shutil
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from powernap.train.data import loader
from powernap.train.data.loader import DataError, evaluation_batches, expand_shards, training_batches
from powernap.train.data.read_shard import read_shard
from powernap.train.data.sample import decode

LENGTH, VOCABULARY, SHARDS = 8, 100, 8


def write_shard(path, numbers, mtime=0, **changes):
    """Samples whose tokens are their number."""
    with open(path, "wb") as file, TarWriter(file, mtime=mtime) as tar:
        for number in numbers:
            tokens = np.full(LENGTH, number, dtype=np.int32)
            loss_mask = np.arange(LENGTH) >= 6
            sample = {"tokens.npy": tokens, "loss_mask.npy": loss_mask, "answers.npy": np.array([(6, 8, 3)], np.int32)}
            sample.update(changes)
            tar.write({"__key__": f"sample-{number:03d}", **{k: v for k, v in sample.items() if v is not None}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight shards with 5 or 6 samples: 44 in all."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = iter(range(VOCABULARY))
    for shard in range(SHARDS):
        write_shard(folder / f"train-{shard}.tar", list(itertools.islice(numbers, 5 + shard % 2)))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def read(shards, **changes):
    settings = dict(
        batch_size=4, sequence_length=LENGTH, vocab_size=VOCABULARY, rank=0, world_size=1, workers=0, lanes=None,
        seed=0, shuffle_buffer=1, skip_batches=0,
    )  # fmt: skip
    return training_batches(str(shards), **{**settings, **changes})


def evaluate(shards, **changes):
    settings = dict(batch_size=4, sequence_length=LENGTH, vocab_size=VOCABULARY, rank=0, world_size=1, limit=1000)
    return list(evaluation_batches(str(shards), **{**settings, **changes}))


def numbers(batches, count=None):
    """The samples' numbers, batch by batch."""
    return [batch.tokens[:, 1].tolist() for batch in itertools.islice(batches, count)]


def global_order(folder, world_size, workers, steps, global_batch=8, skip_batches=0, **changes):
    """Global batches as lists: sample k of the run at its place k."""
    ranks = [
        numbers(
            read(
                folder / "train-*.tar", rank=rank, world_size=world_size, workers=workers, lanes=8, shuffle_buffer=4,
                batch_size=global_batch // world_size, skip_batches=skip_batches, **changes,
            ),
            steps,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    return [[n for place in zip(*shares, strict=True) for n in place] for shares in zip(*ranks, strict=True)]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_a_batch_holds_what_the_shards_hold(folder):
    batch = next(read(folder / "train-0.tar"))
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (4, LENGTH)
    assert batch.tokens.tolist() == [[n] * LENGTH for n in range(4)]
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.tolist() == [[False] * 6 + [True] * 2] * 4
    assert [answers.tolist() for answers in batch.answers] == [[[6, 8, 3]]] * 4


@pytest.mark.parametrize(("world_size", "workers"), [(w, n) for w in (1, 2, 4) for n in (0, 1, 2) if (w, n) != (1, 0)])
def test_the_order_does_not_depend_on_the_layout(folder, world_size, workers):
    steps = 14  # 112 samples: into the third epoch
    reference = global_order(folder, 1, 0, steps)
    assert global_order(folder, world_size, workers, steps) == reference
    skipped = global_order(folder, world_size, workers, steps - 5, skip_batches=5)
    assert skipped == reference[5:]


def test_a_skip_may_end_anywhere(folder):
    for lanes, batch_size in ((2, 3), (4, 3), (8, 5)):
        settings = dict(lanes=lanes, batch_size=batch_size, shuffle_buffer=3)
        whole = numbers(read(folder / "train-*.tar", **settings), 20)
        for skip in (1, 2, 7, 13):
            for workers in (0, 2):
                rest = read(folder / "train-*.tar", **settings, skip_batches=skip, workers=workers)
                assert numbers(rest, 3) == whole[skip : skip + 3]


def test_skipping_decodes_nothing(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(loader, "decode", lambda *sample: decoded.append(1) or decode(*sample))
    next(read(folder / "train-*.tar", skip_batches=20))
    assert len(decoded) == 4


def test_an_epoch_holds_every_sample_once(folder):
    batches = numbers(read(folder / "train-*.tar", batch_size=44, shuffle_buffer=10), 3)
    assert [sorted(batch) for batch in batches] == [list(range(44))] * 3
    assert batches[0] != batches[1]
    unmixed = numbers(read(folder / "train-*.tar", batch_size=44, shuffle_buffer=1), 2)
    assert unmixed[0] != unmixed[1]  # the shards are permuted anew
    lane_epoch = [n for batch in numbers(read(folder / "train-*.tar", lanes=8, batch_size=8), 5) for n in batch]
    assert len(set(lane_epoch)) == 40  # five from each shard, none twice


def test_the_seed_and_the_buffer_change_the_order(folder):
    orders = {
        tuple(itertools.chain(*numbers(read(folder / "train-*.tar", seed=seed, shuffle_buffer=buffer), 11)))
        for seed, buffer in ((0, 1), (1, 1), (0, 20), (0, 20), (1, 20))
    }
    assert len(orders) == 4 and all(sorted(order) == list(range(44)) for order in orders)


def test_reading_leaves_torchs_random_numbers_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(read(folder / "train-*.tar", workers=2))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_reads_in_file_order(folder):
    batches = evaluate(folder / "train-*.tar", limit=10)
    assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[2].answers[1].tolist() == [[6, 8, 3]]
    assert numbers(evaluate(folder / "train-*.tar", rank=1, world_size=3, limit=10)) == [[1, 4, 7]]
    assert sum(numbers(evaluate(folder / "train-*.tar")), []) == list(range(44))
    assert evaluate(folder / "train-*.tar", rank=2, world_size=3, limit=2) == []


def test_shards_by_path_glob_braces_and_list(folder):
    names = [f"{folder}/train-{n}.tar" for n in range(SHARDS)]
    assert expand_shards(names[3]) == names[3:4]
    assert expand_shards(f"{folder}/train-*.tar") == names
    assert expand_shards(f"{folder}/train-{{0..2}}.tar") == names[:3]
    assert expand_shards(f"{folder}/train-{{[67],[0-1]}}.tar") == [*names[6:], *names[:2]]  # braces, then globs
    assert expand_shards([names[5], f"{folder}/train-[01].tar"]) == [names[5], *names[:2]]
    assert expand_shards(f"file://{names[0]}") == [f"file://{names[0]}"]
    urls = "http://host/train-{000..002}.tar"
    assert expand_shards(urls) == [f"http://host/train-00{n}.tar" for n in range(3)]
    assert expand_shards("pipe:cat a.tar") == ["pipe:cat a.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/none.tar", "data.train={folder}/none.tar: no such file"),
        ("{folder}/train-{{7..9}}.tar", "data.train={folder}/train-8.tar: no such file"),
        ("{folder}/none-*.tar", "data.train={folder}/none-*.tar: no file matches"),
        ("{folder}", "data.train={folder} is a folder: write the shards in it, such as {folder}/*.tar"),
        (["{folder}/train-0.tar", "{folder}/train-*.tar"], "data.train names {folder}/train-0.tar twice"),
        ("http://host/a.tar.gz", "http://host/a.tar.gz is compressed"),
        ("{folder}/{{a,b", "braces do not match"),
        ("", "data.train is empty"),
        ([], "data.train is empty"),
    ],
)
def test_lists_that_name_nothing(folder, spec, message):
    spec = [s.format(folder=folder) for s in spec] if isinstance(spec, list) else spec.format(folder=folder)
    with pytest.raises(DataError) as error:
        expand_shards(spec)
    assert message.format(folder=folder) in one_line(error)


@pytest.mark.parametrize(
    ("shards", "settings", "message"),
    [
        ("train-[0-4]", {"workers": 3, "world_size": 2}, "parallel.data=2 x data.workers=3): write data.workers=2, or"),
        ("train-[0-2]", {"world_size": 4}, "parallel.data=4 x data.workers=0): write parallel.data=3 data.workers=1"),
        ("train-*", {"lanes": 6, "workers": 4}, "data.lanes=6 must be a multiple of the 4 readers"),
        ("train-*", {"lanes": 6, "workers": 4}, "write data.lanes=8 or null"),
        ("train-*", {"lanes": 12, "world_size": 3}, "fewer than data.lanes=12: write data.lanes=6, or"),
    ],
)
def test_fewer_shards_than_readers(folder, shards, settings, message):
    with pytest.raises(DataError) as error:
        next(read(f"{folder}/{shards}.tar", **settings))
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens.npy": None}, "has no tokens.npy"),
        ({"answers.npy": None}, "has no answers.npy"),
        ({"tokens.npy": np.zeros(9, np.int32)}, "has 9 tokens, data.sequence_length=8: write data.sequence_length=9"),
        ({"tokens.npy": np.full(8, 120, np.int32)}, "token 120, model.vocab_size=100: write model.vocab_size=121"),
        ({"tokens.npy": np.full(8, -1, np.int32)}, "token -1 is negative"),
        ({"tokens.npy": np.zeros(8)}, "tokens.npy must hold integers [T], not float64 [8]"),
        ({"tokens.npy": b"text"}, "tokens.npy is not a NumPy array"),
        ({"tokens.npy": b"\x93NUMPY\x01\x00v\x00"}, "tokens.npy is not a NumPy array"),
        ({"loss_mask.npy": np.ones(7, bool)}, "loss_mask.npy must hold booleans [8], not bool [7]"),
        ({"loss_mask.npy": np.ones(8, np.int32)}, "loss_mask.npy must hold booleans [8], not int32 [8]"),
        ({"loss_mask.npy": np.arange(8) == 0}, "loss_mask.npy marks no token after the first"),
        ({"answers.npy": np.zeros((2, 2), np.int32)}, "answers.npy must hold integer rows (start, stop, depth)"),
        ({"answers.npy": np.array([(6, 9, 1)])}, "answers.npy names tokens 6..8, which are not all loss tokens"),
        ({"answers.npy": np.array([(5, 7, 1)])}, "answers.npy names tokens 5..6, which are not all loss tokens"),
    ],
)
def test_a_sample_that_does_not_fit_names_shard_sample_and_field(tmp_path, changes, message):
    write_shard(tmp_path / "bad.tar", [7], **changes)
    for reading in (lambda: next(read(tmp_path / "bad.tar", batch_size=1)), lambda: evaluate(tmp_path / "bad.tar")):
        with pytest.raises(DataError) as error:
            reading()
        text = one_line(error)
        assert text.startswith(f"{tmp_path}/bad.tar: sample sample-007") and message in text


def test_a_sample_without_answers_is_fine(tmp_path):
    write_shard(tmp_path / "text.tar", [7], **{"answers.npy": np.zeros((0, 3), np.int32)})
    (batch,) = evaluate(tmp_path / "text.tar")
    assert batch.answers[0].shape == (0, 3)


@pytest.mark.parametrize("zeros", [False, True], ids=["plain", "members-end-in-zeros"])
@pytest.mark.parametrize("mtime", [0, 0.5], ids=["one-header", "two-headers"])  # a fraction needs an extended header
def test_a_tar_cut_anywhere_is_noticed(tmp_path, zeros, mtime):
    """Every block border and some bytes after it, where Python's tarfile itself often sees a proper end."""
    long = {"tokens.npy": np.zeros(3000, bool), "loss_mask.npy": np.zeros(3000, bool)} if zeros else {}
    write_shard(tmp_path / "whole.tar", range(3), mtime, **long)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset
    assert len(list(read_shard(str(tmp_path / "whole.tar")))) == 3
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: end + 1024])  # two blocks of zeros are enough
    assert len(list(read_shard(str(cut)))) == 3
    for border in range(0, end + 1024, 512):
        for position in (border, border + 1, border + 300):
            cut.write_bytes(whole[:position])
            with pytest.raises(DataError) as error:
                list(read_shard(str(cut)))
            assert str(cut) in one_line(error)


def test_a_damaged_header_is_noticed(tmp_path):
    write_shard(tmp_path / "bad.tar", range(30))
    data = bytearray((tmp_path / "bad.tar").read_bytes())
    data[9 * 1024 + 3] ^= 1  # the name of a member in the middle: its checksum is wrong now
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match="bad.tar: damaged after 9216 bytes"):
        list(read_shard(str(tmp_path / "bad.tar")))


def test_two_tars_in_one_are_not_read_by_half(folder, tmp_path):
    (tmp_path / "both.tar").write_bytes(b"".join((folder / f"train-{n}.tar").read_bytes() for n in (0, 1)))
    with pytest.raises(DataError, match="both.tar: damaged after 15360 bytes, or several tars in one"):
        list(read_shard(str(tmp_path / "both.tar")))


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(10240), b"x" * 100], ids=["empty", "text", "0", "x"])
def test_a_file_that_is_no_tar(copy, content):
    (copy / "train-3.tar").write_bytes(content)
    with pytest.raises(DataError) as error:
        numbers(read(copy / "train-*.tar"), 12)
    assert f"{copy}/train-3.tar: " in one_line(error)


@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
def test_an_error_in_a_reader_process_arrives_at_once_and_ends_them_all(copy, damage):
    batches = read(copy / "train-*.tar", workers=2, batch_size=1)
    bad = copy / "train-3.tar"
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:3000])
    elif damage == "text":
        bad.write_text("garbage")
    start = time.perf_counter()
    with pytest.raises(DataError) as error:
        for step, _ in enumerate(batches):
            assert step < 100
            if damage == "gone":
                bad.unlink(missing_ok=True)  # while the readers run
    assert f"{bad}: " in one_line(error)
    assert time.perf_counter() - start < 10
    assert multiprocessing.active_children() == []


def test_reader_processes_end_when_the_batches_are_dropped(folder):
    batches = read(folder / "train-*.tar", workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


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
        ("pipe:head -c 3000 {folder}/train-0.tar", "not a whole tar file: unexpected end of data"),
        ("pipe:echo text", "truncated header"),
        ("s3://bucket/a.tar", "no gopen handler"),
    ],
)
def test_a_url_that_gives_no_tar(folder, server, shard, message):
    shard = shard.format(folder=folder, server=server)
    with pytest.raises(DataError) as error:
        numbers(read(shard), 3)
    assert f"{shard}: cannot be read (" in one_line(error) and message in one_line(error)
