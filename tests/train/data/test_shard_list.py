"""Shards by path, glob, brace list and URL."""

import pytest

from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import expand_shards
from tests.helpers.streams import SHARDS, one_line, read


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
