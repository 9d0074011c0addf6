"""One order of samples for every layout, before and after a stop."""

import itertools
import json

import numpy as np
import pytest

from powernap.model.config import SleepConfig
from powernap.train.batches import share_datasets
from powernap.train.data import loader, sequences
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from tests.helpers import tiny
from tests.helpers.cases import names
from tests.helpers.streams import (
    LENGTH,
    config,
    evaluate,
    global_order,
    numbers,
    read,
    stream,
    write_documents,
    write_shard,
)


@pytest.mark.parametrize(("world_size", "workers"), [(w, n) for w in (1, 2, 4) for n in (0, 1, 2) if (w, n) != (1, 0)])
def test_the_order_does_not_depend_on_the_layout(folder, world_size, workers):
    reference, state = global_order(folder / "train-*.tar", 1, 0, 14, shuffle_buffer=4)  # 112 samples, 44 an epoch
    assert global_order(folder / "train-*.tar", world_size, workers, 14, shuffle_buffer=4)[0] == reference
    assert json.loads(json.dumps(state)) == state  # it goes into a checkpoint


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("trial", names(range(4), range(50)))
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
        ranks, workers = int(random.randint(1, 5)), int(random.randint(4)) if trial % 10 == 0 else 0
        steps = int(random.randint(1, 11))
        part, state = global_order(
            shards, ranks, workers, steps, global_batch=12, state=json.loads(json.dumps(state)), **settings
        )
        found += part
    assert found == whole[: len(found)]


def test_going_on_opens_only_the_shards_it_reads_from(folder, monkeypatch):
    _, state = next(itertools.islice(stream(folder / "train-*.tar", lanes=2), 30, None))  # the fourth epoch
    opened, decoded = [], []
    monkeypatch.setattr(sequences, "decode", lambda *sample: decoded.append(1) or decode(*sample))
    original = Shard.open
    monkeypatch.setattr(
        Shard, "open", lambda name, *more, **options: opened.append(name) or original(name, *more, **options)
    )
    next(stream(folder / "train-*.tar", lanes=2, state=state))
    assert len(decoded) == 4 and 2 <= len(opened) <= 4


def test_ranks_that_are_given_the_datasets_look_at_no_shard(folder, monkeypatch, topology):
    """One rank opens them all for their fingerprint, and shares it; what it cannot find is refused on all."""
    expected, _ = global_order(folder / "train-*.tar", 2, 0, 3)
    recipe = tiny.recipe(tiny.model_config(), SleepConfig(), 1, LENGTH, train={"steps": 100, "global_batch_size": 8})
    recipe = recipe.model_copy(update={"data": config(folder / "train-*.tar")})
    datasets = share_datasets(recipe, topology)
    monkeypatch.setattr(loader, "fingerprint", None)
    monkeypatch.setattr(loader, "expand_shards", None)
    assert global_order(folder / "train-*.tar", 2, 0, 3, datasets=datasets)[0] == expected
    monkeypatch.undo()
    gone = recipe.model_copy(update={"data": config(folder / "gone-*.tar")})
    with pytest.raises(DataError, match="no file matches"):
        share_datasets(gone, topology)


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


@pytest.mark.parametrize("buffer", [4, 100])
def test_every_epoch_mixes_a_shard_anew(folder, buffer):
    epochs = numbers(read(folder / "train-1.tar", batch_size=6, shuffle_buffer=buffer, lanes=1), 4)
    assert len({tuple(epoch) for epoch in epochs}) > 2 and len({frozenset(epoch) for epoch in epochs}) == 1


def test_the_seed_and_the_buffer_change_the_order(folder):
    orders = {
        tuple(itertools.chain(*numbers(read(folder / "train-*.tar", seed=seed, shuffle_buffer=buffer, lanes=1), 11)))
        for seed, buffer in ((0, 1), (1, 1), (0, 20), (0, 20), (1, 20))
    }
    assert len(orders) == 4 and all(sorted(order) == list(range(44)) for order in orders)


LENGTHS = [[3, 1, 2], [5], [1, 1, 4], [2, 2]]  # parts of the documents in each of four shards


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Shards of documents, and how each sample goes on: number -> the next part's, None behind the last."""
    library, first, following = tmp_path_factory.mktemp("library"), 0, {}
    for shard, lengths in enumerate(LENGTHS):
        for last in first + np.cumsum(lengths) - 1:
            following[int(last)] = None
        first = write_documents(library / f"train-{shard}.tar", lengths, first)
    return library, {number: following.get(number, number + 1) for number in range(first)}


def in_documents(library, ranks=1, workers=0, steps=20, state=None, buffer=100):
    settings = dict(whole_documents=True, shuffle_buffer=buffer, seed=3)
    return global_order(library / "train-*.tar", ranks, workers, steps, global_batch=4, state=state, **settings)


@pytest.mark.parametrize("buffer", [1, 2, 100])
def test_every_row_goes_on_with_its_document(library, buffer):
    library, following = library
    rows = list(zip(*in_documents(library, buffer=buffer)[0], strict=True))
    for row in rows:
        for number, after in itertools.pairwise(row):
            begins = after - 1 not in following or following[after - 1] is None
            assert after == following[number] or (following[number] is None and begins)
    assert {number for row in rows for number in row} == set(following)
    if buffer > 1:  # documents are mixed, not their parts
        assert any(after not in (number + 1, None) for row in rows for number, after in itertools.pairwise(row))


def test_a_batch_says_which_rows_begin(library):
    library, following = library
    beginnings = {number for number in following if number == 0 or following[number - 1] is None}
    stream_of_one = stream(library / "train-*.tar", whole_documents=True, lanes=4)
    for batch, _ in itertools.islice(stream_of_one, 12):
        assert batch.is_document_start.tolist() == [number in beginnings for number in batch.tokens[:, 1].tolist()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("ranks", "workers", "steps"), [(2, 0, 7), (4, 0, 3), (1, 3, 10), (2, 2, 5)])
def test_documents_go_on_after_a_stop_in_their_middle(library, ranks, workers, steps):
    library, _ = library
    whole, _ = in_documents(library)
    part, state = in_documents(library, ranks, workers, steps)
    rest, _ = in_documents(library, steps=20 - steps, state=json.loads(json.dumps(state)))
    assert part + rest == whole


def test_documents_are_evaluated_side_by_side(library):
    library, _ = library
    batches = evaluate(library / "train-*.tar", batch_size=2)
    assert numbers(batches)[:5] == [[0, 3], [1, 3], [2, 3], [4, 6], [5, 7]]
    assert [batch.is_document_start.tolist() for batch in batches[:5]] == [
        [True] * 2,
        *[[False] * 2] * 2,
        [True] * 2,
        [False] * 2,
    ]
    assert counted(batches) == list(range(sum(map(sum, LENGTHS))))
    ranks = [evaluate(library / "train-*.tar", batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert counted(itertools.chain(*ranks)) == counted(batches)


def counted(batches):
    """The samples with something to count, in order."""
    rows = ((batch, row) for batch in batches if batch.is_real for row in range(len(batch.tokens)))
    return sorted(batch.tokens[row, 1].item() for batch, row in rows if batch.loss_mask[row].any())
