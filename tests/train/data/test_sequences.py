"""Documents, cut when they are read: every token once, in any grouping of the shard, and the same again after a stop."""

import json

import numpy as np
import pytest
import webdataset

from powernap.train.data import bundle
from powernap.train.data.cache import ShardCache
from powernap.train.data.sample import DataError, Documents, encode, token_type
from powernap.train.data.sequences import Cutting, pack
from powernap.train.data.shard import Shard
from tests.helpers.cases import names
from tests.helpers.streams import (
    VOCABULARY,
    evaluate,
    global_order,
    one_line,
    read,
    sequences_of,
    stream,
    write_tokens,
)

PAD = 99


def some_documents(random, count=40, longest=60):
    return [random.integers(1, PAD, size=random.integers(1, longest)).tolist() for _ in range(count)]


def expected(documents, length, mode):
    """(tokens, loss mask, whether it begins a document) of every sequence, by the definition."""
    stretches = documents if mode == "whole" else [sum(documents, [])]
    rows = []
    for tokens in stretches:
        for start in range(0, len(tokens) - 1, length - 1):
            here = tokens[start : start + length]
            mask = [False] + [True] * (len(here) - 1) + [False] * (length - len(here))
            rows.append((here + [PAD] * (length - len(here)), mask, start == 0 or mode == "packed"))
    return rows


@pytest.mark.parametrize("mode", ["packed", "whole"])
@pytest.mark.parametrize("length", [2, 3, 8, 17, 1000])
def test_every_token_is_a_target_once_however_the_shard_groups_them(tmp_path, monkeypatch, mode, length):
    documents = some_documents(np.random.default_rng(length))
    for most in (1, 7, 64, 2**16):  # tokens of a sample: documents divided, several together, all in one
        monkeypatch.setattr(bundle, "SAMPLE_TOKENS", most)
        write_tokens(tmp_path / f"{most}.tar", documents)
        found = sequences_of(tmp_path / f"{most}.tar", Cutting(length, mode, PAD, VOCABULARY))
        rows = [(s.tokens.tolist(), s.loss_mask.tolist(), found.begins_document(n)) for n, s in enumerate(found)]
        assert rows == expected(documents, length, mode)
        assert found.documents.tolist() == [n for n, row in enumerate(rows) if row[2]]
    assert len(Shard.open(f"{tmp_path}/7.tar", ShardCache(tmp_path / "cache"))) > 100


