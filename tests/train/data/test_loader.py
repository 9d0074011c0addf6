"""Reading shards: one order for every layout, exact skips, and every bad shard told in one line."""

import functools
import http.server
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from powernap.train.config import DataConfig
from powernap.train.data import cache, loader
from powernap.train.data.cache import ShardCache
from powernap.train.data.loader import evaluation_batches, merge_states, training_batches
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from powernap.train.data.shard_list import expand_shards

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of another test is in the cache, and retries do not wait."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "FIRST_DELAY", 0.01)


def config(train, **fields):
    train = train if isinstance(train, list | dict) else str(train)
    return DataConfig.model_validate(
        {"train": train, "test": None, "sequence_length": LENGTH, "shuffle_buffer": 1, **fields}
    )


def stream(shards, *, batch_size=4, rank=0, world_size=1, seed=0, state=None, **fields):
    """(batch, state) of one rank."""
    place = dict(batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, state=state)
    return training_batches(config(shards, **fields), vocab_size=VOCABULARY, **place)


def read(shards, **changes):
    return (batch for batch, _ in stream(shards, **changes))


def evaluate(shards, *, batch_size=4, rank=0, world_size=1, limit=1000):
    place = dict(batch_size=batch_size, rank=rank, world_size=world_size, limit=limit)
    return list(evaluation_batches(config("unused", test=str(shards)), vocab_size=VOCABULARY, **place))


def samples_of(shard):
    return list(Shard.open(str(shard), ShardCache(Path.home())))


def numbers(batches, count=None):
    """The samples' numbers, batch by batch."""
    return [batch.tokens[:, 1].tolist() for batch in itertools.islice(batches, count)]


def global_order(shards, world_size, workers, steps, global_batch=8, state=None, **changes):
    """Global batches as lists, sample k of the run at its place k, and the state after the last."""
    share = dict(world_size=world_size, workers=workers, batch_size=global_batch // world_size, state=state)
    ranks = [list(itertools.islice(stream(shards, rank=rank, **share, **changes), steps)) for rank in range(world_size)]
    batches = [[batch.tokens[:, 1].tolist() for batch, _ in read] for read in ranks]
    order = [[n for place in zip(*shares, strict=True) for n in place] for shares in zip(*batches, strict=True)]
    return order, merge_states([read[-1][1] for read in ranks])


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
    reference, state = global_order(folder / "train-*.tar", 1, 0, 14, shuffle_buffer=4)  # 112 samples, 44 an epoch
    assert global_order(folder / "train-*.tar", world_size, workers, 14, shuffle_buffer=4)[0] == reference
    assert json.loads(json.dumps(state)) == state  # it goes into a checkpoint


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("trial", range(50))
def test_a_run_that_was_stopped_anywhere_goes_on_with_the_same_samples(folder, trial):
    """Ranks, readers and batch size of a rank are others before and after, and so are they from stop to stop."""
    random = np.random.RandomState(trial)
    datasets = [f"{folder}/train-*.tar", {"a": {"shards": f"{folder}/train-[0-4].tar", "weight": 2},
                                          "b": {"shards": f"{folder}/train-[5-7].tar"}}]  # fmt: skip
    shards, lanes = datasets[trial % 2], [None, 1, 3][random.randint(3)]
    settings = dict(lanes=lanes, shuffle_buffer=int(random.choice([1, 3, 100])), seed=trial)
    whole, _ = global_order(shards, 1, 0, 30, global_batch=12, **settings)
    found, state = [], None
    while len(found) < 20:
        ranks, workers = int(random.randint(1, 5)), int(random.randint(4)) if trial % 5 == 0 else 0
        steps = int(random.randint(1, 11))
        part, state = global_order(
            shards, ranks, workers, steps, global_batch=12, state=json.loads(json.dumps(state)), **settings
        )
        found += part
    assert found == whole[: len(found)]


def test_going_on_opens_only_the_shards_it_reads_from(folder, monkeypatch):
    _, state = next(itertools.islice(stream(folder / "train-*.tar", lanes=2), 30, None))  # the fourth epoch
    opened, decoded = [], []
    monkeypatch.setattr(loader, "decode", lambda *sample: decoded.append(1) or decode(*sample))
    original = Shard.open
    monkeypatch.setattr(
        Shard, "open", lambda name, *more, **options: opened.append(name) or original(name, *more, **options)
    )
    next(stream(folder / "train-*.tar", lanes=2, state=state))
    assert len(decoded) == 4 and 2 <= len(opened) <= 4


def test_other_shards_than_before_are_refused(copy):
    shards = copy / "train-*.tar"
    _, state = next(stream(shards))
    moved = copy.rename(copy.parent / "moved")
    next(stream(moved / "train-*.tar", state=state))
    (moved / "train-7.tar").unlink()
    with pytest.raises(DataError, match="data.train: the shards are not those the run was trained on so far"):
        next(stream(moved / "train-*.tar", state=state))
    write_shard(moved / "train-7.tar", [90] * 6)  # as large as before, with other tokens
    with pytest.raises(DataError, match="put them back, or start a new run"):
        next(stream(moved / "train-*.tar", state=state))


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle_buffer": 2}, {"lanes": 2}])
def test_another_order_than_before_is_refused(folder, change):
    _, state = next(stream(folder / "train-*.tar"))
    with pytest.raises(DataError, match=f"the order of samples has changed: {next(iter(change))} was"):
        next(stream(folder / "train-*.tar", state=state, **change))


def test_a_mixture_keeps_its_weights(folder):
    shards = {
        "a": {"shards": f"{folder}/train-[0-3].tar", "weight": 0.7},
        "b": {"shards": f"{folder}/train-[4-7].tar", "weight": 0.3},
    }
    order = list(itertools.chain(*numbers(read(shards, batch_size=50), 40)))
    from_a = np.array(order) < 22
    assert from_a[:1000].sum() == from_a[1000:].sum() == 700
    assert 25 <= from_a[:50].sum() <= 45 and from_a[:1000].tolist() != from_a[1000:].tolist()
    counts = np.bincount(np.array(order)[from_a], minlength=22)
    assert counts.min() >= 60 and counts.max() <= 68  # 1400 samples: each of 22 about 63.6 times


def test_an_epoch_holds_every_sample_once(folder):
    batches = numbers(read(folder / "train-*.tar", batch_size=44, shuffle_buffer=10, lanes=1), 3)
    assert [sorted(batch) for batch in batches] == [list(range(44))] * 3
    assert batches[0] != batches[1]
    unmixed = numbers(read(folder / "train-*.tar", batch_size=44, shuffle_buffer=1, lanes=1), 2)
    assert unmixed[0] != unmixed[1]  # the shards are permuted anew
    lane_epoch = [n for batch in numbers(read(folder / "train-*.tar", lanes=8, batch_size=8), 5) for n in batch]
    assert len(set(lane_epoch)) == 40  # five from each shard, none twice


def test_the_seed_and_the_buffer_change_the_order(folder):
    orders = {
        tuple(itertools.chain(*numbers(read(folder / "train-*.tar", seed=seed, shuffle_buffer=buffer, lanes=1), 11)))
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
    (without,) = evaluate(folder / "train-*.tar", rank=2, world_size=3, limit=2)  # as many batches as the other ranks
    assert [len(answers) for answers in without.answers] == [0, 0]
    assert [len(evaluate(folder / "train-*.tar", rank=rank, world_size=2, limit=9)) for rank in (0, 1)] == [2, 2]


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


def test_more_lanes_than_shards(folder):
    with pytest.raises(DataError) as error:
        next(read(folder / "train-*.tar", lanes=12))
    assert "data.train has 8 shards, fewer than data.lanes=12: write data.lanes=8 or null, or build" in one_line(error)


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
    assert len(samples_of(tmp_path / "whole.tar")) == 3
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: end + 1024])  # two blocks of zeros are enough
    assert len(samples_of(cut)) == 3
    for border in range(0, end + 1024, 512):
        for position in (border, border + 1, border + 300):
            cut.write_bytes(whole[:position])
            with pytest.raises(DataError) as error:
                samples_of(cut)
            assert str(cut) in one_line(error)


