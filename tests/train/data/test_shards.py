"""Building shards: what lies in them, the same bytes every time, nothing half and nothing written over."""

import io
import json
import tarfile

import numpy as np
import pytest

from powernap.train.data.sample import DataError
from powernap.train.data.shards import build
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.rule110 import Rule110

TASK = Depo(nodes=6, max_hop=3, queries=2, names="ends")


def build_small(folder, **changes):
    sizes = dict(train_samples=10, test_samples=3, samples_per_shard=4, seed=5)
    build("depo", TASK, folder, **{**sizes, **changes})
    return folder


def read(shard):
    """Each member of a tar as an array, in order."""
    with tarfile.open(shard) as tar:
        return {name: np.load(io.BytesIO(tar.extractfile(name).read())) for name in tar.getnames()}


def test_samples_lie_in_the_shards_as_the_task_drew_them(tmp_path):
    folder = build_small(tmp_path / "data")
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar",
    ]  # fmt: skip
    for split, stream, count in (("train", 0, 10), ("test", 1, 3)):
        members = {}
        sizes = []
        for shard in sorted(folder.glob(f"{split}-*.tar")):
            here = read(shard)
            sizes.append(len(here) // 3)
            members.update(here)
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
        generator = np.random.default_rng([5, stream])
        for number in range(count):
            sample = TASK.sample(generator, held_out=split == "test")
            for name in ("tokens", "loss_mask", "answers"):
                found = members.pop(f"{split}-{number:09d}.{name}.npy")
                assert np.array_equal(found, getattr(sample, name)) and found.dtype == getattr(sample, name).dtype
        assert not members


def test_the_manifest_says_what_the_shards_hold(tmp_path, capsys):
    folder = build_small(tmp_path / "data")
    assert json.loads((folder / "manifest.json").read_text()) == {
        "task": "depo",
        "fields": {"nodes": 6, "min_nodes": None, "max_hop": 3, "queries": 2, "names": "ends", "alphabet": 50},
        "seed": 5,
        "vocab_size": 16,
        "sequence_length": 18,
        "context_length": 12,
        "window": 12,
        "pad_token_id": 0,
        "splits": {"train": {"shards": 3, "samples": 10}, "test": {"shards": 1, "samples": 3}},
    }
    said = capsys.readouterr().out
    assert "10 samples in 3 shards" in said and "3 samples in 1 shard " in said
    assert "data.sequence_length=18 model.vocab_size=16 model.window=12" in said
    assert len(said.splitlines()) <= 4


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    one = build_small(tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 12345.0)
    two, other = build_small(tmp_path / "two"), build_small(tmp_path / "other", seed=6)
    names = sorted(path.name for path in one.iterdir())
    assert [(one / name).read_bytes() for name in names] == [(two / name).read_bytes() for name in names]
    assert (one / names[1]).read_bytes() != (other / names[1]).read_bytes()


def test_nothing_is_written_over(tmp_path):
    folder = build_small(tmp_path / "data")
    before = (folder / "train-000000.tar").read_bytes()
    with pytest.raises(DataError, match="data exists and is not empty: nothing is written over"):
        build_small(folder, seed=9)
    assert (folder / "train-000000.tar").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file exists"):
        build_small(tmp_path / "file")


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    drawn = iter(range(7))

    def interrupt(self, rng, held_out):
        if next(drawn, None) is None:
            raise KeyboardInterrupt
        return draw(self, rng, held_out)

    draw = Depo.sample
    monkeypatch.setattr(Depo, "sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_small(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "data").mkdir()  # an empty folder is as good as none
    assert (build_small(tmp_path / "data") / "manifest.json").is_file()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/data: cannot be written \(") as error:
        build_small(tmp_path / "file" / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_samples": 0}, "--train-samples=0: write 1 or more"),
        ({"test_samples": -1}, "--test-samples=-1: write 1 or more"),
        ({"samples_per_shard": 0}, "--samples-per-shard=0: write 1 or more"),
        ({"seed": -1}, "--seed=-1: write 0 or more"),
    ],
)
def test_numbers_without_sense_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        build_small(tmp_path / "data", **change)
    assert list(tmp_path.iterdir()) == []


def test_train_and_test_come_from_different_streams(tmp_path, monkeypatch):
    monkeypatch.setattr("powernap.train.tasks.rule110.draw_problem", lambda draw, *_: draw())  # without the split
    build("rule110", Rule110(), tmp_path / "data", train_samples=3, test_samples=3, samples_per_shard=3, seed=0)
    train, test = (read(tmp_path / "data" / f"{split}-000000.tar") for split in ("train", "test"))
    for number in range(3):
        one, other = train[f"train-{number:09d}.tokens.npy"], test[f"test-{number:09d}.tokens.npy"]
        assert not np.array_equal(one, other)
