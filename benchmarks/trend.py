"""Does accuracy at depth rise with N? Three seeds of each N on the same shards, recipes trend_depo and trend_rule110.

Shards and runs are kept in a folder: when stopped, the same command continues; finished runs are only read.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, draw_seeds, table, write
from powernap.launch.side_by_side import powernap
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train.data.check import predicting_windows
from powernap.train.evaluation.intervals import wilson
from powernap.train.evaluation.pictures import BLUE, GREY, ORANGE, new_figure, share_axis
from powernap.train.evaluation.tables import FLOOR_LABEL
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics

SEEDS = 3
LONG_SEEDS = 1  # of the control
EVERY = 50  # steps averaged in a point of a loss curve
PASSES = {"N=1": 1, "N=2": 2, "N=4": 4, "N=1 long": 1}  # the models; the last one costs as many FLOPs as N=4
LONG = "N=1 long"
STYLES = {"N=1": (ORANGE, "o-"), "N=2": ("#31a354", "o-"), "N=4": (BLUE, "o-"), LONG: ("#8c2d04", "s--")}
FOLDER = ROOT / "runs" / "trend"


@dataclass(frozen=True)
class Setup:
    """A task at the sizes of its recipe, trend_TASK."""

    task: str
    sizes: tuple[str, ...]  # of `powernap data build`
    train_samples: int  # as many as the steps read, or more
    test_samples: int
    depth_name: str
    long_steps: int | None  # of N=1, for the FLOPs of N=4 in the recipe's steps; None: without this control
    note: tuple[str, ...]  # remarks on these sizes


SETUPS = (
    Setup(
        task="depo",
        sizes=("nodes=8", "max_hop=4", "queries=18", "names=ends"),
        train_samples=48000,
        test_samples=2000,
        depth_name="hops",
        long_steps=None,
        note=(
            "Four hops are the deepest question about a cycle of 8: five forward are three back. A fifth of the 5,040",
            "cycles is held out.",
        ),
    ),
    Setup(
        task="rule110",
        sizes=("rows=1", "width=13", "steps=[1,2,3,4,5,6]"),
        train_samples=60000,
        test_samples=6000,
        depth_name="steps of Rule 110",
        long_steps=4919,
        note=(
            "A fifth of the 8,192 rows is held out. The bit after t steps rests on 2t+1 bits: only at t=6 on all 13, so that",
            "a held-out row is a question never asked. Up to t=5 rows that were trained on share those bits (512 patterns at",
            "t=4, 2,048 at t=5), and knowing patterns by heart would do, for every N alike.",
        ),
    ),
)

ABOUT = [
    "![Accuracy by depth for each N, with bands over seeds and the best surface guess](trend.png)",
    "![Training loss over FLOPs for each N, with bands over seeds](trend_loss.png)",
    "",
    "## How to read it",
    "",
    "N=1, 2 and 4 of a seed have the same parameters, shards, order and number of steps; equal steps are not equal FLOPs.",
    'So "N=1 long" is N=1 with as many FLOPs as N=4 and its schedule stretched to match, on the first seed, for Rule 110.',
    "For Depo the losses over FLOPs in trend_loss.png must do. Seeds were drawn after the sizes were chosen; a seed",
    "decides weights, shards and order.",
    "",
    "If two N made no difference, all three seeds of the larger would lie above all of the smaller by chance in 1 of 20",
    "cases. Intervals of a single model say how well it was measured, not how another",
    "seed would do: that is lowest-highest.",
    "",
    "Every model is read at its own N: nothing here says that reading a model with more passes than it was trained with",
    "helps. There is no baseline with full attention over a kept cache. The models are tiny and trained for minutes.",
]


@dataclass(frozen=True)
class Trained:
    """One model, trained and evaluated with the same N."""

    seed: int
    name: str  # one of PASSES
    passes: int
    steps: int
    accuracy: dict[str, float]  # depth -> share of right answers on held-out problems
    interval: dict[str, tuple[float, float]]  # depth -> its 95 % interval
    floor: dict[str, float]  # depth -> the best surface guess
    answers: dict[str, int]
    loss: float  # held out, per loss token
    trained_loss: list[float]  # mean of every EVERY steps
    token_passes: int  # tokens through the blocks, counted in every pass, of the whole training
    flops: int  # of the whole training
    seconds: float  # on the clock


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            models, report = measure(Path(folder), ["train.steps=4", "optimizer.warmup_steps=2"], seeds=1)
        print("\n".join(report))
        return
    models, report = measure(options.folder or FOLDER, [], SEEDS)
    draw_accuracy(models, common.RESULTS / "trend.png")
    draw_loss(models, common.RESULTS / "trend_loss.png")
    numbers = {task: [asdict(model) for model in trained] for task, trained in models.items()}
    write("trend", command, numbers, report, clock="seconds on the clock of a shared machine")


def measure(folder: Path, overrides: list[str], seeds: int) -> tuple[dict[str, list[Trained]], list[str]]:
    """Task -> its models, and the report about them."""
    models = {}
    for setup in SETUPS:
        home = folder / setup.task
        home.mkdir(parents=True, exist_ok=True)
        models[setup.task] = [
            train(setup, home, seed, name, overrides)
            for number, seed in enumerate(draw_seeds(home, seeds))
            for name in PASSES
            if name != LONG or (setup.long_steps and number < LONG_SEEDS)
        ]
    return models, [line for setup in SETUPS for line in describe(setup, models[setup.task])] + ABOUT


def train(setup: Setup, home: Path, seed: int, name: str, overrides: list[str]) -> Trained:
    """Train and evaluate one model, unless that is done; models of a seed share shards and the order of samples."""
    data, passes = home / f"data-{seed}", PASSES[name]
    run = home / f"seed{seed}-{name.replace('=', '').replace(' ', '-')}"
    if not (run / "evaluation.json").exists():
        if not data.exists():
            powernap("data", "build", setup.task, str(data), *setup.sizes, "--seed", str(seed),
                "--train-samples", str(setup.train_samples), "--test-samples", str(setup.test_samples),
                "--samples-per-shard", str(setup.train_samples // 8))  # fmt: skip
        powernap("train", f"trend_{setup.task}", f"run.name={run.name}", f"run.root={home}", f"run.seed={seed}",
            f"sleep.passes={passes}", f"data.train={data}/train-*.tar", f"data.test={data}/test-*.tar",
            *([f"train.steps={setup.long_steps}"] if name == LONG else []), *overrides,
            *(["--resume"] if (run / "config.yaml").exists() else []))  # fmt: skip
        powernap("eval", str(run), "--passes", str(passes))
    return read(run, seed, name)


def read(path: Path, seed: int, name: str) -> Trained:
    """The results in a finished run's folder."""
    folder, passes = RunFolder(path), PASSES[name]
    recipe, evaluation = folder.recipe(), json.loads((path / "evaluation.json").read_text())
    accuracy, segments = evaluation["accuracy"][str(passes)], segments_of(recipe, *predicting_windows(recipe))
    records = read_metrics(folder.metrics)
    sequences = recipe.train.steps * recipe.train.global_batch_size
    return Trained(
        seed=seed,
        name=name,
        passes=passes,
        steps=evaluation["step"],
        accuracy=accuracy,
        interval={  # the worst case: as if the answers about one problem were all right or all wrong
            depth: wilson(share, min(evaluation["answers"][depth], recipe.evaluation.samples))
            for depth, share in accuracy.items()
        },
        floor=evaluation["floor"],
        answers=evaluation["answers"],
        loss=evaluation["loss"][str(passes)],
        trained_loss=[
            statistics.mean(record["loss"] for record in records[start : start + EVERY])
            for start in range(0, len(records), EVERY)
        ],
        token_passes=sequences * sum(len(segment.tokens) for segment in segments),
        flops=recipe.train.steps * step_flops(recipe, segments),
        seconds=sum(record["seconds"] for record in records),
    )


