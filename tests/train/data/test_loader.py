"""Batches: what is in them, and every bad sample told in one line."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from powernap.parallel.liveness import exit_codes
from powernap.train.data.cache import ShardCache
from powernap.train.data.loader import ReaderError, readers_watched
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard import Shard
from tests.helpers.streams import LENGTH, VOCABULARY, evaluate, numbers, one_line, read, write_shard


def test_a_batch_holds_what_the_shards_hold(folder):
    batch = next(read(folder / "train-0.tar"))
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (4, LENGTH)
    assert batch.tokens.tolist() == [[n] * LENGTH for n in range(4)]
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.tolist() == [[False] * 6 + [True] * 2] * 4
    assert [answers.tolist() for answers in batch.answers] == [[[6, 8, 3]]] * 4


def test_reading_leaves_torchs_random_numbers_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(read(folder / "train-*.tar", workers=2))
    assert torch.equal(torch.rand(3), expected)


def _read_until_killed(folder, number, to):
    """What comes of a reader that signal `number` ends; torch would raise that wherever a process stands afterwards."""
    try:
        with readers_watched():
            batches = read(folder / "train-*.tar", workers=1)
            next(batches)
            (reader,) = multiprocessing.active_children()
            os.kill(reader.pid, number)
            list(batches)
    except Exception as error:
        to.send((type(error), str(error), getattr(error, "exit_code", None), reader.pid))
    os._exit(0)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "SIGKILL, as the system does when memory"), (signal.SIGABRT, "SIGABRT; ")]
)
def test_a_reader_that_is_killed_is_one_line(folder, number, words):
    """The run may be started again: nothing is wrong with it."""
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe(duplex=False)
    process = forking.Process(target=_read_until_killed, args=(folder, number, there))
    process.start()
    kind, text, exit_code, pid = here.recv()
    process.join()
    assert kind is ReaderError and exit_code == exit_codes.FAILED, text
    assert text.startswith(f"a reader process (pid {pid}) was ended by {words}") and text.endswith(
        "continue with --resume"
    )


def test_evaluation_reads_in_file_order(folder):
    batches = evaluate(folder / "train-*.tar", limit=10)
    assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[2].answers[1].tolist() == [[6, 8, 3]]
    assert numbers(evaluate(folder / "train-*.tar", rank=1, world_size=3, limit=10)) == [[1, 4, 7]]
    assert sum(numbers(evaluate(folder / "train-*.tar")), []) == list(range(44))
    (without,) = evaluate(folder / "train-*.tar", rank=2, world_size=3, limit=2)  # as many batches as the other ranks
    assert not without.is_real and [len(answers) for answers in without.answers] == [0]
    assert [len(evaluate(folder / "train-*.tar", rank=rank, world_size=2, limit=9)) for rank in (0, 1)] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens.npy": None}, "has no tokens.npy"),
        ({"answers.npy": None}, "has no answers.npy"),
        ({"tokens.npy": np.zeros(9, np.int32)}, "has 9 tokens, data.sequence_length=8: write data.sequence_length=9"),
        ({"tokens.npy": np.full(8, 120, np.int32)}, "token 120, model.vocab_size=100: write model.vocab_size=121"),
        ({"tokens.npy": np.full(8, -1, np.int32)}, "token -1 is negative"),
        ({"tokens.npy": np.zeros(8)}, "tokens.npy must hold integers [T], not float64 [8]"),
        ({"tokens.npy": b"text"}, "tokens.npy is not a NumPy array"),
        ({"tokens.npy": b"\x93NUMPY\x01\x00v\x00"}, "tokens.npy is not a NumPy array"),
        ({"loss_mask.npy": np.ones(7, bool)}, "loss_mask.npy must hold booleans [8], not bool [7]"),
        ({"loss_mask.npy": np.ones(8, np.int32)}, "loss_mask.npy must hold booleans [8], not int32 [8]"),
        ({"loss_mask.npy": np.arange(8) == 0}, "loss_mask.npy marks no token after the first"),
        ({"answers.npy": np.zeros((2, 2), np.int32)}, "answers.npy must hold integer rows (start, stop, depth)"),
        ({"answers.npy": np.array([(6, 9, 1)])}, "answers.npy names tokens 6..8, which are not all loss tokens"),
        ({"answers.npy": np.array([(5, 7, 1)])}, "answers.npy names tokens 5..6, which are not all loss tokens"),
    ],
)
def test_a_sample_that_does_not_fit_names_shard_sample_and_field(tmp_path, changes, message):
    write_shard(tmp_path / "bad.tar", [7], **changes)
    for reading in (lambda: next(read(tmp_path / "bad.tar", batch_size=1)), lambda: evaluate(tmp_path / "bad.tar")):
        with pytest.raises(DataError) as error:
            reading()
        text = one_line(error)
        assert text.startswith(f"{tmp_path}/bad.tar: sample sample-007") and message in text


def test_a_sample_without_answers_is_fine(tmp_path):
    write_shard(tmp_path / "text.tar", [7], **{"answers.npy": np.zeros((0, 3), np.int32)})
    (batch,) = evaluate(tmp_path / "text.tar")
    assert batch.answers[0].shape == (0, 3)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(10240), b"x" * 100], ids=["empty", "text", "0", "x"])
def test_a_file_that_is_no_tar(copy, content):
    (copy / "train-3.tar").write_bytes(content)
    with pytest.raises(DataError) as error:
        numbers(read(copy / "train-*.tar"), 12)
    assert f"{copy}/train-3.tar: " in one_line(error)


@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
def test_an_error_in_a_reader_process_arrives_at_once_and_ends_them_all(copy, damage):
    batches = read(copy / "train-*.tar", workers=2, batch_size=1)
    bad = copy / "train-3.tar"
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:3000])
    elif damage == "text":
        bad.write_text("garbage")
    start = time.perf_counter()
    with pytest.raises(DataError) as error:
        for step, _ in enumerate(batches):
            assert step < 100
            if damage == "gone":
                bad.unlink(missing_ok=True)  # while the readers run
    assert f"{bad}: " in one_line(error)
    assert time.perf_counter() - start < 10
    assert multiprocessing.active_children() == []


def test_reader_processes_end_when_the_batches_are_dropped(folder):
    batches = read(folder / "train-*.tar", workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("damage", ["sample", "cut", "text"])
def test_what_cannot_be_used_is_skipped_and_told(copy, damage):
    """The order of the other samples stays as it was."""
    bad, settings = copy / "train-3.tar", dict(batch_size=8, lanes=8, on_error="skip")
    whole = numbers(read(copy / "train-*.tar", **settings), 5)
    if damage == "sample":
        first, *rest = Shard.open(str(bad), ShardCache(Path.home()))
        number = int(decode(first, LENGTH, VOCABULARY).tokens[0])
        write_shard(bad, [120, *(int(decode(sample, LENGTH, VOCABULARY).tokens[0]) for sample in rest)])
        hole = [[0 if n == number else n for n in batch] for batch in whole]
    elif damage == "cut":
        bad.write_bytes(bad.read_bytes()[:8000])
    else:
        bad.write_text("garbage")
    with pytest.raises(DataError):
        numbers(read(copy / "train-*.tar", **{**settings, "on_error": "stop"}), 5)
    batches = list(itertools.islice(read(copy / "train-*.tar", **settings), 5))
    assert [reason for batch in batches for reason in batch.unusable if f"{bad}: " in reason]
    if damage == "sample":
        assert numbers(batches) == hole
        assert sum(not row.any() for batch in batches for row in batch.loss_mask) == 1
        assert sum(len(batch.unusable) for batch in batches) == 1


def test_skipping_a_whole_shard_leaves_the_others(copy):
    (copy / "train-3.tar").write_text("garbage")
    batches = list(itertools.islice(read(copy / "train-*.tar", lanes=1, batch_size=38, on_error="skip"), 2))
    others = [n for n in range(44) if not 16 <= n < 22]
    assert [sorted(batch) for batch in numbers(batches)] == [others, others]
    assert [len(batch.unusable) for batch in batches] == [1, 0]


def test_nothing_but_damage_is_an_error_at_last(copy):
    for shard in copy.glob("*.tar"):
        shard.write_text("garbage")
    with pytest.raises(DataError, match="no sample can be read from .* and others: build the shards again"):
        next(read(copy / "train-*.tar", on_error="skip"))
