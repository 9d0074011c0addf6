"""What a task draws, compared with what it says of itself: a mistake in a task is named as the task's, when shards are built.

No torch here.
"""

import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from powernap.model.section import LARGEST
from powernap.train.data.manifest import SPLITS
from powernap.train.data.sample import DataError, check_answers, check_probes
from powernap.train.data.task import Task
from powernap.train.data.unique import HASH, hash_file
from powernap.train.tasks.sample import PAD, Sample

NAMED = 2**16  # tokens whose names are compared
PATIENCE = 20.0  # seconds without a sample, after which a line says so
REPEATED = 0.5  # share of samples like an earlier one, from which on a line says so


def check_sizes(name: str, task: Task) -> None:
    """Check what a task says of its samples' sizes and its tokens' names, before any is drawn.

    Raises:
        DataError: naming the member and what it gave.
    """
    kind = type(task).__name__
    for member, least in (("vocab_size", 2), ("sequence_length", 2), ("window", 1), ("context_length", 0)):
        value = getattr(task, member)
        if member == "context_length" and value is None:
            continue
        if type(value) is not int or not least <= value <= LARGEST:
            unless = ", or None" if member == "context_length" else ""
            raise DataError(f"task {name}: {kind}.{member} is {value!r}: return a whole number from {least}{unless}")
    if (task.context_length or 0) >= task.sequence_length:
        raise DataError(
            f"task {name}: {kind}.context_length is {task.context_length}, {kind}.sequence_length {task.sequence_length}: the "
            "sequence is the context, the questions and their answers"
        )
    pad = getattr(task, "pad_token_id", PAD)
    if type(pad) is not int or not 0 <= pad < task.vocab_size:
        raise DataError(
            f"task {name}: {kind}.pad_token_id is {pad!r}: return a token below vocab_size={task.vocab_size}"
        )
    tokens: dict[str, int] = {}
    for token in range(min(task.vocab_size, NAMED)):
        word = task.token_name(token)
        if not isinstance(word, str) or not word or word != word.strip():
            raise DataError(f"task {name}: {kind}.token_name({token}) gave {word!r}: return a word")
        if (other := tokens.setdefault(word, token)) != token:
            raise DataError(
                f"task {name}: {kind}.token_name gave '{word}' for tokens {other} and {token}: prompts need a name for each"
            )


def context_note(name: str, task: Task) -> str | None:
    """What a user should know of a context that does not end with a window; None if it does."""
    rest = (task.context_length or 0) % task.window
    if not rest:
        return None
    return (
        f"task {name}: {type(task).__name__}.context_length={task.context_length} is no whole number of windows of "
        f"window={task.window}: its last {rest} tokens share the window that answers, and are slept on only with "
        "sleep.every_window=true"
    )


def check_drawn(name: str, task: Task, sample: Sample, which: str) -> None:
    """Check a sample that a task has drawn.

    Args:
        which: the sample, for the message, such as `train-000000003`.

    Raises:
        DataError: naming the member and what it gave.
    """
    kind = type(task).__name__
    where = f"task {name}: {kind}.sample gave {which}"
    if not isinstance(sample, Sample):
        raise DataError(f"{where} as {type(sample).__name__}: return powernap.Sample(tokens, loss_mask, answers)")
    for member in ("tokens", "loss_mask", "answers", "probes"):
        if not isinstance(value := getattr(sample, member), np.ndarray):
            raise DataError(f"{where} with {member} as {type(value).__name__}: write a NumPy array, np.array({member})")
    tokens, loss_mask = sample.tokens, sample.loss_mask
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{where} with tokens {tokens.dtype} {list(tokens.shape)}: write integers [T], such as np.int32"
        )
    if len(tokens) != task.sequence_length:
        raise DataError(
            f"{where} with {len(tokens)} tokens, but {kind}.sequence_length is {task.sequence_length}: it counts the context, "
            "questions and answers, and every sample has as many: fill the end with pads"
        )
    if tokens.min() < 0 or tokens.max() >= task.vocab_size:
        token = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise DataError(
            f"{where} with token {token}, but {kind}.vocab_size is {task.vocab_size}: tokens are 0 to {task.vocab_size - 1}"
        )
    if loss_mask.dtype != bool or loss_mask.shape != tokens.shape:
        raise DataError(
            f"{where} with loss_mask {loss_mask.dtype} {list(loss_mask.shape)}: write booleans [{len(tokens)}], True at answers"
        )
    if not loss_mask[1:].any():
        which_tokens = "the first token alone, which nothing predicts" if loss_mask[0] else "no token"
        raise DataError(f"{where} with a loss_mask that marks {which_tokens}: mark the answers, as targets")
    context = task.context_length
    if context and (marked := np.flatnonzero(loss_mask[1:context])).size:
        raise DataError(
            f"{where} with a loss_mask that marks token {marked[0] + 1}, but {kind}.context_length is {context}: it counts the "
            "tokens before the first question"
        )
    check_answers(sample.answers, loss_mask, where, "answers")
    if len(sample.probes):
        check_probes(sample.probes, loss_mask, where, "probes")


