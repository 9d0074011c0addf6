"""Fewer passes at first: does N = 1, then 2, then 4, or N drawn at every step, cost fewer FLOPs than N = 4 from the start?

On the tasks of the studies `depo` and `program`, with equal FLOPs, each model evaluated at N = 4 while it trains. Shards and
runs are kept in a folder: when stopped, the same command continues; finished runs are only read. The page of the seeds that
are done so far can be written at any time with --page.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import common, study
from benchmarks.common import table, write
from benchmarks.studies import STUDIES as OTHERS
from benchmarks.study import Model, Run, Study, interval_over_seeds
from powernap.train.evaluation.pictures import new_figure
from powernap.train.report.runs import ReportedRun

PASSES = 4
FIXED, GROWING, DRAWN = "N=4", "N=1, 2, 4", "N drawn"
AT_FOUR = (f"evaluation.passes=[{PASSES}]", "evaluation.every=10%")
MODELS = (
    Model(FIXED, ("sleep.passes=4", *AT_FOUR)),
    Model(GROWING, ("sleep.passes={0: 1, 25%: 2, 50%: 4}", *AT_FOUR)),
    Model(DRAWN, ("sleep.passes=[1,2,4]", *AT_FOUR)),
)
DEEPEST = {"depo": "4", "program": "5"}  # depth that the claims are about


STUDIES: dict[str, Study] = {
    one.name: replace(one, models=MODELS, claims=(), longer=()) for one in OTHERS if one.name in DEEPEST
}
ABOUT = (
    f"`{GROWING}`: one pass in the first quarter of the steps, two in the second, four from then on. `{DRAWN}`: from 1, 2 and 4 at",
    "every step. Recipe, shards and sizes are those of the studies, FLOPs those of N=4 in the recipe's steps: the others take more",
    "steps. All are read at N=4.",
)
FOUND: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trained(Run):
    """A model of a seed and a task, trained, and evaluated at N = 4."""

    task: str
    loss: float  # held out
    accuracy: dict[str, float]  # depth -> share of right answers
    floor: dict[str, float]
    course: list[tuple[float, float]]  # training FLOPs so far, held-out loss then


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            for name, of_task in STUDIES.items():
                small = replace(of_task, train_samples=640, test_samples=32)
                study.measure(small, Path(folder) / name, seeds=1, jobs=options.jobs, steps=10)
            trained = finished(Path(folder))
            print("\n".join(describe(trained)))
        return
    home = (options.folder or study.FOLDER) / "schedules"
    if not options.page:
        for name, of_task in STUDIES.items():
            study.measure(of_task, home / name, study.SEEDS, options.jobs)
    trained = finished(home)
    draw(trained, common.RESULTS / "schedules.png")
    write("schedules", command, {"trained": [asdict(one) for one in trained]}, describe(trained), clock="no times")


def finished(home: Path) -> list[Trained]:
    return [
        one for name, of_task in STUDIES.items() if (home / name).exists()
        for one in study.finished(of_task, home / name, partial(read, name))
    ]  # fmt: skip


def read(task: str, path: Path, seed: int, model: Model) -> Trained:
    """The results in a finished run's folder."""
    run, evaluation = study.run_of(path, seed, model)
    reported = ReportedRun(path)
    key = f"held_out_loss/N{PASSES}"
    points = zip(reported.flops_until, reported.metrics, strict=True)
    return Trained(
        **asdict(run),
        task=task,
        loss=evaluation["loss"][str(PASSES)],
        accuracy=evaluation["accuracy"][str(PASSES)],
        floor=evaluation["floor"],
        course=[(float(flops), record[key]) for flops, record in points if key in record],
    )


def describe(trained: list[Trained]) -> list[str]:
    """The page: everything in it is from STUDIES and `trained` alone."""
    lines = ["**Schedules of N at equal FLOPs**", "", *ABOUT, ""]
    if FOUND:
        lines += ["## What was found", "", *FOUND, ""]
    lines += ["![Held-out loss at N=4 over training FLOPs](schedules.png)", ""]
    for task, depth in DEEPEST.items():
        of_task = [one for one in trained if one.task == task]
        if not of_task:
            continue
        seeds = list(dict.fromkeys(one.seed for one in of_task))
        rows = [
            row(model.name, same, of_task, depth)
            for model in MODELS
            if (same := [one for one in of_task if one.model == model.name])
        ]
        lines += [
            f"## {task}", "",
            f"Seeds {', '.join(map(str, seeds))}, drawn after the sizes were fixed; values in their order. Floor at depth {depth}: "
            f"{100 * statistics.fmean(one.floor[depth] for one in of_task):.0f} %.", "",
            *table(["", "steps", "TFLOPs", "held-out loss", f"right at depth {depth}, %", f"above {FIXED}, 95 % (t)"], rows, left=1),
            "",
        ]  # fmt: skip
    return [*lines, f"Commits of the runs: {', '.join(sorted({one.commit for one in trained}))}.", ""]


def row(name: str, same: list[Trained], of_task: list[Trained], depth: str) -> list[object]:
    fixed = {one.seed: one for one in of_task if one.model == FIXED}
    points = [100 * (one.accuracy[depth] - fixed[one.seed].accuracy[depth]) for one in same if one.seed in fixed]
    return [
        name,
        same[0].steps,
        f"{same[0].flops / 1e12:.2f}",
        ", ".join(f"{one.loss:.3f}" for one in same),
        ", ".join(f"{100 * one.accuracy[depth]:.1f}" for one in same),
        "" if name == FIXED else interval_over_seeds(points),
    ]


def draw(trained: list[Trained], to: Path) -> None:
    """A panel for each task, a line for each run, a colour for each model."""
    tasks = [task for task in DEEPEST if any(one.task == task for one in trained)]
    figure, axes = new_figure(columns=len(tasks))
    for task, panel in zip(tasks, [axes] if len(tasks) == 1 else list(axes), strict=True):
        for number, model in enumerate(MODELS):
            runs = [one for one in trained if (one.task, one.model) == (task, model.name)]
            for which, one in enumerate(runs):
                flops, losses = zip(*one.course, strict=True)
                label = None if which else model.name
                panel.plot([f / 1e12 for f in flops], losses, "o-", ms=3, color=f"C{number}", label=label)
        panel.set_title(task, loc="left", fontsize=10)
        panel.set_xlabel("training TFLOPs")
    (axes if len(tasks) == 1 else axes[0]).set_ylabel("held-out loss at N=4")
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(to, dpi=120)
