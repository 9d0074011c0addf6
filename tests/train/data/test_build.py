"""Building shards: what lies in them, the same bytes every time, nothing half and nothing written over."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from powernap.train.data import build
from powernap.train.data.build import build_task
from powernap.train.data.cache import ShardCache
from powernap.train.data.inspect import inspect_shards
from powernap.train.data.sample import DataError
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.rule110 import Rule110

TASK = Depo(nodes=6, max_hop=3, queries=2, names="ends")


def build_small(folder, **changes):
    sizes = dict(train_samples=10, test_samples=3, samples_per_shard=4, seed=5, workers=1)
    build_task("depo", TASK, folder, **{**sizes, **changes})
    return folder


def read(shard):
    """Each member of a tar as an array, in order."""
    with tarfile.open(shard) as tar:
        return {name: np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames()}


def test_samples_lie_in_the_shards_as_the_task_drew_them(tmp_path):
    folder = build_small(tmp_path / "data")
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "test-000000.index", "test-000000.tar", *(f"train-00000{n}.{kind}" for n in range(3) for kind in ("index", "tar")),
    ]  # fmt: skip
    for split, stream, count in (("train", 0, 10), ("test", 1, 3)):
        numbers, sizes = iter(range(count)), []
        for shard, path in enumerate(sorted(folder.glob(f"{split}-*.tar"))):
            members, generator = read(path), np.random.default_rng([5, stream, shard])
            sizes.append(len(members) // 3)
            for number in itertools.islice(numbers, sizes[-1]):
                sample = TASK.sample(generator, held_out=split == "test")
                for name in ("tokens", "loss_mask", "answers"):
                    found = members.pop(f"{split}-{number:09d}.{name}.npy")
                    assert np.array_equal(found, getattr(sample, name)) and found.dtype == getattr(sample, name).dtype
            assert not members
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_the_manifest_says_what_the_shards_hold(tmp_path, capsys):
    folder = build_small(tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert [shard["file"] for shard in shards] == [f"train-00000{n}.tar" for n in range(3)] + ["test-000000.tar"]
    assert [shard["samples"] for shard in shards] == [4, 3, 3, 3]
    for shard in shards:
        data = (folder / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data) and shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(manifest.pop("sha256")) == 64
    command = manifest.pop("command")
    assert command.startswith(
        'powernap data build depo data nodes=6 max_hop=3 queries=2 names="ends" --train-samples 10 '
    )
    assert manifest == {
        "task": "depo",
        "generator": 3,
        "samples_per_shard": 4,
        "asked": {"train": 10, "test": 3},
        "fields": {
            "nodes": 6,
            "min_nodes": None,
            "max_hop": 3,
            "queries": 2,
            "lengths": "uniform",
            "names": "ends",
            "alphabet": 50,
            "delay": 0,
        },
        "seed": 5,
        "vocab_size": 16,
        "sequence_length": 18,
        "context_length": 12,
        "window": 12,
        "pad_token_id": 0,
        "splits": {"train": {"shards": 3, "samples": 10}, "test": {"shards": 1, "samples": 3}},
    }
    said = capsys.readouterr().out
    assert max(len(line) for line in said.replace(f"{tmp_path}/", "").splitlines()) <= 80
    said = " ".join(said.replace("\\\n", "").split())
    assert "10 samples in 3 shards" in said and "3 samples in 1 shard " in said
    assert "data.sequence_length=18 model.vocab_size=16 model.window=12" in said


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    one = build_small(tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 12345.0)
    two, other = build_small(tmp_path / "two"), build_small(tmp_path / "other", seed=6)
    assert bytes_of(one, "one", "two") == bytes_of(two)
    assert (one / "train-000000.tar").read_bytes() != (other / "train-000000.tar").read_bytes()


def test_nothing_is_written_over(tmp_path):
    folder = build_small(tmp_path / "data")
    before = (folder / "train-000000.tar").read_bytes()
    with pytest.raises(
        DataError, match=r"data is a finished build, which differs \(seed=5 there, 9 here\): nothing is written over"
    ):
        build_small(folder, seed=9)
    assert (folder / "train-000000.tar").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file exists"):
        build_small(tmp_path / "file")


def test_a_finished_build_is_left_alone(tmp_path, capsys):
    folder = build_small(tmp_path / "data")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_small(folder)
    assert "is built already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / "train-000001.tar").write_bytes(b"half")
    with pytest.raises(DataError, match="was built with the same fields, but its shards are others now"):
        build_small(folder)


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch):
    drawn = []

    def interrupt(self, rng, held_out):
        drawn.append(1)
        if len(drawn) == 7:  # in the second shard
            raise KeyboardInterrupt
        return draw(self, rng, held_out)

    draw = Depo.sample
    monkeypatch.setattr(Depo, "sample", interrupt)
    (tmp_path / "data").mkdir()  # an empty folder is as good as none
    with pytest.raises(KeyboardInterrupt):
        build_small(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == [".data.unfinished"]
    with pytest.raises(
        DataError, match=r"holds part of another build \(seed=5 there, 6 here\): finish that, or remove the folder"
    ):
        build_small(tmp_path / "data", seed=6)
    drawn.clear()
    drawn += [1] * 10
    build_small(tmp_path / "data")
    assert len(drawn) == 10 + 9 + 2  # four samples were there; two are drawn to see whether the sizes allow any
    monkeypatch.undo()
    assert bytes_of(tmp_path / "data") == bytes_of(build_small(tmp_path / "whole"), "whole", "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]


def test_what_has_no_finished_shard_blocks_no_other_build(tmp_path, monkeypatch):
    """Unless it is running."""
    monkeypatch.setattr(build, "make_shards", interrupt := Interrupt())
    with pytest.raises(KeyboardInterrupt):
        build_small(tmp_path / "data")
    assert (tmp_path / ".data.unfinished" / "manifest.json").exists()
    interrupt.meanwhile = lambda: build_small(tmp_path / "data", seed=7)
    with pytest.raises(DataError, match=r"another build \(seed=6 there, 7 here\), which is running"):
        build_small(tmp_path / "data", seed=6)
    monkeypatch.undo()
    build_small(tmp_path / "data", seed=7)
    assert bytes_of(tmp_path / "data") == bytes_of(build_small(tmp_path / "other" / "data", seed=7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other"]


class Interrupt:
    """Stands for `make_shards`."""

    def __init__(self):
        self.meanwhile = lambda: None

    def __call__(self, *_):
        self.meanwhile()
        raise KeyboardInterrupt


def test_a_part_that_finishes_second_leaves_no_lock(tmp_path):
    folder = build_small(tmp_path / "data")
    splits = build._finish({}, [], tmp_path / ".data.unfinished", folder, workers=1)
    assert splits["train"]["samples"] == 10 and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_any_number_of_cores_gives_the_same_bytes(tmp_path):
    one, two = build_small(tmp_path / "one"), build_small(tmp_path / "two", workers=2)
    assert bytes_of(one, "one", "two") == bytes_of(two)


def bytes_of(folder, name="", other=""):
    """Of every file; the manifest as if the folder had another name."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["manifest.json"] = found["manifest.json"].replace(f"depo {name} ".encode(), f"depo {other} ".encode())
    return found


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/data: cannot be written \(") as error:
        build_small(tmp_path / "file" / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_samples": -1}, "--train-samples=-1: write 0 or more"),
        ({"test_samples": 0}, "--test-samples=0: write 1 or more"),
        ({"test_samples": -1}, "--test-samples=-1: write 1 or more"),
        ({"samples_per_shard": 0}, "--samples-per-shard=0: write 1 or more"),
        ({"seed": -1}, "--seed=-1: write 0 or more"),
    ],
)
def test_numbers_without_sense_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        build_small(tmp_path / "data", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_test_set_alone(tmp_path, capsys):
    folder = build_small(tmp_path / "data", train_samples=0)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "test-000000.index", "test-000000.tar"]
    assert f"data.train=... \\\n  data.test='{folder}/test-*.tar'" in capsys.readouterr().out
    build_small(tmp_path / "data", train_samples=0)
    assert "is built already" in capsys.readouterr().out


