"""Build shards of a task or of text: tars of samples, written in parallel, and a manifest.json that describes them."""

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from powernap.train.data.build_folder import begun, check_unfinished, finished_splits
from powernap.train.data.build_report import COLUMNS, report, say, summarize, wrap
from powernap.train.data.corpora import CORPORA
from powernap.train.data.documents import check_budget
from powernap.train.data.drawn import check_drawn, check_guesses, check_sizes, repeats, watch_draws
from powernap.train.data.manifest import DOCUMENTS, MANIFEST, SPLITS, unfinished_folder
from powernap.train.data.sample import DataError, Documents, encode
from powernap.train.data.sample_sources import Job, Source, TaskSource, sha256_of
from powernap.train.data.tar_index import index_file, index_tar, write_index
from powernap.train.data.task import Task
from powernap.train.data.tokenizer import use_threads
from powernap.train.data.unique import HASH, find_duplicates, hash_file, without
from powernap.train.outputs import check_folder
from powernap.train.tasks.sample import PAD, Sample

DUPLICATES = "the same as one before"  # why documents are left out


def build_task(
    name: str,
    task: Task,
    folder: Path,
    *,
    train_samples: int,
    test_samples: int,
    samples_per_shard: int,
    seed: int,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    command: str | None = None,
) -> None:
    """`build` for samples drawn by a task, each of which is compared with what the task says of itself.

    Args:
        task: its sizes and how it draws samples.
        samples_per_shard: the most that a shard holds.

    Raises:
        DataError: as `task_source` and `build` do.
    """
    source = task_source(
        name,
        task,
        train_samples=train_samples,
        test_samples=test_samples,
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    build(source, folder, workers, part, command)


def task_source(
    name: str, task: Task, *, train_samples: int, test_samples: int, samples_per_shard: int, seed: int
) -> TaskSource:
    """
    Args:
        task: one of powernap.train.tasks.TASKS with its sizes.
        samples_per_shard: the maximum; a split's samples are spread evenly over its shards.

    Raises:
        DataError: if a number is out of range, or a sample is not what the task says.
    """
    limits = {"train-samples": train_samples, "test-samples": test_samples, "samples-per-shard": samples_per_shard}
    for option, value in limits.items():
        least = 0 if option == "train-samples" else 1  # test sets of other lengths have nothing to train on
        if value < least:
            raise DataError(f"--{option}={value}: write {least} or more")
    if seed < 0:
        raise DataError(f"--seed={seed}: write 0 or more")
    check_sizes(name, task)
    with watch_draws(name) as drawn:
        for held_out in (False, True):  # mistakes are reported before any process starts
            sample = task.sample(np.random.default_rng(seed), held_out)
            drawn.set()
            check_drawn(name, task, sample, f"a sample with held_out={held_out}")
            check_guesses(name, task, sample)
    return TaskSource(name, task, {"train": train_samples, "test": test_samples}, samples_per_shard, seed)


def check_build(source: Source, folder: Path) -> list[bool]:
    """Of each job that the parts of a build share, in order, whether it is done.

    Raises:
        DataError, OutputError: for what `build` would refuse before it reads the input, and for a build that is finished.
    """
    about = _about(source, folder, None)
    check_folder(folder, "")
    if finished_splits(folder, about) is not None:
        raise DataError(f"{folder} is finished: nothing is left to build")
    check_unfinished(folder, about)
    jobs = source.jobs()
    done = _done_before(source, jobs, unfinished_folder(folder))
    return [number in done for number in range(len(jobs))]


def build(
    source: Source,
    folder: Path,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    command: str | None = None,
) -> None:
    """Write train-000000.tar ..., test-000000.tar ... (held out) and manifest.json into a new folder.

    The same arguments give the same bytes, on any number of cores. The folder appears when everything is written. Until
    then the shards are in `.NAME.unfinished` beside it, and the same command continues an interrupted build: shards
    whose input has changed since are rebuilt, the others are kept. What another command began is begun anew if it has
    finished no shard.

    Args:
        workers: processes at most; None: one per core. With fewer shards to build than that, several threads tokenize for each.
        part: (i, n), from 1: build every n-th shard alone, from the i-th. Parts may run at the same time, on several machines with
            the folder in common; the one that ends last writes the manifest.
        command: what was typed, for the manifest; None: a command that says the same.

    Raises:
        DataError: if the folder holds something else or cannot be written, or the input cannot be read or is empty.
    """
    folder, task = Path(folder), source.task
    workers = workers or len(os.sched_getaffinity(0))
    use_threads(workers)
    for note in source.notes():
        say(note)
    about = _about(source, folder, command)
    try:
        splits = finished_splits(folder, about)
        if splits is None:
            with begun(folder, about) as unfinished:
                if about["fields"].get("unique"):
                    _refuse_while_another_part_finishes(folder)
                made = _make_all(source, unfinished, workers, part)
                if missing := made.count(None):
                    say(f"{folder}: {missing} of {len(made)} shards are missing, which other parts build")
                    return
                splits = _finish(about, [note for note in made if note is not None], unfinished, folder, workers)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None

    summarize(folder, splits)
    train_shards, test_shards = (
        shlex.quote(f"{folder}/{split}-*.tar") if splits[split]["shards"] else missing
        for split, missing in zip(SPLITS, ("...", "null"), strict=True)
    )
    print("for the recipe:")
    sizes = [f"data.sequence_length={task.sequence_length}", f"model.vocab_size={task.vocab_size}"]
    sizes += [f"model.window={task.window}", f"model.pad_token_id={about['pad_token_id']}"]
    sizes += ["data.documents=whole"] if getattr(task, "documents", "") == "whole" else []
    words = " ".join([f"data.train={train_shards}", f"data.test={test_shards}", *sizes])
    print("  " + " \\\n  ".join(wrap(words, COLUMNS - 4)))  # as a shell reads it


def _about(source: Source, folder: Path, command: str | None) -> dict[str, Any]:
    """What the manifest says of a build before anything is built."""
    task = source.task
    fields = [
        f"{name}={json.dumps(value)}" for name, value in task.model_dump(mode="json", exclude_defaults=True).items()
    ]
    return {
        **source.about(),
        "command": command or " ".join(["powernap data build", source.name, folder.name, *fields, *source.options()]),
        "vocab_size": task.vocab_size,
        "sequence_length": task.sequence_length,
        "context_length": task.context_length,
        "window": task.window,
        "pad_token_id": getattr(task, "pad_token_id", PAD),
    }


def _finish(
    about: dict[str, Any], made: list[dict[str, Any]], unfinished: Path, folder: Path, workers: int
) -> dict[str, dict[str, int]]:
    """Write the manifest and let the folder appear, unless another part just did; returns the manifest's splits."""
    with _finishing(folder):
        if not unfinished.exists():
            splits = finished_splits(folder, about)
            assert splits is not None
            return splits
        if about["fields"].get("unique"):
            made = _leave_out_duplicates(made, unfinished, workers)
        notes = [] if about["task"] in CORPORA else repeats(unfinished, len(made))
        manifest = _manifest(about, made)
        _refuse_empty(manifest, unfinished)
        shards = [unfinished / shard["file"] for shard in manifest["shards"]]
        keep = {path.name for shard in shards for path in (shard, index_file(shard))}
        for path in unfinished.iterdir():  # notes, and shards of jobs that no longer exist
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        unfinished.rename(folder)
    for note in notes:
        say(note)
    report(manifest)
    return manifest["splits"]


def _lock(folder: Path) -> Path:
    """Held, and there, while a build is finished."""
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def _finishing(folder: Path) -> Iterator[None]:
    """One part at a time."""
    lock = _lock(folder)
    with FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _refuse_while_another_part_finishes(folder: Path) -> None:
    """It may be writing shards again: their jobs must not be taken for undone meanwhile."""
    lock = _lock(folder)
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            raise DataError(f"{folder}: another part is finishing this build: wait for it") from None


def _refuse_empty(manifest: dict[str, Any], unfinished: Path) -> None:
    if manifest["splits"]["train"]["samples"]:
        return
    asked_for = manifest["fields"].get("test_share") == 1 or manifest.get("asked", {}).get("train") == 0
    if manifest["splits"]["test"]["samples"] and asked_for:
        return
    shutil.rmtree(unfinished)
    skipped = f", {len(manifest['skipped'])} documents skipped" if manifest.get("skipped") else ""
    held_out = manifest["splits"]["test"]
    if held_out["samples"]:
        what = f"{held_out['documents']} documents" if "documents" in held_out else f"{held_out['samples']} samples"
        raise DataError(f"all {what} are held out{skipped}: write a smaller test_share, or test_share=0")
    raise DataError(f"the input holds no text{skipped}: no samples, so no shards")


def _make_all(source: Source, folder: Path, workers: int, part: tuple[int, int] | None) -> list[dict[str, Any] | None]:
    """Run the jobs of this part that are not done yet; returns the notes of all, in order; None: of another part, not done."""
    jobs = source.jobs()
    first, step = part or (1, 1)
    done = _done_before(source, jobs, folder)
    missing = [number for number in range(first - 1, len(jobs), step) if number not in done]
    skipped = [reason for note in done.values() for reason in note["skipped"]]
    check_budget(skipped, source.skip_budget)
    total = sum(job.amount for job in jobs[first - 1 :: step])
    with tqdm(total=total, unit=source.unit, unit_scale=True, desc=source.name, disable=None) as progress:
        progress.update(total - sum(jobs[number].amount for number in missing))
        work = {number: (source, number, jobs[number], folder) for number in missing}
        for number, note in _run(make_shards, work, workers, progress):
            done[number] = note
            skipped += note["skipped"]
            check_budget(skipped, source.skip_budget)
            if part and progress.disable:  # a job's log
                own = range(first - 1, len(jobs), step)
                print(f"{sum(number in done for number in own)} of {len(own)} shards of this part", flush=True)
    others = [number for number in range(len(jobs)) if number not in done]
    notes = ((number, _done(source, number, jobs[number], folder)) for number in others)  # other parts went on
    done |= {number: note for number, note in notes if note and not note.get("duplicates_left_out")}
    return [done.get(number) for number in range(len(jobs))]


def _done_before(source: Source, jobs: list[Job], folder: Path) -> dict[int, dict[str, Any]]:
    """The notes of jobs that need not be run again."""
    notes = ((number, _done(source, number, job, folder)) for number, job in enumerate(jobs))
    done = {number: note for number, note in notes if note is not None}
    if len(done) < len(jobs):  # a document may be the first of its kind now, which was left out of these
        done = {number: note for number, note in done.items() if not note.get("duplicates_left_out")}
    return done


def _run(
    function: Callable[..., dict[str, Any]], work: dict[int, tuple], workers: int, progress: tqdm
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run `function` on the arguments in `work`, and yield the number and note of each when it is done."""
    processes = min(workers, len(work))
    if processes <= 1:
        for number, arguments in work.items():
            yield number, function(*arguments, progress.update)
        return
    context = multiprocessing.get_context("spawn")
    advanced = context.Value("q", 0)  # by all workers
    use_threads(workers // processes)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=(advanced,)) as pool:
        running = {pool.submit(_in_worker, function, arguments): number for number, arguments in work.items()}
        waiting, shown = set(running), 0
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                now = advanced.value
                progress.update(now - shown)
                shown = now
                for job in done:
                    yield running[job], job.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {processes} building processes was killed, as the system does when memory runs out: the same command "
                f"continues, and --workers {max(1, processes // 2)} takes less memory"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_advanced: Any = None  # in a worker: the counter that all share


def _begin_worker(advanced: Any) -> None:
    global _advanced
    _advanced = advanced
    _belong_to_the_parent()


def _belong_to_the_parent() -> None:
    """Leave interrupts to the parent process, and exit when it is killed."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _advance(count: int) -> None:
    with _advanced.get_lock():
        _advanced.value += count


def _in_worker(function: Callable[..., dict[str, Any]], arguments: tuple) -> dict[str, Any]:
    return function(*arguments, _advance)


class _Progress:
    """Reports what a job has read in steps of 1 %, and exactly its amount in the end."""

    def __init__(self, amount: int, advance: Callable[[int], object]):
        self._amount, self._advance, self._read, self._passed_on = amount, advance, 0, 0

    def add(self, count: int) -> None:
        self._read = min(self._read + count, self._amount)  # the ends of a part may be read twice
        if self._read - self._passed_on > self._amount / 100:
            self._pass_on()

    def finish(self) -> None:
        self._read = self._amount
        self._pass_on()

    def _pass_on(self) -> None:
        self._advance(self._read - self._passed_on)
        self._passed_on = self._read


def make_shards(
    source: Source, number: int, job: Job, folder: Path, advance: Callable[[int], object] = lambda count: None
) -> dict[str, Any]:
    """Write a job's shards, then the note that marks them complete. Returns the note: shards and what was skipped."""
    (folder / f"{number:06d}.done").unlink(missing_ok=True)  # of shards that are rebuilt
    progress = _Progress(job.amount, advance)
    tally = source.tally()
    tally.advance = progress.add
    shards = _write_shards(source.samples(job, tally), job.number, folder)
    for split in SPLITS:
        hash_file(folder, split, number).unlink(missing_ok=True)
    for split, hashes in tally.hashes.items():
        hash_file(folder, split, number).write_bytes(b"".join(hashes))
    progress.finish()
    made = {
        "shards": shards,
        "skipped": tally.skipped,
        "documents": tally.documents,
        "text_bytes": tally.text_bytes,
        "left_out": tally.left_out,
        "decoded": tally.decoded,
        "changed": tally.changed,
        "changed_example": tally.example,
        "origin": source.origin(job, tally),
    }
    _note(folder, number, made)
    return made


def _write_shards(
    samples: Iterable[tuple[str, str, Sample | Documents]], number: int, folder: Path
) -> list[dict[str, Any]]:
    """Write (split, key, sample) to one shard of each split, with its index. Returns their entries for the manifest."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    written: dict[str, Counter[str]] = {}  # file -> samples, and of documents their number and tokens
    with ExitStack() as stack:
        tars: dict[str, TarWriter] = {}
        for split, key, sample in samples:
            name = f"{split}-{number:06d}.tar"
            if name not in tars:
                file = stack.enter_context(open(folder / name, "wb"))
                # Owner and time are fixed, so that the bytes are reproducible.
                tars[name] = stack.enter_context(TarWriter(file, user="powernap", group="powernap", mtime=0))
            tars[name].write(encode(key, sample))
            counts = written.setdefault(name, Counter())
            counts["samples"] += 1
            if isinstance(sample, Documents):
                counts.update(documents=0 if sample.part else len(sample.lengths), tokens=len(sample.tokens))
    for name in written:
        write_index(folder / name, index_tar(folder / name, name))
    return [
        {"file": name, **counts, "bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name, counts in written.items()
    ]


def _note(folder: Path, number: int, made: dict[str, Any]) -> None:
    """Mark a job as done."""
    unfinished = folder / f"{number:06d}.tmp"
    unfinished.write_text(json.dumps(made))
    unfinished.rename(folder / f"{number:06d}.done")


def _leave_out_duplicates(made: list[dict[str, Any]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Write shards again that hold duplicates (see unique.py). Returns the notes of all jobs."""
    found = find_duplicates(folder, len(made))
    work = {number: (folder, number, made[number], repeated) for number, repeated in found.items()}
    with tqdm(total=len(work), unit=" shards", desc="duplicates", disable=None) as progress:
        rewritten = dict(_run(_rewrite, work, workers, progress))
    return [rewritten.get(number, note) for number, note in enumerate(made)]


def _rewrite(
    folder: Path,
    number: int,
    made: dict[str, Any],
    repeated: dict[str, np.ndarray],
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Write a job's shards again without the `repeated` documents of each split. Returns its note.

    A build that is stopped meanwhile finds either the shards of before with their note, or makes them again.
    """
    room = folder / f"{number:06d}.rewritten"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    samples = (
        (split, f"{split}-{number:06d}-{key}", sample)
        for split, which in repeated.items()
        for key, sample in without(folder / f"{split}-{number:06d}.tar", which)
    )
    entries = {entry["file"]: entry for entry in _write_shards(samples, number, room)}
    (folder / f"{number:06d}.done").unlink()
    for split, which in repeated.items():
        shard = folder / f"{split}-{number:06d}.tar"
        shard.unlink()
        index_file(shard).unlink()
        hashes = np.fromfile(hash_file(folder, split, number), HASH)
        hashes[~which].tofile(hash_file(folder, split, number))
    for path in room.iterdir():
        path.rename(folder / path.name)
    room.rmdir()
    stay = [
        entries.get(shard["file"], shard)
        for shard in made["shards"]
        if shard["file"] in entries or shard["file"].partition("-")[0] not in repeated
    ]
    count = sum(int(which.sum()) for which in repeated.values())
    left_out = Counter(made["left_out"]) + Counter({DUPLICATES: count})
    note = {
        **made,
        "shards": stay,
        "documents": made["documents"] - count,
        "left_out": dict(left_out),
        "duplicates_left_out": True,
    }
    _note(folder, number, note)
    advance(1)
    return note


def _done(source: Source, number: int, job: Job, folder: Path) -> dict[str, Any] | None:
    """The note of a job that was done before, from the same input; None if there is none."""
    path = folder / f"{number:06d}.done"
    if not path.exists():
        return None
    note = json.loads(path.read_text())
    # An older version wrote a list, without the origin of the shards.
    return note if isinstance(note, dict) and source.is_unchanged(job, note["origin"]) else None


def _manifest(about: dict[str, Any], made: list[dict[str, Any]]) -> dict[str, Any]:
    shards = [shard for note in made for shard in note["shards"]]
    splits = {}
    for split in SPLITS:
        members = [shard for shard in shards if shard["file"].startswith(split)]
        counted = ("samples", "documents", "tokens") if about.get("holds") == DOCUMENTS else ("samples",)
        splits[split] = {"shards": len(members)} | {what: sum(shard[what] for shard in members) for what in counted}
        text_bytes = sum(note.get("text_bytes", {}).get(split, 0) for note in made)
        if text_bytes and not any(note.get("left_out") for note in made):  # else it counts more than the shards hold
            splits[split]["text_bytes"] = text_bytes
    everything = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    documents = {}
    if about["task"] in CORPORA:
        documents = {
            "documents": sum(note["documents"] for note in made),
            "skipped": [reason for note in made for reason in note["skipped"]],
            "left_out": dict(sum((Counter(note.get("left_out", {})) for note in made), Counter())),
            "decoded": sum(note.get("decoded", 0) for note in made),
            "changed": sum(note["changed"] for note in made),
            "changed_example": next((note["changed_example"] for note in made if note["changed"]), ""),
        }
    return {**about, **documents, "splits": splits, "sha256": everything, "shards": shards}