def describe(setup: Setup, models: list[Trained]) -> list[str]:
    """The report about one task's models."""
    depths = list(models[0].floor)
    by_name = group(models)
    floor = mean_floor(models)
    overview = []
    for depth in depths:
        shares = [[model.accuracy[depth] for model in same] for same in by_name.values()]
        overview.append([depth, percent(floor[depth]), *(f"{percent(statistics.mean(s))} ({span(s)})" for s in shares)])
    each = [
        [model.seed, model.name, *(f"{percent(model.accuracy[d])} ({span(model.interval[d])})" for d in depths)]
        + [f"{model.trained_loss[-1]:.3f}", f"{model.loss:.3f}"]
        for same in by_name.values()
        for model in same
    ]
    costs = [
        [name, same[0].steps, f"{same[0].token_passes / 1e6:.1f}", f"{same[0].flops / 1e12:.2f}", seconds(same)]
        for name, same in by_name.items()
    ]
    return [
        f"## {setup.task}: {' '.join(setup.sizes)}",
        "",
        f"Recipe trend_{setup.task}. Right answers on held-out problems in %, by {setup.depth_name}, each model read at",
        "the N it was trained with: mean of the seeds (lowest-highest).",
        *setup.note,
        "",
        *table([setup.depth_name, FLOOR_LABEL, *by_name], overview),
        "",
        "Worst seed of the second less best seed of the first, in points; they are apart above 0:",
        "",
        *table(["", *(f"{depth} {setup.depth_name}" for depth in depths[-3:])], compare(by_name, depths[-3:])),
        "",
        "What a training costs: tokens through the blocks, once for each pass; FLOPs forward and backward; seconds on the",
        "clock, of little use here.",
        "",
        *table(["model", "steps", "million token-passes", "TFLOPs", "seconds"], costs),
        "",
        "Each model, with a 95 % interval for what was asked of it (Wilson, as if each problem were asked once) and the",
        "loss in its last steps and on held-out problems:",
        "",
        *table(["seed", "model", *depths, "trained", "held out"], each),
        "",
    ]