@pytest.mark.parametrize("seed", range(6))
def test_separate_documents_begin_at_windows_and_are_there_once(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 50)
    random = np.random.default_rng(seed)
    window, windows = int(random.integers(1, 9)), int(random.integers(1, 6))
    length = window * windows + 1
    documents = some_documents(random, longest=int(random.choice([window + 2, 3 * length])))
    write_tokens(tmp_path / "a.tar", documents)
    found = sequences_of(tmp_path / "a.tar", Cutting(length, "separate", PAD, VOCABULARY, window))
    pieces, used = [], []
    for sample in found:
        starts = sample.document_starts.nonzero()[0].tolist()
        assert starts[0] == 0 and all(start % window == 0 and start < length - 1 for start in starts)
        is_padded = sample.tokens == PAD
        used.append(-(-int((~is_padded).nonzero()[0][-1]) // window))
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            tokens = sample.tokens[start:stop][~is_padded[start:stop]].tolist()
            mask = [0 < place < len(tokens) for place in range(stop - start)]
            assert sample.loss_mask[start:stop].tolist() == mask
            pieces.append(tokens)
    cut = [document[at : at + length] for document in documents for at in range(0, len(document) - 1, length - 1)]
    assert sorted(pieces) == sorted(cut)
    needed = sum(min(-(-len(piece) // window), windows) for piece in cut)
    assert len(found) <= 1 + 1.25 * needed / windows  # best fit decreasing: at most 11/9 of the best, and one
    assert found.padded == sum(int((sample.tokens == PAD).sum()) for sample in found)


def test_best_fit_leaves_the_least_room():
    """Windows 3, 3, 2, 2, 1, 1 in sequences of four: the 1s go beside the 3s, not beside a 2."""
    sequence, first = pack(np.array([20, 9, 28, 10, 12, 30]), 10, 4)
    assert sequence.tolist() == [2, 1, 0, 0, 2, 1] and first.tolist() == [0, 3, 0, 3, 2, 0]


@pytest.mark.parametrize(("vocab_size", "most"), [(256, 1.2), (258, 2.2), (65_536, 2.2), (65_537, 4.3)])
def test_a_token_takes_no_more_bytes_than_the_vocabulary_asks_for(tmp_path, vocab_size, most):
    random = np.random.default_rng(0)
    documents = [random.integers(vocab_size, size=size) for size in random.integers(500, 1500, size=300)]
    write_tokens(tmp_path / "a.tar", documents, vocab_size)
    assert (tmp_path / "a.tar").stat().st_size / sum(map(len, documents)) <= most
    found = []
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode():  # any reader's arrays
        assert sample["tokens.npy"].dtype == token_type(vocab_size)
        found += np.split(sample["tokens.npy"], sample["lengths.npy"].cumsum()[:-1])
    assert len(found) == 300 and all(map(np.array_equal, found, documents))


def write_samples(path, samples):
    with webdataset.TarWriter(str(path)) as tar:
        for key, sample in samples:
            tar.write(encode(key, sample) if isinstance(sample, Documents) else {"__key__": key, **sample})


def test_loss_spans_say_which_tokens_are_targets(tmp_path):
    spans = np.array([(2, 4), (5, 6), (9, 12)], np.uint32)
    first = Documents(np.arange(12, dtype=np.uint8), np.array([7, 5], np.uint32), spans)
    second = Documents(np.arange(12, 17, dtype=np.uint8), np.array([5], np.uint32))  # all of them
    write_samples(tmp_path / "a.tar", [("a", first), ("b", second)])
    is_target = [n in (2, 3, 5, 9, 10, 11) or n > 11 for n in range(17)]
    for length in range(2, 18):
        found = sequences_of(tmp_path / "a.tar", Cutting(length, "packed", PAD, VOCABULARY))
        targets = [token for s in found for token in s.tokens[s.loss_mask].tolist()]
        assert targets == [n for n in range(17) if is_target[n]]


GOOD = {"tokens.npy": np.arange(6, dtype=np.uint8), "lengths.npy": np.array([2, 4], np.uint32)}


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("b", {"tokens.npy": None}, "has no tokens.npy"),
        ("b", {"tokens.npy": np.arange(6, dtype=np.int32)}, "must hold unsigned integers [n], not int32 [6]"),
        ("b", {"tokens.npy": np.ones((2, 3), np.uint8)}, "must hold unsigned integers [n], not uint8 [2, 3]"),
        ("b", {"tokens.npy": b"text"}, "tokens.npy is not a NumPy array"),
        ("b", {"lengths.npy": np.array([2, 3], np.uint32)}, "lengths.npy does not add up to its 6 tokens"),
        ("b", {"lengths.npy": np.array([0, 6], np.uint32)}, "lengths.npy does not add up to its 6 tokens"),
        ("b", {"lengths.npy": np.array([2**63, 2**63, 6], np.uint64)}, "lengths.npy does not add up to its 6 tokens"),
        ("b", {"lengths.npy": np.ones(6)}, "lengths.npy must hold integers [d], not float64 [6]"),
        ("b", {"lengths.npy": None}, "has no lengths.npy, or the one before has none"),
        ("b-part000000", {}, "is part of a document, but holds several"),
        ("b", {"loss_spans.npy": np.array([(1, 9)])}, "loss_spans.npy names tokens beyond its 6"),
        ("b", {"loss_spans.npy": np.array([(3, 4), (1, 2)])}, "or not in rising order"),
        ("b", {"loss_spans.npy": np.array([1, 2])}, "loss_spans.npy must hold integer rows (start, stop), not int64 [2]"),
    ],
)  # fmt: skip
def test_documents_that_do_not_fit_are_named_in_one_line(tmp_path, key, changes, message):
    members = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    write_samples(tmp_path / "a.tar", [("a", GOOD), (key, members)])
    with pytest.raises(DataError) as error:
        sequences_of(tmp_path / "a.tar", Cutting(4, "packed", PAD, VOCABULARY))
    assert one_line(error).startswith(f"{tmp_path}/a.tar: sample {key}") and message in str(error.value)
    write_tokens(tmp_path / "b.tar", [[1, 2, 3, 4]] * 2)
    batch = next(read(f"{tmp_path}/[ab].tar", batch_size=2, lanes=1, on_error="skip"))
    assert len(batch.unusable) == 1 and message in batch.unusable[0]  # the shard is left out, whole


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    write_tokens(tmp_path / "a.tar", [[1, 2, 3], [4, 120, 5]])
    for reading in (lambda: next(read(tmp_path / "a.tar", batch_size=1)), lambda: evaluate(tmp_path / "a.tar")):
        with pytest.raises(
            DataError, match="sample 000000 has token 120, model.vocab_size=100: write model.vocab_size=121"
        ):
            reading()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Six shards of documents; a sample holds a few of them, or a part of one."""
    library, random = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bundle, "SAMPLE_TOKENS", 50)
        for shard in range(6):
            write_tokens(library / f"train-{shard}.tar", some_documents(random, 25 + shard))
    return library


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("trial", names(range(4), range(50)))
def test_a_run_that_was_stopped_anywhere_goes_on_with_the_same_sequences(library, trial, tmp_path):
    """Ranks, readers and cache are others before and after; documents are cut at many lengths, in every way."""
    random = np.random.RandomState(trial)
    mode, length = ("packed", "whole", "separate")[trial % 3], int(random.choice([5, 9, 33, 69]))
    whole = mode == "whole" and trial % 2 == 1
    settings = dict(documents=mode, sequence_length=length, shuffle_buffer=int(random.choice([1, 3, 100])), seed=trial)
    settings |= dict(lanes=6 if whole else [None, 1, 3][random.randint(3)], whole_documents=whole)
    shards, size = library / "train-*.tar", 6 if whole else 12
    unbroken, _ = global_order(shards, 1, 0, 30, global_batch=size, **settings)
    found, state = [], None
    while len(found) < 20:
        ranks, steps = int(random.choice([1, 2, 3])), int(random.randint(1, 11))
        workers = int(random.randint(4)) if trial % 10 == 0 else 0
        state = json.loads(json.dumps(state))
        settings["cache"] = str(tmp_path / str(random.randint(3)))
        part, state = global_order(shards, ranks, workers, steps, global_batch=size, state=state, **settings)
        found += part
    assert found == unbroken[: len(found)]


@pytest.mark.parametrize("change", [{"sequence_length": 17}, {"documents": "whole"}, {"documents": "separate"}])
def test_another_cut_than_before_is_refused(library, change):
    fields = {"sequence_length": 9, "documents": "packed"}
    _, state = next(stream(library / "train-*.tar", **fields))
    (key,) = change
    with pytest.raises(DataError, match=f"the order of samples has changed: {key} was {fields[key]}, is {change[key]}"):
        next(stream(library / "train-*.tar", state=state, **(fields | change)))
    for name in fields:  # states of before held sequences, whose length the shards themselves fix
        del state["settled"][name]
    next(stream(library / "train-*.tar", state=state, **fields))


def test_sequences_are_named_by_sample_and_token(library):
    found = sequences_of(library / "train-0.tar", Cutting(17, "packed", PAD, VOCABULARY))
    keys = Shard.open(str(library / "train-0.tar"), ShardCache(library / "cache")).keys([0])
    assert found.names([0, 1]) == [f"{keys[0]} from token 0", f"{keys[0]} from token 16"]
