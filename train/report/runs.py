"""The runs of a report: read from their folders, and grouped if they differ in their seeds only."""

import functools
import itertools
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from powernap.model.errors import PowernapError
from powernap.model.parameters import count_parameters
from powernap.model.segments import Probe
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train.config import Recipe
from powernap.train.data.check import predicting_windows
from powernap.train.data.sample import DataError
from powernap.train.evaluation.pictures import smooth
from powernap.train.recipe_file import flatten
from powernap.train.run.folder import RunFolder, first_manifest, flops_of_step
from powernap.train.run.resume import FREE
from powernap.train.tracking.metrics import read_metrics

# Fields in which the runs of a group may differ: names and paths, the seed, and fields that change no number.
OF_ONE_RUN = {"run.name", "run.seed", "data.train", "data.test"} | FREE - {"train.micro_batch_size"}


class ReportError(PowernapError):
    """Runs that cannot be compared, in one line."""


@dataclass(frozen=True)
class Share:
    """A share of right answers and its range: a run's 95 % interval, or from the lowest seed to the highest."""

    mean: float
    low: float
    high: float


class Point(NamedTuple):
    """A group's training after a step."""

    step: int
    flops: float  # so far, the mean over seeds
    loss: Share


class ReportedRun:
    """The content of one run's folder."""

    def __init__(self, path: Path):
        folder = RunFolder(path)
        self.path = path
        self.recipe: Recipe = folder.recipe()
        self.metrics = read_metrics(folder.metrics) if folder.metrics.is_file() else []
        self.origin = _read_json(folder.origin) or {}
        self.history = folder.read_history()
        self.work = _read_json(folder.work) or {}
        self.manifest = self.work if self.work.get("task") else first_manifest(self.recipe)
        self.evaluation = _read_json(folder.evaluation)
        if self.evaluation and "interval" not in self.evaluation:
            self.evaluation = None  # from a version without intervals

    def fields(self, with_task: bool) -> dict:
        """The fields that are compared: the recipe's, and those of the task that its shards were built with."""
        config = {key: value for key, value in flatten(self.recipe.model_dump(mode="json")).items() if _compared(key)}
        assert self.manifest is not None or not with_task
        task = self.manifest["fields"] if self.manifest and with_task else {}
        return config | {f"task.{key}": value for key, value in task.items()}

    @property
    def task(self) -> str | None:
        """The task of its data; None if unknown, as when the shards are not here."""
        return self.manifest["task"] if self.manifest else None

    @property
    def depths(self) -> list[str]:
        return list(self.evaluation["floor"]) if self.evaluation else []

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def trained_passes(self) -> int:
        """The largest trained N."""
        return max(self.recipe.sleep.pass_choices)

    @property
    def read_passes(self) -> str:
        """The N of the main figures: the trained one, or else the largest one evaluated."""
        assert self.evaluation is not None
        evaluated = self.evaluation["accuracy"]
        return str(self.trained_passes) if str(self.trained_passes) in evaluated else max(evaluated, key=int)

    @property
    def passes_in_turn(self) -> list[list[int]]:
        """The N to draw from, in each phase with others than the one before."""
        choices = [phase.sleep.pass_choices for _, phase in self.recipe.phases]
        return [choice for choice, _ in itertools.groupby(choices)]

    @property
    def parameters(self) -> int:
        return count_parameters(self.recipe.model, self.recipe.sleep)

    @cached_property
    def windows_known(self) -> bool:
        """Whether run, shards or recipe tell which windows predict; otherwise only the last is assumed to."""
        return bool(self.work) or self._predicts[0] is not None or self.recipe.sleep.every_window

    @cached_property
    def _predicts(self) -> tuple[list[bool] | None, list[Probe]]:
        try:
            return predicting_windows(self.recipe)
        except DataError:  # other shards are there by now
            return None, []

    def step_flops(self, passes: int) -> int:
        """Training FLOPs of a step with N = `passes`, as recorded by the run, or from recipe and shards if older."""
        if known := self.work.get("flops_per_step", {}).get(str(passes)):
            return known
        sleep = self.recipe.sleep.model_copy(update={"passes": passes})
        recipe = self.recipe.model_copy(update={"sleep": sleep})
        return step_flops(recipe, segments_of(recipe, *self._predicts))

    @cached_property
    def flops_until(self) -> list[int]:
        """Training FLOPs up to each step, as the run wrote them, or by its work.json if it is of an older version."""
        from_recipe = functools.cache(self.step_flops)
        of_steps = (
            record.get("flops")
            or flops_of_step(self.work, self.recipe, record)
            or from_recipe(record.get("passes", self.trained_passes))
            for record in self.metrics
        )
        return list(itertools.accumulate(of_steps))

    @property
    def flops(self) -> int:
        """Training FLOPs of all steps so far."""
        return self.flops_until[-1] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Time of all steps so far, without evaluations and checkpoints."""
        return sum(record["seconds"] for record in self.metrics)

    @property
    def tokens_per_second(self) -> float:
        return sum(record["tokens"] for record in self.metrics) / self.seconds

    @property
    def peak_memory(self) -> int | None:
        """Bytes on its first rank."""
        return max(
            (record["peak_memory_bytes"] for record in self.metrics if "peak_memory_bytes" in record), default=None
        )


@dataclass
class Group:
    """Runs of one recipe with several seeds."""

    label: str
    fields: dict  # the same in all its runs
    runs: list[ReportedRun]

    @property
    def evaluated(self) -> list[ReportedRun]:
        return [run for run in self.runs if run.evaluation]

    @property
    def evaluations(self) -> list[dict]:
        return [run.evaluation for run in self.runs if run.evaluation]

    @property
    def furthest(self) -> list[ReportedRun]:
        """The runs with the most steps: the cost so far of an unfinished one says little."""
        return [run for run in self.runs if run.steps == max(run.steps for run in self.runs)]

    @property
    def seeds(self) -> list[int]:
        return [run.recipe.run.seed for run in self.runs]

    @property
    def read_passes(self) -> str:
        return self.evaluated[0].read_passes

    @property
    def all_passes(self) -> list[str]:
        return sorted({n for evaluation in self.evaluations for n in evaluation["accuracy"]}, key=int)

    def accuracy(self, passes: str, depth: str) -> Share | None:
        """The mean over seeds with their range, or the interval of a single run."""
        evaluations = [one for one in self.evaluations if depth in one["accuracy"].get(passes, {})]
        if len(evaluations) == 1:
            return Share(evaluations[0]["accuracy"][passes][depth], *evaluations[0]["interval"][passes][depth])
        return share_of([evaluation["accuracy"][passes][depth] for evaluation in evaluations])

    def floor(self, depth: str) -> Share | None:
        return share_of([one["floor"][depth] for one in self.evaluations if depth in one["floor"]])

    @property
    def started(self) -> list[ReportedRun]:
        return [run for run in self.runs if run.metrics]

    @cached_property
    def course(self) -> list[Point]:
        """Loss over the steps that all its started runs have done: over seeds the mean, and the range."""
        smoothed = [smooth([record["loss"] for record in run.metrics], self._window) for run in self.started]
        first = self.started[0].metrics
        flops = zip(*(run.flops_until for run in self.started), strict=False)
        rows = zip(first, flops, zip(*smoothed, strict=False), strict=False)
        return [
            Point(record["step"], statistics.fmean(f), Share(statistics.fmean(v), min(v), max(v)))
            for record, f, v in rows
        ]

    @property
    def _window(self) -> int:
        """Steps that a point of the loss curve is the mean of."""
        return max(1, min(len(run.metrics) for run in self.started) // 30)

    def held_out_loss(self, passes: str) -> Share | None:
        losses = [evaluation["loss"] for evaluation in self.evaluations]
        return share_of([loss[passes] for loss in losses if passes in loss])


def share_of(values: list[float]) -> Share | None:
    return Share(statistics.fmean(values), min(values), max(values)) if values else None


def read_runs(paths: Iterable[Path]) -> list[ReportedRun]:
    """Read every run.

    Raises:
        ReportError: if a run is named twice, or the runs' questions have nothing in common.
    """
    paths = list(paths)
    for number, path in enumerate(paths):
        if any(path.samefile(other) for other in paths[:number]):
            raise ReportError(f"{path} is named twice: name each run once")
    runs = [ReportedRun(path) for path in paths]
    _check_same_questions(runs)
    return runs


def _check_same_questions(runs: list[ReportedRun]) -> None:
    known = [run for run in runs if run.task]
    for run in known:
        if run.task != known[0].task:
            raise ReportError(
                f"{known[0].path} is of task {known[0].task}, {run.path} of {run.task}: write a report for each task"
            )
    evaluated = [run for run in runs if run.evaluation]
    for run in evaluated:
        ours, first = set(run.depths), set(evaluated[0].depths)
        if ours != first and not ours & first:
            raise ReportError(
                f"{evaluated[0].path} was asked depths {', '.join(evaluated[0].depths) or 'none'}, {run.path} "
                f"{', '.join(run.depths) or 'none'}: write a report for each task"
            )


def group_runs(runs: list[ReportedRun]) -> list[Group]:
    """Group runs that differ in OF_ONE_RUN only; groups are in the order of their first runs."""
    groups: list[Group] = []
    for run in runs:
        fields = run.fields(with_task=all(run.manifest for run in runs))
        group = next((group for group in groups if group.fields == fields), None)
        if group is None:
            groups.append(group := Group("", fields, []))
        group.runs.append(run)
    for group in groups:
        group.label = _common_name([run.recipe.run.name for run in group.runs])
    labels = [group.label for group in groups]
    for number, group in enumerate(groups):
        if labels.count(group.label) > 1:
            group.label += f" ({labels[: number + 1].count(group.label)})"
    return groups


def differing_fields(groups: list[Group]) -> list[str]:
    """The fields that differ between groups, in the order of the recipe."""
    names = dict.fromkeys(name for group in groups for name in group.fields)
    return [name for name in names if any(group.fields.get(name) != groups[0].fields.get(name) for group in groups)]


def _common_name(names: list[str]) -> str:
    """The common part of the names of a group's runs: sleep-s0, sleep-s1 -> sleep."""
    if len(set(names)) == 1:
        return names[0]
    shared = re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", commonprefix(names))
    return shared or names[0]


def _compared(field: str) -> bool:
    return field not in OF_ONE_RUN and not re.fullmatch(r"data\.train\..*\.shards", field)


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