def check_guesses(name: str, task: Task, sample: Sample) -> None:
    """Check what a task guesses about a sample, where it does.

    Raises:
        DataError: naming the guess and what it gave.
    """
    if not hasattr(task, "surface_guesses"):
        return
    where, asked = f"task {name}: {type(task).__name__}.surface_guesses gave", len(sample.answers)
    guesses = task.surface_guesses(sample)
    if not isinstance(guesses, dict):
        raise DataError(f"{where} {type(guesses).__name__}: return {{name: [[(token, ...), ...] for each answer]}}")
    for guess, candidates in guesses.items():
        if not isinstance(candidates, list | tuple) or len(candidates) != asked:
            count = f"{len(candidates)} entries" if isinstance(candidates, list | tuple) else type(candidates).__name__
            raise DataError(
                f"{where} '{guess}' as {count} for {asked} answers: write a list of guesses for each answer"
            )
        for of_answer in candidates:
            if not isinstance(of_answer, list) or not of_answer or not all(isinstance(one, tuple) for one in of_answer):
                raise DataError(
                    f"{where} '{guess}' with {of_answer!r} for an answer: write a list of guesses, each a tuple of tokens, [(3,)]"
                )


def hash_of(sample: Sample) -> bytes:
    """A hash of a sample's tokens, for `repeats`."""
    return hashlib.blake2b(sample.tokens.astype("<i4").tobytes(), digest_size=HASH.itemsize).digest()


def repeats(folder: Path, jobs: int) -> list[str]:
    """What a user should know of samples that were drawn more than once, by the hashes that jobs left in `folder`."""
    found: dict[str, np.ndarray] = {}
    for split in SPLITS:
        files = [path for number in range(jobs) if (path := hash_file(folder, split, number)).exists()]
        found[split] = np.concatenate([np.zeros(0, HASH), *(np.fromfile(path, HASH) for path in files)])
    different = {split: np.unique(hashes) for split, hashes in found.items()}
    notes = [
        f"warning: {len(hashes):,} {split} samples, but only {len(different[split]):,} different ones: the task has few of these sizes"
        for split, hashes in found.items()
        if len(different[split]) < (1 - REPEATED) * len(hashes)
    ]
    if shared := int(np.isin(found["test"], different["train"]).sum()):
        notes.append(
            f"warning: {shared:,} of {len(found['test']):,} test samples are training samples, too: on those, accuracy is memory; "
            "sample(rng, held_out) keeps the two apart with powernap.draw_problem"
        )
    return notes


@contextmanager
def watch_draws(name: str) -> Iterator[threading.Event]:
    """Say so, once, if no sample is drawn for PATIENCE seconds; the event is to be set after each."""
    drawn, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(PATIENCE):
            if not drawn.is_set():
                print(
                    f"task {name}: sample() has run for {PATIENCE:.0f} seconds without a result: does it look for a problem that "
                    "there is not? Ctrl-C stops the build",
                    file=sys.stderr,
                    flush=True,
                )
                return
            drawn.clear()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield drawn
    finally:
        ended.set()
        watcher.join()
