"""Build shards of a task or of text: tars of samples, made side by side, and a manifest.json that says what is in them."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from powernap.model.config import LARGEST, Section
from powernap.train.data.sample import DataError, encode
from powernap.train.data.text import Text
from powernap.train.tasks.sample import GENERATOR, PAD, Sample

MANIFEST = "manifest.json"
# What is read of it again, and the types; all may be missing.
_FIELDS = {"task": str, "fields": dict, "command": str, "vocab_size": int, "window": int, "context_length": int,
           "pad_token_id": int}  # fmt: skip
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Job:
    """What is made by itself, whatever becomes of the others: a shard, or one of each split."""

    number: int  # of the shard in its split
    amount: int  # of what the progress bar counts
    what: Any  # for `samples` of the source


@dataclass(frozen=True)
class TaskSource:
    """Samples that a task draws: a shard of a split has a random stream of its own."""

    name: str
    task: Section
    samples_of_split: dict[str, int]
    samples_per_shard: int
    seed: int
    unit: ClassVar[str] = " samples"

    def about(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "generator": GENERATOR,
            "fields": self.task.model_dump(mode="json"),
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
            "asked": self.samples_of_split,
        }

    def options(self) -> list[str]:
        counts = [f"--{split}-samples {count}" for split, count in self.samples_of_split.items()]
        return [*counts, f"--samples-per-shard {self.samples_per_shard}", f"--seed {self.seed}"]

    def jobs(self) -> list[Job]:
        """Even shard sizes, so that lanes with the same number of shards have the same number of samples."""
        jobs = []
        for split, samples in self.samples_of_split.items():
            shards = -(-samples // self.samples_per_shard)
            sizes = [samples // shards + (shard < samples % shards) for shard in range(shards)]
            firsts = itertools.accumulate(sizes, initial=0)
            jobs += [Job(n, size, (split, first)) for n, (first, size) in enumerate(zip(firsts, sizes, strict=False))]
        return jobs

    def samples(self, job: Job) -> Iterator[tuple[str, str, Sample]]:
        """Split, key and sample."""
        split, first = job.what
        random = np.random.default_rng([self.seed, SPLITS.index(split), job.number])
        for number in range(first, first + job.amount):
            yield split, f"{split}-{number:09d}", self.task.sample(random, held_out=split == "test")


@dataclass(frozen=True)
class TextSource:
    """Documents cut into sequences: a piece of the input is a shard, and one more of what is held out."""

    task: Text
    shard_bytes: int
    name: ClassVar[str] = "text"
    unit: ClassVar[str] = "B"

    def about(self) -> dict[str, Any]:
        files = {str(file): file.stat().st_size for file in self.task.files()}
        return {
            "task": "text",
            "fields": self.task.model_dump(mode="json"),
            "shard_bytes": self.shard_bytes,
            "files": files,
        }

    def options(self) -> list[str]:
        return [f"--shard-size {self.shard_bytes / 1e6:g}MB"]

    def jobs(self) -> list[Job]:
        return [Job(n, amount, parts) for n, (parts, amount) in enumerate(self.task.jobs(self.shard_bytes))]

    def samples(self, job: Job) -> Iterator[tuple[str, str, Sample]]:
        for split, key, sample in self.task.samples(job.what):
            yield split, f"{split}-{job.number:06d}-{key}", sample


Source = TaskSource | TextSource


def build_task(
    name: str,
    task: Section,
    folder: Path,
    *,
    train_samples: int,
    test_samples: int,
    samples_per_shard: int,
    seed: int,
    workers: int | None = None,
) -> None:
    """`build` of samples that a task draws.

    Args:
        task: one of powernap.train.tasks.TASKS with its sizes.
        samples_per_shard: the most; a split's samples are spread evenly over its shards.

    Raises:
        DataError: if a number makes no sense, and as `build` does.
    """
    limits = {"train-samples": train_samples, "test-samples": test_samples, "samples-per-shard": samples_per_shard}
    for option, value in limits.items():
        if value < 1:
            raise DataError(f"--{option}={value}: write 1 or more")
    if seed < 0:
        raise DataError(f"--seed={seed}: write 0 or more")
    for held_out in (False, True):  # sizes that allow no sample are reported before any process starts
        task.sample(np.random.default_rng(seed), held_out)
    counts = {"train": train_samples, "test": test_samples}
    build(TaskSource(name, task, counts, samples_per_shard, seed), folder, workers)


def build(source: Source, folder: Path, workers: int | None = None) -> None:
    """Write train-000000.tar ..., test-000000.tar ... (held out) and manifest.json into a new folder.

    The same arguments give the same bytes, on any number of cores. The folder appears when everything is written. Until
    then the shards lie in `.NAME.unfinished` beside it, and the same command goes on where it was stopped.

    Args:
        workers: processes; None: one per core.

    Raises:
        DataError: if the folder holds something else or cannot be written, or the input cannot be read.
    """
    folder, task = Path(folder), source.task
    pad = getattr(task, "pad_token_id", PAD)
    fields = [
        f"{name}={json.dumps(value)}" for name, value in task.model_dump(mode="json", exclude_defaults=True).items()
    ]
    about = {
        **source.about(),
        "command": " ".join(["powernap data build", source.name, folder.name, *fields, *source.options()]),
        "vocab_size": task.vocab_size,
        "sequence_length": task.sequence_length,
        "context_length": task.context_length,
        "window": task.window,
        "pad_token_id": pad,
    }
    try:
        splits = _finished(folder, about)
        if splits is None:
            unfinished = _begin(folder, about)
            shards = _make_all(source, unfinished, workers or len(os.sched_getaffinity(0)))
            manifest = _manifest(about, shards)
            splits = manifest["splits"]
            for done in unfinished.glob("*.done"):
                done.unlink()
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            unfinished.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None

    train, test = (_describe(**splits[split]) for split in SPLITS)
    print(f"{folder}: {train} to train on, {test} held out")
    test_shards = f"{folder}/test-*.tar" if splits["test"]["shards"] else "null"
    print(f"for the recipe: data.train={folder}/train-*.tar data.test={test_shards}")
    print(
        f"  data.sequence_length={task.sequence_length} model.vocab_size={task.vocab_size} model.window={task.window} "
        f"model.pad_token_id={pad}"
    )


def read_manifest(shard: Path) -> dict[str, Any]:
    """What the builder of the shards left beside one; empty if it left nothing.

    Raises:
        DataError: if something else lies there.
    """
    path = shard.parent / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
        valid = isinstance(manifest, dict) and all(
            _is_field(manifest.get(name), kind) for name, kind in _FIELDS.items()
        )
    except (OSError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise DataError(f"{path}: not a manifest: delete it, or build the shards again")
    return manifest


def _is_field(value: object, kind: type) -> bool:
    if isinstance(value, int):
        return kind is int and 0 <= value <= LARGEST
    return value is None or isinstance(value, kind)


def _finished(folder: Path, about: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """The manifest's splits if the folder holds these very shards already; None if it holds nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    manifest = read_manifest(folder / "train-000000.tar")
    if all(manifest.get(key) == value for key, value in about.items() if key != "command"):
        shards = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
        if shards == {path.name: path.stat().st_size for path in folder.glob("*.tar")}:
            print(f"{folder} is built already")
            return manifest["splits"]
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