def test_train_and_test_come_from_different_streams(tmp_path, monkeypatch):
    monkeypatch.setattr("powernap.train.tasks.rule110.draw_problem", lambda draw, *_: draw())  # without the split
    sizes = dict(train_samples=3, test_samples=3, samples_per_shard=3, seed=0, workers=1)
    build_task("rule110", Rule110(), tmp_path / "data", **sizes)
    train, test = (read(tmp_path / "data" / f"{split}-000000.tar") for split in ("train", "test"))
    for number in range(3):
        one, other = train[f"train-{number:09d}.tokens.npy"], test[f"test-{number:09d}.tokens.npy"]
        assert not np.array_equal(one, other)


def test_inspect_marks_windows_and_loss_tokens(tmp_path):
    folder = build_small(tmp_path / "data")
    report = inspect_shards(str(folder / "train-*.tar"), ShardCache(tmp_path / "cache"), show=1)
    assert max(len(line) for line in report.splitlines()) <= 80
    sample = TASK.sample(np.random.default_rng([5, 0, 0]), held_out=False)
    start, stop, depth = sample.answers[0].tolist()
    assert f"depth {depth}: {sample.tokens[start]}  (tokens {start}..{stop - 1})" in report
    assert f"[hop {depth}]" in report and f"*{sample.tokens[start]}*" in report
    assert "window 0, slept on:" in report and "window 1, answers:" in report
    assert "shards        3, 0.0 MB" in report and "180, 18 a sample" in report and "20, 11.1%" in report
    assert sum(int(line.split()[1]) for line in report.splitlines() if line.strip()[:1] in "123" and "#" in line) == 20
    report = inspect_shards(str(folder), ShardCache(tmp_path / "cache"), show=0)
    assert report.startswith("shards        4, ")


def test_inspect_reads_shards_of_any_origin(tmp_path):
    """Without a manifest tokens are numbers, and the window is what one asks for."""
    folder = build_small(tmp_path / "data")
    (folder / "manifest.json").unlink()
    report = inspect_shards(str(folder), ShardCache(tmp_path / "cache"), window=6)
    assert "window 2, answers:" in report and "built by" not in report
    (folder / "train-000000.tar").write_text("text")
    with pytest.raises(DataError, match="train-000000.tar: cannot be read"):
        inspect_shards(str(folder), ShardCache(tmp_path / "cache"))


def test_a_building_process_that_is_killed_is_one_line(tmp_path, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    killed.__module__, killed.__qualname__ = build.make_shards.__module__, build.make_shards.__qualname__
    monkeypatch.setattr(build, "make_shards", killed)
    forking = multiprocessing.get_context("fork")  # it has what is set here
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda workers, **_: ProcessPoolExecutor(workers, forking))
    with pytest.raises(DataError, match="one of 2 building processes was killed.* --workers 1 takes less memory$"):
        build_small(tmp_path / "data", workers=2)
    monkeypatch.undo()
    assert build_small(tmp_path / "data").is_dir()
