"""Shards that every test here reads."""

import itertools
import shutil

import pytest

from powernap.train.data import cache
from tests.helpers.streams import SHARDS, VOCABULARY, write_shard


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
