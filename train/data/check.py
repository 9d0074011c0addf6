"""Check a recipe's shards before any process starts: one process reports a mistake at once, in one line."""

import itertools
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from powernap.model.segments import Probe, SegmentError, TokenWindow, check_probes, windows_of
from powernap.parallel.planning.plan import in_counts
from powernap.parallel.planning.work import round_up
from powernap.train.config import Recipe
from powernap.train.data.cache import cache_of
from powernap.train.data.manifest import DOCUMENTS, MANIFEST, end_and_pad, read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.sequences import Cutting, Sequences
from powernap.train.data.shard_list import count_lanes, expand_shards, local_path
from powernap.train.data.tar_index import not_a_tar
from powernap.train.data.test_sets import is_test, named_tests, test_sets
from powernap.train.data.verify import mismatch, not_recorded, recorded
from powernap.train.tasks.sample import Sample, probes_of

OFTEN = 4  # epochs up to which text read again is nearly as good as new text (arXiv 2305.16264)
SAMPLES = 64  # read from the first shard of each list


def check_data(recipe: Recipe) -> None:
    """Check that every shard exists and is complete, and that samples fit the model and its windows.

    Of local shards, both ends are checked; the first shard of each list is opened, local or remote.

    Raises:
        DataError: naming shard or field and what to write.
    """
    shards = {field: expand_shards(spec, field) for field, spec in recipe.data.shard_lists.items()}
    for field, names in shards.items():
        if not is_test(field):
            count_lanes(len(names), recipe.data.lanes, field)
    if recipe.data.on_error == "stop":
        for shard in itertools.chain.from_iterable(shards.values()):
            if path := local_path(shard):
                _check_file(path)
    vocabularies: dict[str, tuple[str, int | None]] = {}  # field -> task and tokenizer, end token
    for field, names in shards.items():
        if recipe.sleep.carry:
            _check_documents(names[0], recipe)
        samples = _first_samples(names[0], recipe)
        path = local_path(names[0])
        if manifest := read_manifest(path) if path else {}:
            for _, phase in recipe.phases:
                _check_manifest(manifest, names[0], samples, phase)
            tokenizer, (end, _) = (manifest.get("fields") or {}).get("tokenizer"), end_and_pad(manifest)
            vocabularies[field] = (f"{manifest.get('task')}, {tokenizer}", end)
        for _, phase in recipe.phases:
            _check_windows(names[0], samples, phase)
    for data in itertools.chain.from_iterable(test_sets(named)[1:] for named in named_tests(recipe.data).values()):
        assert isinstance(data.test, list)
        longer = recipe.model_copy(update={"data": data})
        shard = expand_shards(data.test, "data.test")[0]
        _check_windows(shard, _first_samples(shard, longer), longer, sleeps=False)
    _check_vocabularies(vocabularies)


def _check_file(path: Path) -> None:
    """Check that a file begins and ends like a tar, and has the size that its manifest records."""
    try:
        with open(path, "rb") as file:
            head = file.read(BLOCKSIZE)
            size = file.seek(0, 2)
            file.seek(max(0, size - 2 * BLOCKSIZE))
            tail = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise DataError(f"{path}: is empty: build or copy it again")
    if other := not_a_tar(head):
        raise DataError(f"{path}: {other}: build or copy it again")
    if size % BLOCKSIZE or tail.strip(b"\0"):
        raise DataError(f"{path}: cut off after {size} bytes: build or copy it again")
    if (entry := recorded(path)) and (problem := mismatch(entry, size, None)):
        raise not_recorded(str(path), entry, problem)


def predicting_windows(recipe: Recipe) -> tuple[list[bool] | None, list[Probe]]:
    """Which windows of the first training sample hold loss tokens, and the probes among them; None if there is no local
    shard yet.

    Raises:
        DataError: if the sample exists and does not fit the recipe.
    """
    try:
        name = expand_shards(next(iter(recipe.data.datasets.values()))[0])[0]
        if local_path(name) is None:
            return None, []
        sequences = _open(name, recipe)
    except DataError:
        return None, []
    if not len(sequences):
        return None, []
    sample = sequences[0]
    return _predicts([sample], _windows(sample, recipe))[0].tolist(), probes_of(sample)


