"""Studies: does sleep do what is claimed, against what a sceptic would train instead? `python -m benchmarks study track`.

A study trains the models of its list on the shards of several seeds, reads each at the N it was trained with, and writes
a page: a table for each length, a picture, what each claim says and whether it holds. Shards and runs are kept in a folder:
when stopped, the same command continues; finished runs are only read. The page of the seeds that are done so far can be
written at any time with --page.

Sizes are fixed in benchmarks/studies.py before seeds are drawn. All models of a seed share shards and their order.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import common
from benchmarks.common import ROOT, draw_seeds, rounded, table, write
from powernap.model.parameters import count_parameters
from powernap.parallel.planning.plan import in_units, plan_run
from powernap.train.config import Recipe
from powernap.train.data.check import predicting_windows
from powernap.train.evaluation.pictures import GREY, new_figure, share_axis
from powernap.train.evaluation.tables import FLOOR_LABEL, some_depths
from powernap.train.recipe_file import load_recipe
from powernap.train.report.runs import ReportedRun
from powernap.train.run.folder import RunFolder

SEEDS = 3
FOLDER = ROOT / "runs" / "studies"
MOST_COLUMNS = 8  # depths in a table
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by number of seeds


@dataclass(frozen=True)
class Model:
    """A row of the page: the study's recipe with changes."""

    name: str
    overrides: tuple[str, ...] = ()  # `25%` in one: the step after a quarter of all
    cost: float | None = 1.0  # its training FLOPs, in those of the study's first model; None: as many steps

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in self.name.replace("=", ""))


@dataclass(frozen=True)
class Claim:
    """A sentence that the results may refute: how far one model is above another, in every seed."""

    text: str
    above: str
    below: tuple[str, ...]  # the best of these; none: above zero
    windows: int
    depth: int
    points: float  # percentage points

    def differences(self, trained: Sequence["Trained"]) -> dict[int, float]:
        """Seed -> difference in points; seeds that lack a model are left out."""
        found = {}
        for seed in dict.fromkeys(one.seed for one in trained):
            of_seed = {one.model: one for one in trained if one.seed == seed}
            if {self.above, *self.below} <= of_seed.keys():
                others = [of_seed[name].at(self.windows, self.depth) for name in self.below]
                found[seed] = 100 * (of_seed[self.above].at(self.windows, self.depth) - max(others, default=0.0))
        return found


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    recipe: str
    task: str
    sizes: tuple[str, ...]  # of `powernap data build`
    train_samples: int | None  # None: a corpus, which is read whole
    test_samples: int  # of each length
    longer: tuple[tuple[str, ...], ...]  # sizes of further test sets, on top of `sizes`
    models: tuple[Model, ...]
    claims: tuple[Claim, ...]
    about: tuple[str, ...]  # how to read it
    found: tuple[str, ...] = ()  # written after the runs: what holds, what is refuted
    not_tried: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model of a seed, trained and evaluated at its own N: what it is and what it cost."""

    seed: int
    model: str
    passes: int
    parameters: int
    steps: int
    flops: float  # of the whole training
    commit: str


@dataclass(frozen=True, kw_only=True)
class Trained(Run):
    """And what it answers."""

    loss: float  # held out
    accuracy: dict[str, dict[str, float]]  # windows -> depth -> share of right answers
    interval: dict[str, dict[str, tuple[float, float]]]  # 95 %, of this model alone
    floor: dict[str, dict[str, float]]
    answers: dict[str, dict[str, int]]

    def at(self, windows: int, depth: int) -> float:
        return self.accuracy[str(windows)][str(depth)]


def main(options: argparse.Namespace, command: str) -> None:
    from benchmarks.studies import STUDIES

    chosen = {study.name: study for study in STUDIES}
    names = options.names[1:]
    if not names or set(names) - chosen.keys():
        sys.exit(f"python -m benchmarks study NAME ...: choose from {', '.join(chosen)}")
    for study in (chosen[name] for name in names):
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                small = replace(study, train_samples=64, test_samples=32)
                trained = measure(small, Path(folder), seeds=1, jobs=options.jobs, steps=2)
                print("\n".join(describe(small, trained)))
            continue
        home = (options.folder or FOLDER) / study.name
        trained = finished(study, home) if options.page else measure(study, home, SEEDS, options.jobs)
        draw(study, trained, common.RESULTS / f"study_{study.name}.png")
        numbers = {"sizes": " ".join(study.sizes), "trained": [asdict(one) for one in trained]}
        report = describe(study, trained)
        write(f"study_{study.name}", f"python -m benchmarks study {study.name}", numbers, report, clock="no times")


def measure(study: Study, home: Path, seeds: int, jobs: int, steps: int | None = None) -> list[Trained]:
    """Train what is missing, seed after seed, `jobs` models side by side; returns all."""
    home.mkdir(parents=True, exist_ok=True)
    for seed in draw_seeds(home, seeds):
        build(study, home, seed)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(partial(train, study, home, seed, steps=steps), study.models))
    return finished(study, home)


Result = TypeVar("Result", bound=Run)


def run_of(path: Path, seed: int, model: Model) -> tuple[Run, dict[str, Any]]:
    """A finished run's folder, and its evaluation."""
    folder = RunFolder(path)
    recipe, evaluation = folder.recipe(), json.loads((path / "evaluation.json").read_text())
    passes = max(recipe.sleep.pass_choices)
    run = Run(
        seed=seed,
        model=model.name,
        passes=passes,
        parameters=count_parameters(recipe.model, recipe.sleep),
        steps=evaluation["step"],
        flops=float(ReportedRun(path).flops),
        commit=json.loads(folder.origin.read_text())["commit"][:10],
    )
    return run, evaluation


