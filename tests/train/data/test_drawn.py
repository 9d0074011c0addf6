"""A task that contradicts itself is named, with the member and what it gave, when its shards are built."""

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from powernap.train.data import drawn
from powernap.train.data.build import build_task
from powernap.train.data.drawn import check_drawn, check_sizes
from powernap.train.data.sample import DataError
from powernap.train.tasks import TASKS
from powernap.train.tasks.sample import Sample
from tests.helpers.own_task import Copy

SIZES = dict(train_samples=6, test_samples=3, samples_per_shard=3, seed=0, workers=1)


def wrong(**members: object) -> Copy:
    """Copy with other members, such as a property as a value."""
    return type("Copy", (Copy,), members)()


def giving(**changes: object) -> Copy:
    """Copy whose samples have other arrays."""

    def sample(self: Copy, rng: np.random.Generator, held_out: bool) -> Sample:
        return dataclasses.replace(Copy.sample(self, rng, held_out), **changes)

    return wrong(sample=sample)


def mask(*tokens: int) -> np.ndarray:
    return np.isin(np.arange(10), tokens)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (wrong(sequence_length=property(lambda self: 11)), r"Copy.sample gave a sample with held_out=False with 10 tokens, but Copy.sequence_length is 11"),
        (giving(tokens=np.full(10, 10)), "with token 10, but Copy.vocab_size is 10: tokens are 0 to 9"),
        (wrong(vocab_size=property(lambda self: 7.0)), "Copy.vocab_size is 7.0: return a whole number from 2"),
        (wrong(window=property(lambda self: 0)), "Copy.window is 0: return a whole number from 1"),
        (wrong(context_length=property(lambda self: 10)), "Copy.context_length is 10, Copy.sequence_length 10: the sequence is"),
        (wrong(context_length=property(lambda self: 8)), "a loss_mask that marks token 5, but Copy.context_length is 8: it counts"),
        (wrong(pad_token_id=property(lambda self: 10)), "Copy.pad_token_id is 10: return a token below vocab_size=10"),
        (wrong(token_name=lambda self, token: "a"), "Copy.token_name gave 'a' for tokens 0 and 1"),
        (wrong(token_name=lambda self, token: None), r"Copy.token_name\(0\) gave None: return a word"),
        (wrong(sample=lambda self, rng, held_out: None), "as NoneType: return powernap.Sample"),
        (giving(tokens=[1, 2, 3]), r"with tokens as list: write a NumPy array, np.array\(tokens\)"),
        (giving(tokens=np.zeros(10)), r"with tokens float64 \[10\]: write integers"),
        (giving(tokens=np.arange(-1, 9)), "with token -1, but"),
        (giving(loss_mask=np.arange(10)), r"with loss_mask int64 \[10\]: write booleans \[10\]"),
        (giving(loss_mask=mask(0)), "a loss_mask that marks the first token alone, which nothing predicts"),
        (giving(loss_mask=mask()), "a loss_mask that marks no token: mark the answers"),
        (giving(answers=np.array([(4, 6, 1)])), r"answers names tokens 4..5, which are not all loss tokens"),
        (giving(answers=np.array([1])), r"answers must hold integer rows \(start, stop, depth\), not int64 \[1\]"),
        (giving(probes=np.array([(6, 6)])), "probes names tokens 6..5"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_task_is_named(tmp_path, task, message):
    with pytest.raises(DataError, match=message) as error:
        build_task("copy:Copy", task, tmp_path / "data", **SIZES)
    assert str(error.value).startswith("task copy:Copy: ") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_sample_is_checked(tmp_path):
    """Also one that goes wrong late, in the shard that a worker writes."""
    counter = itertools.count()

    def sample(self, rng, held_out):
        right = Copy.sample(self, rng, held_out)
        return right if next(counter) < 6 else dataclasses.replace(right, tokens=right.tokens[1:])

    message = "sample gave train-000000004 with 9 tokens"  # two were drawn before the build
    with pytest.raises(DataError, match=message):
        build_task("copy:Copy", wrong(sample=sample), tmp_path / "data", **SIZES)


@pytest.mark.parametrize("name", TASKS)
def test_powernaps_own_tasks_say_what_they_draw(name):
    task, rng = TASKS[name](), np.random.default_rng(0)
    check_sizes(name, task)
    for held_out in (False, True, False):
        check_drawn(name, task, task.sample(rng, held_out), "a sample")


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_what_is_no_mistake_for_sure_is_a_warning(tmp_path, capsys, monkeypatch):
    build_task("copy:Copy", Copy(), tmp_path / "fine", **SIZES)
    assert "warning" not in said(capsys)

    def same_split(self, rng, held_out):
        return Copy.sample(self, rng, held_out=False)

    build_task(
        "copy:Copy",
        wrong(sample=same_split),
        tmp_path / "shared",
        **SIZES | {"test_samples": 200, "train_samples": 300},
    )
    assert "of 200 test samples are training samples, too: on those, accuracy is memory" in said(capsys)
    build_task("copy:Copy", Copy(letters=2), tmp_path / "few", **SIZES | {"train_samples": 100})
    assert "warning: 100 train samples, but only" in said(capsys)
    build_task("copy:Copy", wrong(window=property(lambda self: 3)), tmp_path / "window", **SIZES)
    assert "Copy.context_length=4 is no whole number of windows of window=3: its last 1 tokens share" in said(capsys)


def test_a_draw_without_end_is_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawn, "PATIENCE", 0.02)
    with drawn.watch_draws("copy:Copy") as event:
        for _ in range(3):
            event.set()
    assert capsys.readouterr().err == ""
    with drawn.watch_draws("copy:Copy") as event:
        event.clear()
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("task copy:Copy: sample() has run for 0 seconds without a result")


@pytest.mark.parametrize(
    ("guesses", "message"),
    [
        ({"last": (3,)}, "'last' with 3 for an answer: write a list of guesses, each a tuple of tokens"),
        ({"last": [(3,)]}, r"'last' with \(3,\) for an answer: write a list of guesses"),
        ({"last": [[]]}, r"'last' with \[\] for an answer"),
        ({"last": []}, "'last' as 0 entries for 1 answers: write a list of guesses for each answer"),
        ({"last": {3}}, "'last' as set for 1 answers"),
        ([(3,)], r"list: return \{name"),
    ],
)
def test_guesses_of_another_form_are_named(tmp_path, guesses, message):
    with pytest.raises(DataError, match=f"task copy:Copy: Copy.surface_guesses gave.*{message}"):
        build_task("copy:Copy", wrong(surface_guesses=lambda self, sample: guesses), tmp_path / "shards", **SIZES)


def test_the_manifest_says_which_code_drew_the_samples(tmp_path):
    build_task("copy:Copy", Copy(), tmp_path / "own", **SIZES)
    code = Path(sys.modules[Copy.__module__].__file__).read_bytes()
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert manifest["task_sha256"] == hashlib.sha256(code).hexdigest()
    build_task("track", TASKS["track"](asked="end", windows=4, min_windows=4), tmp_path / "ours", **SIZES)
    assert "task_sha256" not in json.loads((tmp_path / "ours" / "manifest.json").read_text())
