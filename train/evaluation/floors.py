"""The floor under an accuracy: the share of right answers that the best *surface* guess gets. No torch here.

A surface guess does no reasoning. It is a constant answer, or the answer to the same question earlier in the sequence and
not in another probe, which is forgotten, or one of the task's own (surface_guesses in tasks/), which look at the text near
a question, or rule out impossible answers.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from powernap.model.errors import PowernapError
from powernap.model.segments import Probe
from powernap.train.config import DataConfig
from powernap.train.data.corpus import Corpus
from powernap.train.data.manifest import read_manifest
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.data.task import Task
from powernap.train.data.vocabulary import described_by
from powernap.train.tasks.sample import Sample

CONSTANT, COPY = "constant", "copied, else constant"

Answer = tuple[int, ...]


class Floor:
    """Counts, sample by sample, the answers that each surface guess gets right.

    counts: (depth, guess, answer or None) -> answers it gets right, expected ones if it draws; sum them over ranks.
    """

    def __init__(self, task: Task | Corpus | None):
        """task: the source of the samples; None if unknown or text."""
        self._guesses = getattr(task, "surface_guesses", None)
        self.counts: Counter[tuple[int, str, Answer | None]] = Counter()

    @classmethod
    def of_test(cls, data: DataConfig) -> "Floor":
        """The floor for the test shards, whose manifest names the task; without one, only guesses that need no task."""
        assert isinstance(data.test, str | list), "one of named_tests"
        try:
            path = local_path(expand_shards(data.test, "data.test")[0])
            return cls(described_by(read_manifest(path)) if path else None)
        except PowernapError:  # another version's manifest: the samples are still checked one by one
            return cls(None)

    def add_all(self, tokens: np.ndarray, answers: Iterable[np.ndarray], probes: Sequence[Probe] = ()) -> None:
        """tokens [B, T]; answers: B arrays of rows (start, stop, depth); probes: those of every sample."""
        starts = [start for start, _ in probes]
        for row, asked in zip(tokens, answers, strict=True):
            if len(asked):
                self._add(Sample(row, np.zeros(len(row), dtype=bool), asked), starts)

    def _add(self, sample: Sample, probe_starts: list[int]) -> None:
        rows, tokens = sample.answers.tolist(), sample.tokens.tolist()
        known: dict[tuple[int, Answer], Answer] = {}  # by probe and question
        truth = [tuple(tokens[start:stop]) for start, stop, _ in rows]
        for (start, _, depth), text, answer in zip(rows, _questions(tokens, rows), truth, strict=True):
            question = (bisect_right(probe_starts, start), text)
            self.counts[depth, CONSTANT, answer] += 1
            if question in known:
                self.counts[depth, COPY, None] += known[question] == answer
            else:
                self.counts[depth, COPY, answer] += 1
            known[question] = answer
        guesses = self._guesses(sample) if self._guesses else {}
        for name, candidates in guesses.items():
            for (_, _, depth), answer, drawn in zip(rows, truth, candidates, strict=True):
                self.counts[depth, name, None] += drawn.count(answer) / len(drawn)

    @staticmethod
    def shares(counts: Mapping[tuple[int, str, Answer | None], float]) -> dict[str, dict[int, float]]:
        """Guess -> depth -> share of right answers. The constant is the best one for each depth on these answers."""
        asked: dict[int, float] = defaultdict(float)
        right: dict[tuple[int, str], float] = defaultdict(float)
        best: dict[tuple[int, str], float] = defaultdict(float)
        for (depth, name, answer), count in counts.items():
            asked[depth] += count if name == CONSTANT else 0
            if answer is None:
                right[depth, name] += count
            else:
                best[depth, name] = max(best[depth, name], count)
        names, depths = dict.fromkeys(name for _, name, _ in counts), sorted(asked)
        return {name: {d: (right[d, name] + best[d, name]) / asked[d] for d in depths} for name in names}


def best_guesses(guesses: Mapping[str, Mapping[Any, float]]) -> str:
    """Which guess is the floor at which depths, in one line."""
    depths_of: dict[str, list[str]] = {}
    for depth in next(iter(guesses.values()), {}):
        best = max(guesses, key=lambda name: guesses[name][depth])  # the first of equals: the simplest
        depths_of.setdefault(best, []).append(str(depth))
    if len(depths_of) == 1:
        return f"best surface guess: {next(iter(depths_of))}"
    return "best surface guess: " + "; ".join(f"{name} (depth {', '.join(d)})" for name, d in depths_of.items())


def _questions(tokens: list[int], rows: list[list[int]]) -> list[Answer]:
    """The tokens between an answer and the previous one; before the first one, as many as before the second."""
    gaps = [start - before for (_, before, _), (start, _, _) in zip(rows, rows[1:], strict=False)]
    gaps = [gaps[0] if gaps else 1, *gaps]
    return [tuple(tokens[max(0, start - gap) : start]) for (start, _, _), gap in zip(rows, gaps, strict=True)]