def read(path: Path, seed: int, model: Model) -> Trained:
    """The results in a finished run's folder."""
    run, evaluation = run_of(path, seed, model)
    passes = str(run.passes)
    lengths = {str(evaluation["windows"]): evaluation, **evaluation["lengths"]}
    return Trained(
        **asdict(run),
        loss=evaluation["loss"][passes],
        accuracy={windows: of["accuracy"][passes] for windows, of in lengths.items()},
        interval={windows: of["interval"][passes] for windows, of in lengths.items()},
        floor={windows: of["floor"] for windows, of in lengths.items()},
        answers={windows: of["answers"] for windows, of in lengths.items()},
    )


def finished(study: Study, home: Path, read: Callable[[Path, int, Model], Result] = read) -> list[Result]:
    """Every evaluated run, as `read` has it and its JSON will, by seed in the order of the study's models."""
    found = [
        read(home / str(seed) / model.folder, seed, model)
        for seed in draw_seeds(home, SEEDS)
        for model in study.models
        if (home / str(seed) / model.folder / "evaluation.json").exists()
    ]
    return [type(one)(**rounded(asdict(one))) for one in found]


def build(study: Study, home: Path, seed: int) -> None:
    """The shards of a seed: train and test, and a test set for each other length."""
    sizes = [study.sizes, *((*study.sizes, *longer) for longer in study.longer)]
    for number, of_set in enumerate(sizes):
        options = []
        if study.train_samples is not None:
            train = study.train_samples if number == 0 else 0
            options = ["--seed", seed, "--train-samples", train, "--samples-per-shard", -(-train // 8) or 10_000]
            options += ["--test-samples", study.test_samples]
        powernap(
            "data", "build", study.task, str(home / f"data-{seed}-{number}"), *_last(of_set), *map(str, options),
            log=home / f"data-{seed}.log",
        )  # fmt: skip


def _last(sizes: Iterable[str]) -> list[str]:
    """The last value of each field."""
    return list({size.split("=")[0]: size for size in sizes}.values())


def overrides(study: Study, home: Path, seed: int, model: Model, steps: int) -> list[str]:
    manifest = json.loads((home / f"data-{seed}-0" / "manifest.json").read_text())
    fields = {"data.sequence_length": "sequence_length", "model.window": "window", "model.vocab_size": "vocab_size"}
    changes = {field: f"{field}={manifest[key]}" for field, key in fields.items()}
    changes |= {change.split("=")[0]: change for change in model.overrides}
    tests = ",".join(f"{home}/data-{seed}-{number}/test-*.tar" for number in range(1 + len(study.longer)))
    shards = [f"data.train={home}/data-{seed}-0/train-*.tar", f"data.test=[{tests}]"]
    run = [f"run.name={model.folder}", f"run.root={home}/{seed}", f"run.seed={seed}", f"train.steps={steps}"]
    return [*run, *shards, *(of_steps(change, steps) for change in changes.values())]


def of_steps(change: str, steps: int) -> str:
    """An override with its shares of the steps, such as 25%, as numbers."""
    return re.sub(r"(\d+)%", lambda share: str(steps * int(share[1]) // 100), change)


def flops_of_training(recipe: Recipe) -> int:
    """Of all steps, each with the N that it has or the mean of those that are drawn."""
    return plan_run(recipe, predicting_windows).flops_of_run


def train(study: Study, home: Path, seed: int, model: Model, steps: int | None = None) -> None:
    """Train and evaluate one model, unless that is done."""
    run = home / str(seed) / model.folder
    if (run / "evaluation.json").exists():
        return
    run.parent.mkdir(exist_ok=True)
    of_recipe = load_recipe(study.recipe).train.steps
    recipe = load_recipe(study.recipe, overrides(study, home, seed, model, of_recipe))
    if steps is None:
        first = load_recipe(study.recipe, overrides(study, home, seed, study.models[0], of_recipe))
        steps = of_recipe
        if model.cost is not None:
            steps = round(model.cost * steps * flops_of_training(first) / flops_of_training(recipe))
    print(f"{study.name}, seed {seed}: {model.name}, {steps} steps", flush=True)
    warm_up = [f"optimizer.warmup_steps={steps}"] if steps < recipe.optimizer.warmup_steps else []
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    log = run.parent / f"{model.folder}.log"
    arguments = overrides(study, home, seed, model, steps)
    powernap("train", study.recipe, *arguments, *warm_up, *resume, log=log)
    powernap("eval", str(run), "--passes", str(max(recipe.sleep.pass_choices)), log=log)


def powernap(*arguments: str, log: Path) -> None:
    """Run a command in its own process, on one core, with its output in `log`."""
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "powernap.launch.cli", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"powernap {' '.join(arguments)}: exit code {done.returncode}, see {log}")


def describe(study: Study, trained: list[Trained]) -> list[str]:
    """The page: everything in it is from `study` and `trained` alone."""
    seeds = list(dict.fromkeys(one.seed for one in trained))
    by_model = {m.name: same for m in study.models if (same := [one for one in trained if one.model == m.name])}
    lines = [
        f"**{study.title}**",
        "",
        f"Recipe `{study.recipe}`, shards `{study.task} {' '.join(study.sizes)}`, {study.train_samples:,} to train on. Seeds "
        f"{', '.join(map(str, seeds))}, drawn after the sizes were fixed. Each model is read at the N it was trained with.",
        "",
        *study.about,
        "",
    ]
    if study.found:
        lines += ["## What was found", "", *study.found, ""]
    lines += [*claims_table(study, trained), f"![Accuracy by depth, a line for each model](study_{study.name}.png)", ""]
    for windows in trained[0].floor:
        lines += length_table(windows, some_depths(depths_of(trained, windows), MOST_COLUMNS), by_model, len(seeds))
    costs = [
        [name, same[0].passes, in_units(same[0].parameters), same[0].steps, f"{same[0].flops / 1e12:.2f}"]
        for name, same in by_model.items()
    ]
    lines += ["## Cost", "", *table(["model", "N", "parameters", "steps", "training TFLOPs"], costs, left=1), ""]
    commits = ", ".join(sorted({one.commit for one in trained}))
    lines += [f"Commits of the runs: {commits}.", ""]
    if study.not_tried:
        lines += ["## Not tried", "", *study.not_tried, ""]
    return lines


def claims_table(study: Study, trained: list[Trained]) -> list[str]:
    rows = []
    for claim in study.claims:
        points = list(claim.differences(trained).values())
        if not points:
            continue
        rows.append([
            claim.text, ", ".join(f"{p:+.1f}" for p in points), interval_over_seeds(points), f"{claim.points:g}",
            "yes" if min(points) >= claim.points else "NO",
        ])  # fmt: skip
    if not rows:
        return []
    columns = ["claim", "points, by seed", "mean, 95 % (t)", "at least", "in every seed"]
    return ["## Claims", "", *table(columns, rows, left=1), ""]


def interval_over_seeds(values: list[float], decimals: int = 1) -> str:
    """Their mean with the 95 % interval of Student's t; with one seed there is none."""
    mean = statistics.fmean(values)
    if len(values) not in T_QUANTILE:
        return f"{mean:.{decimals}f}"
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def depths_of(trained: Iterable[Trained], windows: str) -> list[str]:
    """Those that the test sets of all seeds have: the longest chains are rare."""
    floors = [one.floor[windows] for one in trained]
    return [depth for depth in floors[0] if all(depth in floor for floor in floors)]


def length_table(windows: str, depths: list[str], by_model: dict[str, list[Trained]], seeds: int) -> list[str]:
    """Percent right by depth, a row for each model."""
    rows = []
    for name, same in by_model.items():
        row = [name if len(same) == seeds else f"{name} ({len(same)} of {seeds} seeds)"]
        for depth in depths:
            shares = [100 * one.accuracy[windows][depth] for one in same]
            spread = f" ({min(shares):.0f}–{max(shares):.0f})" if len(same) > 1 else ""
            row.append(f"{statistics.fmean(shares):.1f}{spread}")
        rows.append(row)
    floors = next(iter(by_model.values()))
    rows.append(
        [
            FLOOR_LABEL,
            *(f"{100 * statistics.fmean(one.floor[windows][depth] for one in floors):.1f}" for depth in depths),
        ]
    )
    title = f"## {windows} windows"
    return [
        title, "", "Percent of answers right, by depth: the mean of the seeds (lowest–highest).", "",
        *table(["", *depths], rows, left=1), "",
    ]  # fmt: skip


def draw(study: Study, trained: list[Trained], to: Path) -> None:
    """A panel for each length: accuracy over depth, the mean of the seeds in a band from the lowest to the highest."""
    from matplotlib import colormaps

    names = [model.name for model in study.models if any(one.model == model.name for one in trained)]
    lengths = list(trained[0].floor)
    figure, axes = new_figure(columns=len(lengths))
    panels = [axes] if len(lengths) == 1 else list(axes)
    for windows, panel in zip(lengths, panels, strict=True):
        depths = [int(depth) for depth in depths_of(trained, windows)]
        for number, name in enumerate(names):
            same = [one for one in trained if one.model == name]
            shares = [[one.at(int(windows), depth) for one in same] for depth in depths]
            color, style = colormaps["tab20"](number % 20), "-" if number < 10 else "--"
            panel.plot(depths, [statistics.fmean(s) for s in shares], f"{style}o", ms=3, color=color, label=name)
            panel.fill_between(
                depths, [min(s) for s in shares], [max(s) for s in shares], color=color, alpha=0.15, lw=0
            )
        floor = [trained[0].floor[windows][str(depth)] for depth in depths]
        panel.plot(depths, floor, ":", color=GREY, label=FLOOR_LABEL)
        panel.set_title(f"{windows} windows", loc="left", fontsize=10)
        panel.set_xlabel("depth")
        panel.xaxis.get_major_locator().set_params(integer=True)
        share_axis(panel)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(to, dpi=120)
