"""The index of a tar, and tars that are damaged."""

import os
import tarfile

import numpy as np
import pytest

from powernap.train.data.sample import DataError
from tests.helpers.streams import one_line, samples_of, write_shard


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


@pytest.mark.parametrize("keys", [["a-part000000", "a-part000002"], ["a-part000000", "b-part000001"], ["a-part000001"]])
def test_a_document_with_a_hole_is_noticed(tmp_path, keys):
    write_shard(tmp_path / "bad.tar", range(len(keys)), key=keys.__getitem__)
    with pytest.raises(DataError) as error:
        samples_of(tmp_path / "bad.tar")
    assert f"{tmp_path}/bad.tar: sample {keys[-1]} does not follow part" in one_line(error)


def test_a_file_that_was_replaced_is_indexed_anew(tmp_path):
    """With the same name, size and time: a copy from elsewhere."""
    for name, numbers in (("a.tar", [1, 2, 3]), ("b.tar", [4, 5])):
        write_shard(tmp_path / name, numbers)
        os.utime(tmp_path / name, (1, 1))
    assert (tmp_path / "a.tar").stat().st_size == (tmp_path / "b.tar").stat().st_size
    assert len(samples_of(tmp_path / "a.tar")) == 3
    (tmp_path / "b.tar").rename(tmp_path / "a.tar")
    assert len(samples_of(tmp_path / "a.tar")) == 2
