"""Probes in shards: written, read, batched, checked before a run, shown."""

import numpy as np
import pytest
from webdataset.writer import TarWriter

from powernap.train.data.build import build_task
from powernap.train.data.cache import ShardCache
from powernap.train.data.check import check_data, predicting_windows
from powernap.train.data.inspect import inspect_shards
from powernap.train.data.loader import evaluation_batches, training_batches
from powernap.train.data.sample import DataError, decode, encode
from powernap.train.data.shard import Shard
from powernap.train.recipe_file import load_recipe
from powernap.train.tasks.sample import Sample
from powernap.train.tasks.track import Track

TASK = Track(asked="each", windows=3)  # [move] g, then a probe of two tokens, three times
PROBES = [(2, 4), (6, 8), (10, 12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes") / "data"
    counts = dict(train_samples=24, test_samples=8, samples_per_shard=24)
    build_task("track", TASK, folder, **counts, seed=0, workers=1)
    return folder


def recipe(folder, *overrides):
    shards = [f"data.train={folder}/train-*.tar", f"data.test={folder}/test-*.tar", "data.sequence_length=12"]
    return load_recipe("track", [*shards, "train.global_batch_size=8", *overrides])


def test_batches_hold_the_probes_that_all_samples_share(data):
    found = recipe(data)
    options = dict(vocab_size=10, rank=0, world_size=1)
    batch, _ = next(training_batches(found.data, batch_size=8, seed=0, **options))
    assert batch.probes == PROBES
    assert all(batch.probes == PROBES for batch in evaluation_batches(found.data, batch_size=8, limit=8, **options))
    assert predicting_windows(found) == ([False, True] * 3, PROBES)
    check_data(found)


def test_a_sample_without_probes_has_none(tmp_path):
    sample = Track().sample(np.random.default_rng(0), False)
    assert "probes.npy" not in encode("a", sample)
    assert "probes.npy" in encode("a", TASK.sample(np.random.default_rng(0), False))


def write(path, *probes, task=TASK):
    with TarWriter(str(path)) as tar:
        for number, rows in enumerate(probes):
            sample = task.sample(np.random.default_rng(number), False)
            tar.write(encode(str(number), Sample(sample.tokens, sample.loss_mask, sample.answers, np.array(rows))))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(2.0, 4.0)], r"must hold integer rows \(start, stop\), not float64 \[1, 2\]"),
        ([(2, 4, 1)], r"not int64 \[1, 3\]"),
        ([(6, 8), (2, 4)], "names tokens 2..3: probes follow each other in a sample of 12 tokens"),
        ([(2, 6), (5, 8)], "names tokens 5..7: probes follow"),
        ([(10, 14)], "names tokens 10..13: probes follow"),
        ([(10, 11)], "names tokens 10..10: .* each with a question and an answer"),
        ([(11, 13)], "names tokens 11..12"),
        ([(8, 11)], "token 11 is the first after a probe and cannot be a loss token"),
        ([(3, 5)], "token 3 is the first of a probe and cannot be a loss token"),
    ],
)
def test_probes_that_make_no_sense_are_refused(tmp_path, rows, words):
    write(tmp_path / "a.tar", rows)
    with pytest.raises(DataError, match=words) as error:
        for seed in range(40):  # until the sample has an answer in each window
            sample = TASK.sample(np.random.default_rng(seed), False)
            if len(sample.answers) == 3:
                break
        decode(
            {"__url__": "a.tar", "__key__": "0"}
            | {
                name: array
                for name, array in Shard.open(str(tmp_path / "a.tar"), ShardCache(tmp_path / "cache"))[0].items()
                if name == "probes.npy"
            }
            | members(sample)
        )
    assert "\n" not in str(error.value)


def members(sample):
    """The other members as bytes."""
    import io

    found = {}
    for name, array in zip(
        ("tokens.npy", "loss_mask.npy", "answers.npy"), (sample.tokens, sample.loss_mask, sample.answers), strict=True
    ):
        np.save(file := io.BytesIO(), array)
        found[name] = file.getvalue()
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.window=4"], "probe at token 2 comes after 2 tokens, within a window of model.window=4"),
        (["model.window=3"], "probe at token 2 comes after 2 tokens"),
        (["parallel.tensor=2", "parallel.sequence=true"], None),  # a probe's last token is read, too
    ],
)
def test_probes_that_do_not_fit_the_recipe_are_found_before_a_run(tmp_path, data, changes, words):
    write(tmp_path / "train-0.tar", PROBES, PROBES)  # beside no manifest, which would tell the window
    found = recipe(data, f"data.train={tmp_path}/train-0.tar", "data.test=null", *changes)
    if words is None:
        check_data(found)
        return
    with pytest.raises(DataError, match=words):
        check_data(found)


def test_samples_that_disagree_about_their_probes(tmp_path, data):
    write(tmp_path / "train-0.tar", PROBES, PROBES[1:])
    found = recipe(data, f"data.train={tmp_path}/train-0.tar", "data.workers=0", "data.shuffle_buffer=1")
    with pytest.raises(DataError, match="have their probes at different tokens"):
        check_data(found)
    with pytest.raises(DataError, match="samples of a batch have their probes at different tokens"):
        next(training_batches(found.data, batch_size=2, vocab_size=10, rank=0, world_size=1, seed=0))


def test_inspect_shows_probes(data):
    report = inspect_shards(str(data), ShardCache(data.parent / "cache"), show=1)
    lines = [line.strip().split(": ")[0] for line in report.splitlines()[1:7]]
    assert lines == ["window 0, slept on", "probe", "window 1, slept on", "probe", "window 2, slept on", "probe"]
