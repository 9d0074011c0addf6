"""The training stream against plain WebDataset on the same shards, and how fast it is in the middle of a million samples.

Speed. Samples per second, in batches of tensors, after a warm-up; the same shards, shuffle buffer and readers. Plain
WebDataset is `WebDataset(shards).shuffle(buffer).decode().to_tuple(...)` in a DataLoader that stacks arrays. Rounds in turn,
one epoch each. Ours checks every sample and keeps a state; "cold" rounds include building the shards' indexes, "warm"
rounds find them.

Resuming. One million samples in 100 shards: seconds from the call to the first batch, from a state at half an epoch, with
indexes and without, in a process that has imported everything; and how long plain WebDataset takes to read up to there.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from benchmarks.common import paired_ratio, table, verdicts, write
from powernap.train.config import DataConfig
from powernap.train.data.cache import ShardCache
from powernap.train.data.loader import training_batches
from powernap.train.data.order import Cursor, Lane, Order
from powernap.train.data.sample import encode
from powernap.train.data.shard import Shard
from powernap.train.tasks.sample import Sample

LENGTH, VOCABULARY, BATCH, BUFFER = 360, 118, 32, 2000  # Depo's sizes
SHARDS, PER_SHARD = 8, 2000


def main(options: argparse.Namespace, command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        speed_numbers, speed_report, speed_targets = speed(Path(folder), rounds=2 if options.quick else 7)
        resume_numbers, resume_report, resume_targets = resume(Path(folder), 20 if options.quick else 100)
    judged, verdict = verdicts(speed_targets + resume_targets)
    numbers = {"speed": speed_numbers, "resume": resume_numbers, "targets": judged}
    write("loader", command, numbers, [*speed_report, *resume_report, *verdict], clock="wall time")


def speed(folder: Path, rounds: int):
    shards = write_shards(folder / "speed", SHARDS, PER_SHARD, LENGTH)
    rows, numbers, targets = [], {}, []
    for workers in (0, 2):
        print(f"loader: {workers} readers", flush=True)
        times: dict[str, list[float]] = {"webdataset": [], "cold": [], "warm": []}
        for number in range(1 + rounds):
            names = list(times) if number % 2 else ["cold", "warm", "webdataset"]  # warm always follows cold
            for name in names:
                if name == "cold":
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                batches = plain(shards, workers) if name == "webdataset" else ours(shards, folder / "cache", workers)
                seconds = time_epoch(batches)
                if number:
                    times[name].append(seconds)
        samples = SHARDS * PER_SHARD
        rates = {name: samples / statistics.median(seconds) for name, seconds in times.items()}
        ratios = {name: paired_ratio(times["webdataset"], times[name]) for name in ("cold", "warm")}
        numbers[workers] = {"samples_per_second": rates, "over_webdataset": ratios}
        rows.append([workers, *(round(rate) for rate in rates.values()), *ratios.values()])
        targets += [(f"speed over WebDataset, {workers} readers, {name}", ratios[name], ">=", 0.95) for name in ratios]
    columns = ["readers", "WebDataset", "cold", "warm", "cold/WebDataset", "warm/WebDataset"]
    size = f"{SHARDS} shards of {PER_SHARD} samples of {LENGTH} tokens, batches of {BATCH}, shuffle buffer {BUFFER}."
    return numbers, ["## Samples a second", "", size, "", *table(columns, rows), ""], targets


def plain(shards: list[str], workers: int) -> Iterator[torch.Tensor]:
    """An epoch of batches as WebDataset's own README reads them."""
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
    dataset = dataset.shuffle(BUFFER).decode().to_tuple("tokens.npy", "loss_mask.npy", "answers.npy")
    for tokens, loss_mask, _ in DataLoader(
        dataset.batched(BATCH, collation_fn=stack), batch_size=None, num_workers=workers
    ):
        assert loss_mask.shape == tokens.shape
        yield tokens


def stack(samples: list[tuple]) -> tuple:
    tokens, loss_mask, answers = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(tokens).astype(np.int64)), torch.from_numpy(np.stack(loss_mask)), list(answers)