def epochs(recipe: Recipe) -> str | None:
    """How often the training data are read, as far as local manifests count them; None: they do not, or it is not often.

    Of several datasets, which are drawn by weight, all together.
    """
    stored = 0
    try:
        for spec, _ in recipe.data.datasets.values():
            for shard in expand_shards(spec):
                entry = recorded(path) if (path := local_path(shard)) else None
                if entry is None:
                    return None
                stored += entry.tokens or entry.samples * (recipe.data.sequence_length - 1)
    except DataError:
        return None
    read = sum(
        (end - start) * part.train.global_batch_size * (part.data.sequence_length - 1)
        for (start, part), end in zip(
            recipe.phases, [*(s for s, _ in recipe.phases[1:]), recipe.train.steps], strict=True
        )
    )
    if not stored or read <= OFTEN * stored:
        return None
    times = read / stored
    return (
        f"{in_counts(read)} tokens from data.train, which holds {in_counts(stored)}: each is read "
        f"{times:,.{int(times < 10)}f} times"
    )


def _first_samples(shard: str, recipe: Recipe) -> list[Sample]:
    """A shard's first usable samples; on_error=skip passes over the others."""
    opened = _open(shard, recipe)
    samples, error = [], None
    for number in range(min(SAMPLES, len(opened))):
        try:
            samples.append(opened[number])
        except DataError as bad:
            error = bad
            if recipe.data.on_error == "stop":
                break
    if error and (recipe.data.on_error == "stop" or not samples):
        raise error
    if not samples:
        raise DataError(f"{shard}: its documents have no two tokens: take it out of the list")
    if not opened.shard.holds_documents and recipe.data.documents == "separate":
        raise DataError(
            f"data.documents=separate, but {shard} holds sequences, in which documents are not known: build it again, or write "
            "data.documents=packed"
        )
    if opened.shard.has_loss_spans and recipe.data.documents != "separate":
        raise DataError(
            f"{shard} holds answers and what they answer, in each document at other places: write data.documents=separate, which "
            "reads every window"
        )
    if opened.shard.holds_documents and recipe.model.pad_token_id is None:
        raise DataError(
            f"{shard} holds documents, which end before a sequence does: write model.pad_token_id, a token that none of them "
            "holds"
        )
    return samples


def _open(shard: str, recipe: Recipe) -> Sequences:
    return Sequences.open(shard, cache_of(recipe.data), Cutting.of(recipe.data, recipe.model))


def _windows(sample: Sample, recipe: Recipe) -> list[TokenWindow]:
    length = round_up(len(sample.tokens) - 1, recipe.sequence_shards)  # as pad_end lengthens it
    return windows_of(length, recipe.model, recipe.sleep, probes_of(sample), recipe.sequence_shards)


def _predicts(samples: list[Sample], windows: list[TokenWindow]) -> np.ndarray:
    """Whether each window holds loss tokens: bool [samples, windows]."""
    targets = np.stack([sample.loss_mask[1:] for sample in samples])  # a token's target is the one after it
    return np.stack([targets[:, w.tokens.start : w.tokens.stop].any(axis=1) for w in windows], axis=1)


def _check_manifest(manifest: dict[str, Any], shard: str, samples: list[Sample], recipe: Recipe) -> None:
    """Check the model's window, pad token and vocabulary against the shards' manifest."""
    window, context, pad, vocabulary = (
        manifest.get(key) for key in ("window", "context_length", "pad_token_id", "vocab_size")
    )
    path = local_path(shard)
    assert path is not None
    manifest_path = path.parent / MANIFEST
    if vocabulary and recipe.model.vocab_size < vocabulary:
        raise DataError(
            f"model.vocab_size={recipe.model.vocab_size}, but {manifest_path} counts {vocabulary} tokens: write "
            f"model.vocab_size={vocabulary} or more"
        )
    whole = recipe.model.window >= recipe.data.sequence_length - 1 and max(recipe.sleep.pass_choices) == 1
    shared = not recipe.sleep.every_window and context and context % recipe.model.window  # by context and questions
    if not whole and window and recipe.model.window != window and shared:
        raise DataError(
            f"model.window={recipe.model.window} must divide the {context} tokens before the first question "
            f"({manifest_path}), or context shares its window and is not slept on: write model.window={window}"
        )
    padded = manifest.get("holds") == DOCUMENTS or any((sample.tokens == pad).any() for sample in samples)
    if pad is not None and recipe.model.pad_token_id != pad and padded:
        value = "null" if recipe.model.pad_token_id is None else recipe.model.pad_token_id
        raise DataError(
            f"model.pad_token_id={value}, but {shard} pads with token {pad}: write model.pad_token_id={pad}"
        )