def compare(by_name: dict[str, list[Trained]], depths: list[str]) -> list[list[str]]:
    """How far all seeds of one model are above all of another."""
    rows = []
    for lower, higher in (("N=1", "N=2"), ("N=2", "N=4"), ("N=1", "N=4"), (LONG, "N=4")):
        if lower not in by_name:
            continue
        gaps = [
            min(model.accuracy[depth] for model in by_name[higher])
            - max(model.accuracy[depth] for model in by_name[lower])
            for depth in depths
        ]
        rows.append([f"{lower}, {higher}", *(f"{100 * gap:+.1f}" for gap in gaps)])
    return rows


def group(models: list[Trained]) -> dict[str, list[Trained]]:
    """Name -> its seeds, in the order of PASSES."""
    return {name: same for name in PASSES if (same := [model for model in models if model.name == name])}


def mean_floor(models: list[Trained]) -> dict[str, float]:
    return {depth: statistics.mean(model.floor[depth] for model in models) for depth in models[0].floor}


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def span(shares: Iterable[float]) -> str:
    return f"{percent(min(shares))}-{percent(max(shares))}"


def seconds(models: list[Trained]) -> str:
    taken = [model.seconds for model in models]
    return f"{min(taken):.0f}-{max(taken):.0f}"


def draw_accuracy(models: dict[str, list[Trained]], to: Path) -> None:
    """Accuracy by depth, a line for each model: the mean of the seeds, in a band from the lowest to the highest."""
    figure, panels = new_figure(columns=len(SETUPS))
    for setup, axes in zip(SETUPS, panels, strict=True):
        floor = mean_floor(models[setup.task])
        for name, same in group(models[setup.task]).items():
            color, style = STYLES[name]
            shares = [[model.accuracy[depth] for model in same] for depth in floor]
            means = [statistics.mean(s) for s in shares]
            axes.plot(list(floor), means, style, color=color, label=label(name), clip_on=False)
            axes.fill_between(
                list(floor), [min(s) for s in shares], [max(s) for s in shares], color=color, alpha=0.15, lw=0
            )
        axes.plot(list(floor), list(floor.values()), ":", color=GREY, label=FLOOR_LABEL)
        axes.set_xlabel(setup.depth_name)
        axes.set_title(f"{setup.task}, held out: mean of {SEEDS} seeds, lowest to highest", loc="left", fontsize=10)
        share_axis(axes)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(to, dpi=150)


def draw_loss(models: dict[str, list[Trained]], to: Path) -> None:
    """The training loss over the FLOPs spent, in the same colours and bands."""
    figure, panels = new_figure(columns=len(SETUPS))
    for setup, axes in zip(SETUPS, panels, strict=True):
        for name, same in group(models[setup.task]).items():
            color, style = STYLES[name]
            curves = list(zip(*(model.trained_loss for model in same), strict=True))
            spent = [same[0].flops * min(1, EVERY * (n + 0.5) / same[0].steps) / 1e12 for n in range(len(curves))]
            axes.plot(spent, [statistics.mean(c) for c in curves], style[1:], color=color, label=label(name))
            axes.fill_between(spent, [min(c) for c in curves], [max(c) for c in curves], color=color, alpha=0.15, lw=0)
        axes.set_xlabel("training, TFLOPs")
        axes.set_title(f"{setup.task}: training loss, nats per answer", loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(to, dpi=150)


def label(name: str) -> str:
    return "N = 1 with the\nFLOPs of N = 4\n(one seed)" if name == LONG else name.replace("=", " = ")
