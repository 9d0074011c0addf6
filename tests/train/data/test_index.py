"""Indexes beside shards: a fresh machine reads no headers; what does not fit is named, and the shard read in its place."""

import shutil

import numpy as np
import pytest

from powernap.train.data import cache as caching
from powernap.train.data.build import build_task
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.tar_index import index_file, index_tar, read_index, write_index
from powernap.train.data.verify import verify
from powernap.train.tasks.depo import Depo

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "data"
    task = Depo(nodes=6, max_hop=3, queries=2, names="ends")
    build_task("depo", task, folder, train_samples=60, test_samples=1, samples_per_shard=30, seed=0, workers=1)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


def fetched(folder, caplog, shard=SHARD):
    """The index that the loader gets, and what is logged."""
    caplog.clear()
    index = ShardCache(folder / "cache").fetch(str(folder / shard))[1]
    shutil.rmtree(folder / "cache")
    return index, caplog.messages


def test_a_fresh_machine_reads_no_headers(folder, caplog, monkeypatch):
    expected = index_tar(folder / SHARD, SHARD)
    monkeypatch.setattr(caching, "index_tar", None)
    index, logged = fetched(folder, caplog)
    assert np.array_equal(index, expected) and index.dtype == expected.dtype and not logged
    assert index_file(folder / SHARD).stat().st_size < (folder / SHARD).stat().st_size / 50


def test_shards_without_one_are_read_as_before(folder, caplog):
    expected, _ = fetched(folder, caplog)
    index_file(folder / SHARD).unlink()
    index, logged = fetched(folder, caplog)
    assert np.array_equal(index, expected) and not logged
    assert not verify(folder).problems


@pytest.mark.parametrize("place", [0, 20, 60, 90, -1])
def test_a_damaged_one_is_named_and_the_shard_read_in_its_place(folder, caplog, place):
    expected, _ = fetched(folder, caplog)
    path = index_file(folder / SHARD)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    for damaged in (data, data[:70], b""):
        path.write_bytes(damaged)
        index, (line,) = fetched(folder, caplog)
        assert np.array_equal(index, expected)
        assert line.startswith(f"{path}: ") and ("damaged: copy it again" in line or "of another file than" in line)
        (problem,) = verify(folder).problems
        assert problem[0] == SHARD and str(path) in problem[1]


def test_one_of_another_shard_is_not_used(folder, caplog):
    expected, _ = fetched(folder, caplog)
    shutil.copy(index_file(folder / "train-000001.tar"), index_file(folder / SHARD))
    index, (line,) = fetched(folder, caplog)
    assert np.array_equal(index, expected) and "train-000000.index: of another file than" in line


def test_one_that_leads_out_of_the_shard_is_refused(folder):
    """Whoever wrote it: nothing is read or allocated beyond the shard's size."""
    index = index_tar(folder / SHARD, SHARD)
    for wrong in (index + 10**9, np.zeros((10**6, *index.shape[1:]), np.int64), index[:0]):
        write_index(folder / SHARD, wrong)
        with pytest.raises(DataError, match="train-000000.index: does not fit"):
            read_index(folder / SHARD, SHARD)
    write_index(folder / SHARD, index[:-1])  # it fits, but samples are missing
    assert len(read_index(folder / SHARD, SHARD)) == len(index) - 1
    assert verify(folder).problems == [(SHARD, f"{index_file(folder / SHARD)}: has other samples: delete it")]