def _check_vocabularies(vocabularies: dict[str, tuple[str, int | None]]) -> None:
    """Check that a token means the same in every list of shards."""
    (first, (expected, end)), *others = vocabularies.items() or [("", ("", None))]
    for field, (vocabulary, other_end) in others:
        if not (vocabulary.startswith("text, ") and expected.startswith("text, ")):
            continue
        if vocabulary != expected:
            raise DataError(
                f"{first} has the vocabulary {expected[6:]}, {field} {vocabulary[6:]}: build both with the same tokenizer"
            )
        if other_end != end:
            raise DataError(f"documents of {first} end with token {end}, of {field} with {other_end}: build both anew")


def _check_documents(shard: str, recipe: Recipe) -> None:
    """Check that some document spans several sequences, so that there is something to carry."""
    opened = _open(shard, recipe)
    if opened.shard.holds_documents and recipe.data.documents != "whole":
        raise DataError(
            f"sleep.carry=true with data.documents={recipe.data.documents}: a sequence continues the one before only if "
            "documents are cut each by itself: write data.documents=whole"
        )
    if len(opened.documents) == len(opened):
        raise DataError(
            f"sleep.carry=true, but no document in {shard} is longer than a sequence: write a smaller "
            "data.sequence_length, or sleep.carry=false"
        )


def _check_windows(shard: str, samples: list[Sample], recipe: Recipe, sleeps: bool = True) -> None:
    """Check that samples agree on which windows hold loss tokens (see segments.py), and that a window is slept on.

    Args:
        sleeps: False: none need be, as in a test set of what a window holds.
    """
    window, probes = recipe.model.window, probes_of(samples[0])
    if other := next((sample for sample in samples if probes_of(sample) != probes), None):
        raise DataError(
            f"samples of {shard} have their probes at different tokens, {probes} and {probes_of(other)}: write shards in "
            "which all have them at the same"
        )
    windows = _windows(samples[0], recipe)
    try:
        check_probes(windows, recipe.model, recipe.sleep, recipe.sequence_shards)
    except SegmentError as error:
        raise DataError(f"{shard}: {error}") from None
    predicts, is_probe = _predicts(samples, windows), np.array([window.probe for window in windows])
    others = predicts & ~is_probe
    ahead = np.logical_or.accumulate(others[:, ::-1], axis=1)[:, ::-1]  # whether it or a later window holds loss tokens
    disagreeing = (ahead & ~others).any(axis=0) & others.any(axis=0)
    predicts = np.logical_or.reduce(predicts, axis=0)
    if disagreeing.any() and recipe.data.documents != "separate":
        number = int(disagreeing.argmax())
        first, last = windows[number].tokens[0], windows[number].tokens[-1]
        raise DataError(
            f"model.window={window}: window {number} (tokens {first}..{last}) holds loss tokens in some samples "
            f"of {shard} and none in others: choose a window that all answers share"
        )
    last_answer = int(predicts.nonzero()[0][-1])
    slept_on = ~is_probe if recipe.sleep.every_window else ~predicts & ~is_probe
    sleeps_first = slept_on[:last_answer].any()
    if sleeps and max(recipe.sleep.pass_choices) > 1 and not sleeps_first:
        raise DataError(
            f"model.window={window} leaves nothing to sleep on: every window of {shard} up to the last answer holds "
            f"loss tokens: write a smaller model.window, sleep.every_window=true or sleep.passes=1"
        )
