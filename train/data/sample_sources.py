"""Where the samples of a build come from, a task or a corpus, and the jobs it is divided into."""

import hashlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from powernap.train.data.corpus import Corpus
from powernap.train.data.documents import Tally
from powernap.train.data.drawn import check_drawn, context_note, hash_of, watch_draws
from powernap.train.data.input_files import describe_left_out, size_of, version_of
from powernap.train.data.manifest import SPLITS
from powernap.train.data.sample import Documents
from powernap.train.data.task import Task
from powernap.train.tasks.sample import GENERATOR, Sample


@dataclass(frozen=True)
class Job:
    """A unit of work that depends on no other: a shard, or one of each split."""

    number: int  # of the shard in its split
    amount: int  # in the unit of the progress bar
    what: Any  # input of the source's `samples`


def code_of(task: Task) -> dict[str, str]:
    """The hash of the file that defines a task of somebody else: no commit of Powernap's says which code drew the data."""
    kind = type(task)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if kind.__module__.startswith("powernap.") or file is None:
        return {}
    return {"task_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}


@dataclass(frozen=True)
class TaskSource:
    """Samples drawn by a task: each shard of a split has its own random stream."""

    name: str
    task: Task
    samples_of_split: dict[str, int]
    samples_per_shard: int
    seed: int
    unit: ClassVar[str] = " samples"
    skip_budget: ClassVar[int] = 0

    def about(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "generator": GENERATOR,
            "fields": self.task.model_dump(mode="json"),
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
            "asked": self.samples_of_split,
            **code_of(self.task),
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

    def notes(self) -> list[str]:
        note = context_note(self.name, self.task)
        return [note] if note else []

    def tally(self) -> Tally:
        return Tally()

    def origin(self, job: Job, tally: Tally) -> Any:
        """A record of a job's input, to detect changes."""

    def is_unchanged(self, job: Job, origin: Any) -> bool:
        return True

    def samples(self, job: Job, tally: Tally) -> Iterator[tuple[str, str, Sample]]:
        """Split, key and sample."""
        split, first = job.what
        random = np.random.default_rng([self.seed, SPLITS.index(split), job.number])
        with watch_draws(self.name) as drawn:
            for number in range(first, first + job.amount):
                tally.advance(1)
                key = f"{split}-{number:09d}"
                sample = self.task.sample(random, held_out=split == "test")
                drawn.set()
                check_drawn(self.name, self.task, sample, key)
                tally.hashes.setdefault(split, []).append(hash_of(sample))
                yield split, key, sample


@dataclass(frozen=True)
class CorpusSource:
    """Samples of documents: each piece of the input becomes a shard, and a second one of held-out documents."""

    task: Corpus
    shard_bytes: int
    unit: ClassVar[str] = "B"

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def skip_budget(self) -> int:
        return self.task.skip_budget

    def about(self) -> dict[str, Any]:
        vocabulary = self.task.vocabulary
        about = {
            "task": self.name,
            "fields": self.task.model_dump(mode="json", exclude={"on_error", "skip_budget"}),
            "shard_bytes": self.shard_bytes,
            "files": {file: size_of(file) for file in self.task.files()[0]},
            "end_token_id": vocabulary.end,
            "tokenizer_notes": vocabulary.notes,
        }
        if self.task.holds:
            about["holds"] = self.task.holds
        if (tokenizer := Path(self.task.tokenizer)).is_file():
            about["tokenizer_sha256"] = sha256_of(tokenizer)
        return about

    def notes(self) -> list[str]:
        """What a user should know before the build."""
        left_out = self.task.files()[1]
        return self.task.vocabulary.notes + ([f"left out: {describe_left_out(left_out)}"] if left_out else [])

    def tally(self) -> Tally:
        return self.task.tally()

    def origin(self, job: Job, tally: Tally) -> dict[str, Any]:
        return {"parts": _as_json(job.what), "files": _times(job), "digest": tally.digest.hexdigest()}

    def is_unchanged(self, job: Job, origin: dict[str, Any]) -> bool:
        """Whether a job has the same input as before; only files modified since are read again."""
        if (origin["parts"], origin["files"]) == (_as_json(job.what), _times(job)):
            return True
        return origin["digest"] == self.task.digest(job.what)

    def options(self) -> list[str]:
        return [f"--shard-size {self.shard_bytes / 1e6:g}MB"]

    def jobs(self) -> list[Job]:
        return [Job(n, amount, parts) for n, (parts, amount) in enumerate(self.task.jobs(self.shard_bytes))]

    def samples(self, job: Job, tally: Tally) -> Iterator[tuple[str, str, Sample | Documents]]:
        for split, key, sample in self.task.samples(job.what, tally):
            yield split, f"{split}-{job.number:06d}-{key}", sample


def _times(job: Job) -> dict[str, list[Any]]:
    """Size and modification time of a job's files."""
    return {file: version_of(file) for file, _, _ in job.what}


def _as_json(parts: list[tuple[str, int, int]]) -> list[list[Any]]:
    return [list(part) for part in parts]


Source = TaskSource | CorpusSource


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
