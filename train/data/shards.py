"""Build the shards of a task: tars of samples, made side by side, and a manifest.json that says what is in them."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from powernap.model.config import Section
from powernap.train.data.sample import DataError, encode
from powernap.train.tasks.sample import PAD

MANIFEST = "manifest.json"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made, by itself: it does not depend on any other."""

    split: str
    number: int
    first_sample: int
    samples: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


def build(
    task_name: str,
    task: Section,
    folder: Path,
    *,
    train_samples: int,
    test_samples: int,
    samples_per_shard: int,
    seed: int,
    workers: int | None = None,
) -> None:
    """Write train-000000.tar ..., test-000000.tar ... (held-out problems) and manifest.json into a new folder.

    The same arguments give the same bytes, on any number of cores. The folder appears when everything is written. Until
    then the shards lie in `.NAME.unfinished` beside it, and the same command goes on where it was stopped.

    Args:
        task: one of powernap.train.tasks.TASKS with its sizes.
        samples_per_shard: the most; a split's samples are spread evenly over its shards.
        workers: processes; None: one per core.

    Raises:
        DataError: if a number makes no sense, the folder holds something else, or cannot be written.
    """
    limits = {"train-samples": train_samples, "test-samples": test_samples, "samples-per-shard": samples_per_shard}
    for option, value in limits.items():
        if value < 1:
            raise DataError(f"--{option}={value}: write 1 or more")
    if seed < 0:
        raise DataError(f"--seed={seed}: write 0 or more")
    folder = Path(folder)
    about = {
        "task": task_name,
        "fields": task.model_dump(mode="json"),
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "command": _command(task_name, task, folder, limits, seed),
        "vocab_size": task.vocab_size,
        "sequence_length": task.sequence_length,
        "context_length": task.context_length,
        "window": task.window,
        "pad_token_id": PAD,
    }
    jobs = [
        job
        for split, samples in zip(SPLITS, (train_samples, test_samples), strict=True)
        for job in _spread(split, samples, samples_per_shard)
    ]
    try:
        if not _is_finished(folder, about, jobs):
            unfinished = _begin(folder, about)
            shards = _make_all(jobs, task, unfinished, seed, workers or len(os.sched_getaffinity(0)))
            (unfinished / MANIFEST).write_text(json.dumps(_manifest(about, shards), indent=2) + "\n")
            unfinished.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None

    counts = {split: sum(job.samples for job in jobs if job.split == split) for split in SPLITS}
    shards = {split: sum(job.split == split for job in jobs) for split in SPLITS}
    train, test = (_describe(counts[split], shards[split]) for split in SPLITS)
    print(f"{folder}: {train} to train on, {test} of held-out problems")
    print(f"for the recipe: data.train={folder}/train-*.tar data.test={folder}/test-*.tar")
    print(
        f"  data.sequence_length={task.sequence_length} model.vocab_size={task.vocab_size} model.window={task.window} "
        f"model.pad_token_id={PAD}"
    )


def _spread(split: str, samples: int, most: int) -> list[ShardJob]:
    """Even shard sizes, so that lanes with the same number of shards have the same number of samples."""
    shards = -(-samples // most)
    sizes = [samples // shards + (shard < samples % shards) for shard in range(shards)]
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        ShardJob(split, number, first, size) for number, (first, size) in enumerate(zip(firsts, sizes, strict=False))
    ]


def _is_finished(folder: Path, about: dict[str, Any], jobs: list[ShardJob]) -> bool:
    """Whether the folder holds these very shards already."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = {}
    same = all(manifest.get(key) == value for key, value in about.items() if key != "command")
    if same and [shard["file"] for shard in manifest["shards"]] == [job.file for job in jobs]:
        if all((folder / shard["file"]).stat().st_size == shard["bytes"] for shard in manifest["shards"]):
            print(f"{folder} is built already")
            return True
    raise DataError(f"{folder} exists and is not empty: nothing is written over; choose another folder")


def _begin(folder: Path, about: dict[str, Any]) -> Path:
    """The folder to work in: new, or that of the same command when it was stopped."""
    unfinished = folder.parent / f".{folder.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    note = unfinished / MANIFEST
    if note.exists():
        if json.loads(note.read_text()) != about:
            raise DataError(f"{unfinished} holds part of another build: finish that, or remove the folder")
    else:
        temporary = unfinished / "manifest.tmp"
        temporary.write_text(json.dumps(about))
        temporary.rename(note)
    if folder.exists():
        folder.rmdir()  # it is empty
    return unfinished


def _make_all(jobs: list[ShardJob], task: Section, folder: Path, seed: int, workers: int) -> list[dict[str, Any]]:
    """Make the shards that are not there yet; what the manifest says of each."""
    found = {job: _found(job, folder) for job in jobs}
    missing = [job for job, shard in found.items() if shard is None]
    progress = tqdm(
        total=sum(job.samples for job in jobs), desc="samples", unit="", disable=None
    )  # None: terminals only
    with progress:
        progress.update(sum(job.samples for job, shard in found.items() if shard))
        for job, shard in _run(missing, task, folder, seed, min(workers, len(missing))):
            found[job] = shard
            progress.update(job.samples)
    return list(found.values())


def _run(
    jobs: list[ShardJob], task: Section, folder: Path, seed: int, workers: int
) -> Iterator[tuple[ShardJob, dict[str, Any]]]:
    if workers <= 1:
        yield from ((job, make_shard(job, task, folder, seed)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts_to_the_parent) as pool:
        running = {pool.submit(make_shard, job, task, folder, seed): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_shard(job: ShardJob, task: Section, folder: Path, seed: int) -> dict[str, Any]:
    """Draw a shard's samples and write them; it appears under its name when it is whole."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    random = np.random.default_rng([seed, SPLITS.index(job.split), job.number])
    unfinished = folder / f"{job.file}.tmp"
    with (
        open(unfinished, "wb") as file,
        TarWriter(file, user="powernap", group="powernap", mtime=0) as tar,  # fixed, for the same bytes
    ):
        for number in range(job.first_sample, job.first_sample + job.samples):
            sample = task.sample(random, held_out=job.split == "test")
            tar.write(encode(f"{job.split}-{number:09d}", sample))
    unfinished.rename(folder / job.file)
    return _found(job, folder)


def _found(job: ShardJob, folder: Path) -> dict[str, Any] | None:
    """What the manifest says of a shard, None if it has not been made."""
    path = folder / job.file
    if not path.exists():
        return None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": job.file, "samples": job.samples, "bytes": path.stat().st_size, "sha256": digest}


def _manifest(about: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        own = [shard for shard in shards if shard["file"].startswith(split)]
        splits[split] = {"shards": len(own), "samples": sum(shard["samples"] for shard in own)}
    everything = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    return {**about, "splits": splits, "sha256": everything, "shards": shards}


def _command(task_name: str, task: Section, folder: Path, limits: dict[str, int], seed: int) -> str:
    """What to type to get the same bytes again."""
    fields = [
        f"{name}={json.dumps(value)}" for name, value in task.model_dump(mode="json", exclude_defaults=True).items()
    ]
    options = [f"--{name} {value}" for name, value in limits.items()]
    return " ".join(["powernap data build", task_name, str(folder.name), *fields, *options, f"--seed {seed}"])


def _describe(samples: int, shards: int) -> str:
    return f"{samples} samples in {shards} shard{'s' if shards > 1 else ''}"
