"""Build the shards of a task: tars of samples and a manifest.json that says what is in them."""

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from powernap.model.config import Section
from powernap.train.data.sample import DataError, encode
from powernap.train.tasks.sample import PAD, Sample

MANIFEST = "manifest.json"
SPLITS = ("train", "test")


def build(
    task_name: str,
    task: Section,
    folder: Path,
    *,
    train_samples: int,
    test_samples: int,
    samples_per_shard: int,
    seed: int,
) -> None:
    """Write train-000000.tar ..., test-000000.tar ... (held-out problems) and manifest.json into a new folder.

    The same arguments give the same bytes. The folder appears when everything is written: nothing half is left behind.

    Args:
        task: one of powernap.train.tasks.TASKS with its sizes.
        samples_per_shard: the most; a split's samples are spread evenly over its shards.

    Raises:
        DataError: if a number makes no sense, or the folder is not new or cannot be written.
    """
    counts = dict(zip(SPLITS, (train_samples, test_samples), strict=True))
    limits = {"train-samples": train_samples, "test-samples": test_samples, "samples-per-shard": samples_per_shard}
    for option, value in limits.items():
        if value < 1:
            raise DataError(f"--{option}={value}: write 1 or more")
    if seed < 0:
        raise DataError(f"--seed={seed}: write 0 or more")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty: nothing is written over; choose another folder")

    manifest = {
        "task": task_name,
        "fields": task.model_dump(mode="json"),
        "seed": seed,
        "vocab_size": task.vocab_size,
        "sequence_length": task.sequence_length,
        "context_length": task.context_length,
        "window": task.window,
        "pad_token_id": PAD,
        "splits": {},
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "shards"
            unfinished.mkdir()
            for stream, (split, count) in enumerate(counts.items()):
                samples = _draw(task, np.random.default_rng([seed, stream]), held_out=split == "test")
                sizes = _spread(count, samples_per_shard)
                _write_split(unfinished, split, sizes, samples)
                manifest["splits"][split] = {"shards": len(sizes), "samples": count}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            unfinished.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None

    (train, test) = manifest["splits"].values()
    print(f"{folder}: {_describe(train)} to train on, {_describe(test)} of held-out problems")
    print(f"for the recipe: data.train={folder}/train-*.tar data.test={folder}/test-*.tar")
    print(
        f"  data.sequence_length={task.sequence_length} model.vocab_size={task.vocab_size} model.window={task.window} "
        f"model.pad_token_id={PAD}"
    )


def _draw(task: Section, rng: np.random.Generator, held_out: bool) -> Iterator[Sample]:
    while True:
        yield task.sample(rng, held_out)


def _spread(samples: int, most: int) -> list[int]:
    """Even shard sizes, so that readers with the same number of shards have the same number of samples."""
    shards = -(-samples // most)
    return [samples // shards + (shard < samples % shards) for shard in range(shards)]


def _write_split(folder: Path, split: str, sizes: list[int], samples: Iterator[Sample]) -> None:
    from webdataset.writer import TarWriter  # imports torch, which takes seconds: not before the arguments are checked

    number = itertools.count()
    with tqdm(total=sum(sizes), desc=f"{split} samples", unit="", disable=None) as progress:  # None: on a terminal only
        for shard, size in enumerate(sizes):
            with (
                open(folder / f"{split}-{shard:06d}.tar", "wb") as file,
                TarWriter(file, user="powernap", group="powernap", mtime=0) as tar,  # fixed, for the same bytes
            ):
                for _, sample in zip(range(size), samples, strict=False):
                    tar.write(encode(f"{split}-{next(number):09d}", sample))
                    progress.update()


def _describe(split: dict[str, int]) -> str:
    return f"{split['samples']} samples in {split['shards']} shard{'s' if split['shards'] > 1 else ''}"