def _make_all(source: Source, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Run the jobs that have not been done yet; what the manifest says of each shard."""
    jobs = source.jobs()
    done = {number: _done(number, folder) for number in range(len(jobs))}
    missing = [number for number, shards in done.items() if shards is None]
    total = sum(job.amount for job in jobs)
    with tqdm(total=total, unit=source.unit, unit_scale=True, desc=source.name, disable=None) as progress:
        progress.update(total - sum(jobs[number].amount for number in missing))
        for number, shards in _run(source, jobs, missing, folder, min(workers, len(missing))):
            done[number] = shards
            progress.update(jobs[number].amount)
    return [shard for shards in done.values() for shard in shards]


def _run(
    source: Source, jobs: list[Job], missing: list[int], folder: Path, workers: int
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    if workers <= 1:
        yield from ((number, make_shards(source, number, jobs[number], folder)) for number in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_belong_to_the_parent) as pool:
        running = {pool.submit(make_shards, source, number, jobs[number], folder): number for number in missing}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} building processes was killed, as the system does when memory runs out: the same command "
                f"goes on where it was stopped, --workers {max(1, workers // 2)} takes less memory"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _belong_to_the_parent() -> None:
    """A worker of the pool leaves interrupts to the process that made it, and ends when that one was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def make_shards(source: Source, number: int, job: Job, folder: Path) -> list[dict[str, Any]]:
    """Write a job's shards; they are whole when the note about them is there. What the manifest says of each."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    written: dict[str, int] = {}  # file -> samples
    with ExitStack() as stack:
        tars: dict[str, TarWriter] = {}
        for split, key, sample in source.samples(job):
            name = f"{split}-{job.number:06d}.tar"
            if name not in tars:
                file = stack.enter_context(open(folder / name, "wb"))
                # Owner and time are fixed, for the same bytes.
                tars[name] = stack.enter_context(TarWriter(file, user="powernap", group="powernap", mtime=0))
            tars[name].write(encode(key, sample))
            written[name] = written.get(name, 0) + 1
    shards = [{"file": name, "samples": samples, **_measure(folder / name)} for name, samples in written.items()]
    unfinished = folder / f"{number:06d}.tmp"
    unfinished.write_text(json.dumps(shards))
    unfinished.rename(folder / f"{number:06d}.done")
    return shards


def _done(number: int, folder: Path) -> list[dict[str, Any]] | None:
    """What a job that was done before left, None if it was not."""
    note = folder / f"{number:06d}.done"
    return json.loads(note.read_text()) if note.exists() else None


def _measure(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest(about: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        own = [shard for shard in shards if shard["file"].startswith(split)]
        splits[split] = {"shards": len(own), "samples": sum(shard["samples"] for shard in own)}
    everything = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    return {**about, "splits": splits, "sha256": everything, "shards": shards}


def _describe(samples: int, shards: int) -> str:
    return f"{samples} samples in {shards} shard{'' if shards == 1 else 's'}"
