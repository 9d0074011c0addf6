"""Exact duplicates: the first of each kind stays, and the shards are those of an input without the others."""

import gzip
import json
import multiprocessing
import random

import numpy as np
import pytest
from filelock import FileLock

from powernap.train.data import build as building
from powernap.train.data import bundle, unique
from powernap.train.data.build import build
from powernap.train.data.cache import ShardCache
from powernap.train.data.documents import Tally
from powernap.train.data.sample import DataError
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.sequences import Cutting
from powernap.train.data.stats import stats_of
from powernap.train.data.text import Text
from powernap.train.recipe_file import check

RANDOM = random.Random(0)
TEXTS = [f"document {n} " + "word " * (n % 9 * (20 if n % 7 == 0 else 1)) for n in range(60)]
# Five files: each text once, and 40 again, before or after its first in the same file or in another.
FILES = [TEXTS[12 * n : 12 * n + 12] + RANDOM.sample(TEXTS[: 12 * n + 12], 8) for n in range(5)]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """So that some documents are longer than one."""
    monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 300)


def record(text, chat):
    if not chat:
        return {"text": text}
    return {"turns": [{"from": "human", "value": text[:11]}, {"from": "gpt", "value": text[11:] or "."}] * 2}


def write(folder, files, chat=False):
    folder.mkdir()
    for number, texts in enumerate(files):
        lines = "".join(json.dumps(record(text, chat)) + "\n" for text in texts)
        (folder / f"{number}.jsonl.gz").write_bytes(
            gzip.compress(lines.encode())
        )  # a file that is not divided: a shard
    return folder


def source(corpus, **fields):
    fields = {"inputs": str(corpus), "test_share": 0.2, "unique": True, **fields}
    return CorpusSource(check(Text, fields), 1)


def without_repeated(files):
    seen = set()
    return [[text for text in texts if not (text in seen or seen.add(text))] for texts in files]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


@pytest.mark.parametrize("chat", [False, True])
def test_the_shards_are_those_of_an_input_without_duplicates(tmp_path, monkeypatch, capsys, chat):
    monkeypatch.setattr(unique, "SORTED", 30)  # hashes are sorted in several turns
    fields = {"chat_field": "turns"} if chat else {}
    build(source(write(tmp_path / "in", FILES, chat), **fields), tmp_path / "data", 1)
    plain = source(write(tmp_path / "once", without_repeated(FILES), chat), **fields, unique=False)
    build(plain, tmp_path / "plain", 1)
    assert shards(tmp_path / "data") == shards(tmp_path / "plain") and len(shards(tmp_path / "data")) > 12
    manifest, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("data", "plain"))
    assert manifest["splits"] == {split: {k: v for k, v in counts.items() if k != "text_bytes"}
                                  for split, counts in other["splits"].items()}  # fmt: skip
    assert manifest["shards"] == other["shards"] and manifest["documents"] == 60
    assert manifest["left_out"] == {"the same as one before": 40}
    assert "40 documents left out: the same as one before" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "data").iterdir()} == {".tar", ".index", ".json"}
    stats = stats_of(str(tmp_path / "data"), ShardCache(tmp_path / "cache"), Cutting(33), 16)
    assert len(stats.lengths) == 60 and stats.row()["left out by the build"] == "40 the same as one before"


def test_on_several_cores_and_machines(tmp_path):
    corpus = write(tmp_path / "in", FILES)
    build(source(corpus), tmp_path / "one", 1)
    context = multiprocessing.get_context("fork")
    parts = [
        context.Process(target=build, args=(source(corpus), tmp_path / "parts", 1, (number, 3))) for number in (1, 2, 3)
    ]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert shards(tmp_path / "parts") == shards(tmp_path / "one")


def test_a_part_that_starts_while_another_one_finishes(tmp_path):
    """It must not take shards that are being written again for missing ones."""
    corpus = write(tmp_path / "in", FILES)
    with FileLock(tmp_path / ".data.lock"), pytest.raises(DataError, match="another part is finishing this build"):
        build(source(corpus), tmp_path / "data", 1)
    build(source(corpus), tmp_path / "data", 1)  # a lock that was left behind keeps nobody out


def test_an_input_without_text(tmp_path):
    with pytest.raises(DataError, match="the input holds no text"):
        build(source(write(tmp_path / "in", [[], []])), tmp_path / "data", 1)


@pytest.mark.parametrize("stopped_at", ["_write_shards", "hash_file", "_note"])
def test_a_build_that_is_stopped_while_shards_are_written_again(tmp_path, monkeypatch, stopped_at):
    """Continues to the same bytes; and with other input, in which a document is the first of its kind now, to those of it."""
    corpus = write(tmp_path / "in", FILES)
    build(source(corpus), tmp_path / "whole", 1)
    calls, rewrite = [], building._rewrite

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            monkeypatch.setattr(building, stopped_at, interrupted)
        return rewrite(*arguments)

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("data", "other"):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(building, stopped_at, getattr(building, stopped_at))  # put back at the end
            patch.setattr(building, "_rewrite", stopping)
            build(source(corpus), tmp_path / name, 1)
        monkeypatch.undo()
        monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 300)
    build(source(corpus), tmp_path / "data", 1)
    assert shards(tmp_path / "data") == shards(tmp_path / "whole")
    other = [["another text"], *FILES[1:]]  # the first texts come later now, in shards where they were left out
    for path in corpus.iterdir():
        path.unlink()
    corpus.rmdir()
    write(corpus, other)
    build(source(corpus), tmp_path / "other", 1)
    build(source(write(tmp_path / "once", without_repeated(other)), unique=False), tmp_path / "plain", 1)
    assert shards(tmp_path / "other") == shards(tmp_path / "plain")


def test_a_text_that_is_one_document_is_compared_as_a_whole(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("word " * 1000 + ("other" if name == "b" else ""))
    text = check(Text, {"inputs": str(tmp_path), "unique": True, "test_share": 0})
    build(CorpusSource(text, 100), tmp_path / "data", 1)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert [shard["tokens"] for shard in manifest["shards"]] == [5001, 5006]
    assert manifest["documents"] == 2 and manifest["left_out"] == {"the same as one before": 1}


def test_a_hash_is_of_all_pieces_of_a_document():
    text, tally = check(Text, {"inputs": "-"}), Tally()
    pieces = [("train", np.array(tokens), ends, True) for tokens, ends in (([1, 2], False), ([3], True), ([1, 2], True),
                                                                          ([1], False), ([2, 3], True))]  # fmt: skip
    assert list(text._hashed(iter(pieces), tally)) == pieces
    one, other, third = tally.hashes["train"]
    assert one == third != other