def test_a_damaged_header_is_noticed(tmp_path):
    write_shard(tmp_path / "bad.tar", range(30))
    data = bytearray((tmp_path / "bad.tar").read_bytes())
    data[9 * 1024 + 3] ^= 1  # the name of a member in the middle: its checksum is wrong now
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match="bad.tar: damaged after 9216 bytes"):
        samples_of(tmp_path / "bad.tar")


def test_two_tars_in_one_are_not_read_by_half(folder, tmp_path):
    (tmp_path / "both.tar").write_bytes(b"".join((folder / f"train-{n}.tar").read_bytes() for n in (0, 1)))
    with pytest.raises(DataError, match="both.tar: damaged after 15360 bytes, or several tars in one"):
        samples_of(tmp_path / "both.tar")


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


@pytest.mark.parametrize("damage", ["sample", "cut", "text"])
def test_what_cannot_be_used_is_skipped_and_told(copy, damage):
    """The order of the other samples stays as it was."""
    bad, settings = copy / "train-3.tar", dict(batch_size=8, lanes=8, on_error="skip")
    whole = numbers(read(copy / "train-*.tar", **settings), 5)
    if damage == "sample":
        first, *rest = Shard.open(str(bad), ShardCache(Path.home()))
        number = int(decode(first, LENGTH, VOCABULARY).tokens[0])
        write_shard(bad, [120, *(int(decode(sample, LENGTH, VOCABULARY).tokens[0]) for sample in rest)])
        hole = [[0 if n == number else n for n in batch] for batch in whole]
    elif damage == "cut":
        bad.write_bytes(bad.read_bytes()[:8000])
    else:
        bad.write_text("garbage")
    with pytest.raises(DataError):
        numbers(read(copy / "train-*.tar", **{**settings, "on_error": "stop"}), 5)
    batches = list(itertools.islice(read(copy / "train-*.tar", **settings), 5))
    assert [reason for batch in batches for reason in batch.skipped if f"{bad}: " in reason]
    if damage == "sample":
        assert numbers(batches) == hole
        assert sum(not row.any() for batch in batches for row in batch.loss_mask) == 1
        assert sum(len(batch.skipped) for batch in batches) == 1


def test_skipping_a_whole_shard_leaves_the_others(copy):
    (copy / "train-3.tar").write_text("garbage")
    batches = list(itertools.islice(read(copy / "train-*.tar", lanes=1, batch_size=38, on_error="skip"), 2))
    others = [n for n in range(44) if not 16 <= n < 22]
    assert [sorted(batch) for batch in numbers(batches)] == [others, others]
    assert [len(batch.skipped) for batch in batches] == [1, 0]


def test_nothing_but_damage_is_an_error_at_last(copy):
    for shard in copy.glob("*.tar"):
        shard.write_text("garbage")
    with pytest.raises(DataError, match="no sample can be read from .* and others: build the shards again"):
        next(read(copy / "train-*.tar", on_error="skip"))


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