def ours(shards: list[str], cache: Path, workers: int) -> Iterator[torch.Tensor]:
    """One epoch's number of batches."""
    batches = stream(shards, cache, workers)
    for _ in range(SHARDS * PER_SHARD // BATCH):
        yield next(batches)[0].tokens
    batches.close()


def stream(shards: list[str], cache: Path, workers: int = 0, length: int = LENGTH, state: dict | None = None):
    fields = {
        "train": shards,
        "sequence_length": length,
        "workers": workers,
        "shuffle_buffer": BUFFER,
        "cache": str(cache),
    }
    data = DataConfig.model_validate(fields)
    place = dict(batch_size=BATCH, vocab_size=VOCABULARY, rank=0, world_size=1, seed=0)
    return training_batches(data, **place, state=state)


def time_epoch(batches: Iterator[torch.Tensor]) -> float:
    start = time.perf_counter()
    samples = sum(len(tokens) for tokens in batches)
    seconds = time.perf_counter() - start
    assert samples >= SHARDS * PER_SHARD - BATCH * 2, samples  # WebDataset's readers end with batches that are not full
    return seconds


def resume(folder: Path, shards: int):
    print("loader: a million samples", flush=True)
    per_shard, length = 1_000_000 // 100, 16
    (first,) = write_shards(folder / "million", 1, per_shard, length)
    names = [first, *(first.replace("000000", f"{number:06d}") for number in range(1, shards))]
    for name in names[1:]:
        os.link(first, name)  # the same bytes, but a separate shard with its own index
    cache, done = folder / "cache-million", shards * per_shard // 2 // BATCH * BATCH
    state = state_at(names, cache, length, done)
    seconds = {}
    for form in ("without indexes", "with indexes"):
        if form == "without indexes":
            shutil.rmtree(cache)
        start = time.perf_counter()
        batch, after = next(stream(names, cache, length=length, state=state))
        seconds[form] = time.perf_counter() - start
        assert after["samples"] == done + BATCH and len(batch.tokens) == BATCH
    start = time.perf_counter()
    samples = webdataset.WebDataset(names, shardshuffle=len(names), seed=0).shuffle(BUFFER).decode()
    for number, _ in enumerate(samples):
        if number == done // 10:
            break
    seconds["WebDataset, read up to there"] = 10 * (time.perf_counter() - start)  # a tenth of the way, times ten
    report = [
        "## Going on in the middle",
        "",
        f"{shards * per_shard:,} samples in {shards} shards, after {done:,}; seconds to the first batch.",
        "",
        *table(["form", "seconds"], [[form, value] for form, value in seconds.items()]),
        "",
    ]
    return seconds, report, [("seconds to continue, with indexes", seconds["with indexes"], "<=", 2.0)]


def state_at(names: list[str], cache: Path, length: int, done: int) -> dict:
    """The state after `done` samples, as the run itself would have kept it: by opening every shard on the way."""
    _, state = next(stream(names, cache, length=length))
    (lanes,) = state["settled"]["lanes"]
    order, shards = Order(tuple(names), lanes, 0, BUFFER), ShardCache(cache)
    cursors = {}
    for number in range(lanes):
        lane = Lane(order, number, Cursor(), lambda name, _: Shard.open(name, shards))
        lane.find((done - 1 - number) // lanes)
        cursors[str(number)] = list(lane.cursor)
    return {**state, "samples": done, "cursors": {"": cursors}}


def write_shards(folder: Path, shards: int, samples: int, length: int) -> list[str]:
    folder.mkdir()
    random = np.random.default_rng(0)
    mask = np.arange(length) >= length - 4
    names = [str(folder / f"train-{shard:06d}.tar") for shard in range(shards)]
    for shard, name in enumerate(names):
        with open(name, "wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
            for number in range(samples):
                tokens = random.integers(VOCABULARY, size=length, dtype=np.int32)
                sample = Sample(tokens, mask, np.array([(length - 4, length, 1)], np.int32))
                tar.write(encode(f"train-{shard * samples + number:09d}", sample))
    return names
