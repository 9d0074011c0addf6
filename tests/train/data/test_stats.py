"""Statistics of shards, against counts over the sequences themselves; verification of their documents."""

import json
import shutil

import numpy as np
import pytest

from powernap.launch.cli import main
from powernap.train.data import bundle
from powernap.train.data.build import build, build_task
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError
from powernap.train.data.sample_sources import CorpusSource
from powernap.train.data.sequences import Cutting
from powernap.train.data.stats import stats_of
from powernap.train.data.text import Text
from powernap.train.data.verify import verify
from powernap.train.recipe_file import check
from powernap.train.tasks.depo import Depo
from tests.helpers.streams import one_line, sequences_of, write_tokens

PAD = 99


@pytest.mark.parametrize("mode", ["packed", "whole"])
@pytest.mark.parametrize("length", [2, 5, 33])
def test_what_is_cut_and_padded_is_what_the_sequences_show(tmp_path, monkeypatch, mode, length):
    monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 40)
    random, documents, sequences, seen = np.random.default_rng(length), [], 0, []
    (tmp_path / "data").mkdir()
    for shard in range(2):
        lengths = random.integers(1, 60, size=30)
        documents += [
            np.full(n, number, np.int64) for number, n in enumerate(lengths)
        ]  # a document's token is its number
        write_tokens(tmp_path / "data" / f"{shard}.tar", documents[-30:])
        cutting = Cutting(length, mode, PAD, 100)
        cut_at = {}  # document -> sequences with targets of its own, all but its first token
        for number, sample in enumerate(sequences_of(tmp_path / "data" / f"{shard}.tar", cutting, tmp_path / "cache")):
            sequences += 1
            seen.append(sample)
            for place in range(1, length):
                if sample.loss_mask[place] and sample.tokens[place] == sample.tokens[place - 1]:
                    cut_at.setdefault(int(sample.tokens[place]), set()).add(number)
        seen.append(sum(len(where) > 1 for where in cut_at.values()))
    found = stats_of(str(tmp_path / "data"), ShardCache(tmp_path / "cache"), Cutting(length, mode, PAD), 4)
    samples, cuts = [s for s in seen if not isinstance(s, int)], [s for s in seen if isinstance(s, int)]
    assert (found.sequences, found.cut) == (sequences, sum(cuts))
    assert found.padded == sum(int((s.tokens == PAD).sum()) for s in samples)
    assert found.tokens == sum(map(len, documents)) == found.loss_tokens and len(found.lengths) == 60
    assert found.windows == -(-(length - 1) // 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": "word " * n}) for n in range(1, 90)))
    text = check(Text, {"inputs": str(folder / "a.jsonl"), "window": 16, "windows": 2, "test_share": 0.1})
    build(CorpusSource(text, 5000), folder / "text", workers=1)
    task = Depo(nodes=6, max_hop=3, queries=2, names="ends")
    build_task("depo", task, folder / "depo", train_samples=10, test_samples=3, samples_per_shard=4, seed=5, workers=1)
    return folder


def test_the_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(data)
    arguments = ["data", "stats", "text", "text/test-*.tar", "--picture", str(tmp_path / "lengths.png")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    rows = {line[:32].strip(): line[32:].split() for line in said.splitlines()}
    assert rows["documents"][0] == "89" and rows["share of tokens"][0] != rows["share of tokens"][1]
    assert "of 2 windows" in said and "documents cut" in said
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", "text", "--sequence-length", "1025", "--documents", "whole"]) == 0
    assert "documents cut                    0 (0.0%)" in capsys.readouterr().out
    assert main(["data", "stats", "depo"]) == 0
    said = capsys.readouterr().out
    assert "sequences                        13" in said and "documents" not in said


def test_documents_and_sequences_are_not_counted_together(data, tmp_path):
    mixed = shutil.copytree(data / "text", tmp_path / "mixed")
    shutil.copy(data / "depo" / "train-000000.tar", mixed / "other.tar")
    with pytest.raises(DataError) as error:
        stats_of(str(mixed), ShardCache(tmp_path / "cache"), Cutting(33), 16)
    assert "holds documents," in one_line(error) and "other.tar does not" in str(error.value)


def test_verify_counts_the_tokens_of_documents(data, tmp_path):
    copy = shutil.copytree(data / "text", tmp_path / "copy")
    assert verify(copy).problems == []
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["tokens"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    ((file, problem),) = verify(copy).problems
    assert file == manifest["shards"][0]["file"] and "tokens, not" in problem
