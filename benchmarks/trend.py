"""Does accuracy at depth rise with N? Three seeds of each N on the same shards, recipes trend_depo and trend_rule110.

Shards and runs are kept in a folder: stopped, the same command goes on where it was, and what is finished is only read.
"""

import argparse
import json
import math
import secrets
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, table, verdicts, write
from powernap.launch.commands.demo import powernap
from powernap.parallel.work import cut, step_flops
from powernap.train.check_data import predicting_windows
from powernap.train.metrics import read_metrics
from powernap.train.report import BLUE, GREY, ORANGE, new_figure, share_axis
from powernap.train.run_folder import RunFolder

SEEDS = 3
PASSES = (1, 2, 4)
COLORS = ("#999933", ORANGE, BLUE)  # of PASSES
FOLDER = ROOT / "runs" / "trend"


@dataclass(frozen=True)
class Setup:
    """A task at the sizes of its recipe, trend_TASK."""

    task: str
    sizes: tuple[str, ...]  # of `powernap data build`
    train_samples: int  # as many as the steps read, or more
    test_samples: int
    depth_name: str


SETUPS = (
    Setup("depo", ("nodes=8", "max_hop=4", "queries=18", "names=ends"), 48000, 2000, "hops"),
    Setup("rule110", ("rows=1", "width=11", "steps=[1,2,3,4,5]"), 96000, 5000, "steps of Rule 110"),
)


@dataclass(frozen=True)
class Trained:
    """One model, trained and read with the same N."""

    seed: int
    passes: int
    steps: int
    accuracy: dict[str, float]  # depth -> share of right answers on held-out problems
    interval: dict[str, tuple[float, float]]  # depth -> its 95 % interval
    floor: dict[str, float]  # depth -> the best constant guess
    answers: dict[str, int]
    loss: float  # held out, per loss token
    token_passes: int  # tokens that went through the blocks, once for each pass, in the whole training
    flops: int  # of the whole training
    seconds: float  # on the clock


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            models, report = measure(Path(folder), ["train.steps=4", "optimizer.warmup_steps=2"], seeds=1)
        print("\n".join(report))
        return
    models, report = measure(options.folder or FOLDER, [], SEEDS)
    draw(models, RESULTS / "trend.png")
    numbers = {task: [asdict(model) for model in trained] for task, trained in models.items()}
    write("trend", command, numbers, report, clock="seconds on the clock of a shared machine")


def measure(folder: Path, overrides: list[str], seeds: int) -> tuple[dict[str, list[Trained]], list[str]]:
    """Task -> its models, and the report about them."""
    models = {}
    for setup in SETUPS:
        home = folder / setup.task
        home.mkdir(parents=True, exist_ok=True)
        models[setup.task] = [
            train(setup, home, seed, passes, overrides) for seed in draw_seeds(home, seeds) for passes in PASSES
        ]
    return models, [line for setup in SETUPS for line in describe(setup, models[setup.task])]


def draw_seeds(home: Path, count: int) -> list[int]:
    """Fresh seeds, or those that this folder began with."""
    file = home / "seeds.json"
    if not file.exists():
        file.write_text(json.dumps([secrets.randbelow(10_000) for _ in range(count)]) + "\n")
    return json.loads(file.read_text())


def train(setup: Setup, home: Path, seed: int, passes: int, overrides: list[str]) -> Trained:
    """Train one model and read it, unless that is done; models of a seed share their shards and the order of samples."""
    data, name = home / f"data-{seed}", f"seed{seed}-N{passes}"
    if not (home / name / "evaluation.json").exists():
        if not data.exists():
            powernap("data", "build", setup.task, str(data), *setup.sizes, "--seed", str(seed),
                "--train-samples", str(setup.train_samples), "--test-samples", str(setup.test_samples),
                "--samples-per-shard", str(setup.train_samples // 8))  # fmt: skip
        powernap("train", f"trend_{setup.task}", f"run.name={name}", f"run.root={home}", f"run.seed={seed}",
            f"sleep.passes={passes}", f"data.train={data}/train-*.tar", f"data.test={data}/test-*.tar", *overrides,
            *(["--resume"] if (home / name / "config.yaml").exists() else []))  # fmt: skip
        powernap("eval", str(home / name), "--passes", str(passes))
    return read(home / name, seed, passes)


def read(path: Path, seed: int, passes: int) -> Trained:
    """What a finished run's folder says."""
    folder = RunFolder(path)
    recipe, found = folder.recipe(), json.loads((path / "evaluation.json").read_text())
    accuracy, segments = found["accuracy"][str(passes)], cut(recipe, predicting_windows(recipe))
    sequences = recipe.train.steps * recipe.train.global_batch_size
    return Trained(
        seed=seed,
        passes=passes,
        steps=found["step"],
        accuracy=accuracy,
        interval={
            depth: wilson(share, min(found["answers"][depth], recipe.evaluation.samples))
            for depth, share in accuracy.items()
        },
        floor=found["floor"],
        answers=found["answers"],
        loss=found["loss"][str(passes)],
        token_passes=sequences * sum(segment.tokens for segment in segments),
        flops=recipe.train.steps * step_flops(recipe, segments),
        seconds=sum(record["seconds"] for record in read_metrics(folder.metrics)),
    )


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent trials.

    Answers about one problem are not independent: give the number of problems, which is the worst case.
    """
    middle, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (max(0.0, (middle - spread) / (1 + z**2 / count)), min(1.0, (middle + spread) / (1 + z**2 / count)))


def describe(setup: Setup, models: list[Trained]) -> list[str]:
    """The report about one task's models."""
    depths, first = list(models[0].floor), models[0]
    floor = {depth: statistics.mean(model.floor[depth] for model in models) for depth in depths}
    overview = []
    for depth in depths:
        shares = [[model.accuracy[depth] for model in models if model.passes == passes] for passes in PASSES]
        overview.append([depth, percent(floor[depth]), *(f"{percent(statistics.mean(s))} ({span(s)})" for s in shares)])
    by_seed = [
        [model.seed, f"N={model.passes}"]
        + [f"{percent(model.accuracy[d])} ({span(model.interval[d])})" for d in depths]
        + [f"{model.loss:.3f}"]
        for model in models
    ]
    costs = []
    for passes in PASSES:
        same = [model for model in models if model.passes == passes]
        seconds = [model.seconds for model in same]
        costs.append(
            [passes, f"{same[0].token_passes / 1e6:.1f}", f"{same[0].flops / 1e12:.1f}",
             f"{min(seconds):.0f}-{max(seconds):.0f}"]
        )  # fmt: skip
    judged = verdicts([(f"{depths[-1]} {setup.depth_name}: worst seed of N={more} less the best of N={fewer}, %",
        100 * (worst(models, more, depths[-1]) - best(models, fewer, depths[-1])), ">=", 0.0)
        for fewer, more in zip(PASSES, PASSES[1:], strict=False)])[1]  # fmt: skip
    return [
        f"## {setup.task}, {' '.join(setup.sizes)}",
        "",
        f"Recipe trend_{setup.task}, {first.steps} steps, each model read at the N it was trained with. Right answers on",
        f"held-out problems in %, by {setup.depth_name}: mean of the seeds (lowest-highest).",
        "",
        *table([setup.depth_name, "constant guess", *(f"N={passes}" for passes in PASSES)], overview),
        "",
        "Each model with its 95 % interval (Wilson, as if a problem were asked once), and its held-out loss:",
        "",
        *table(["seed", "trained", *depths, "loss"], by_seed),
        "",
        "A training: tokens through the blocks, once for each pass; FLOPs forward and backward; seconds on the clock.",
        "",
        *table(["N", "million token-passes", "TFLOPs", "seconds"], costs),
        "",
        *judged,
    ]


def best(models: list[Trained], passes: int, depth: str) -> float:
    return max(model.accuracy[depth] for model in models if model.passes == passes)


def worst(models: list[Trained], passes: int, depth: str) -> float:
    return min(model.accuracy[depth] for model in models if model.passes == passes)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def span(shares) -> str:
    return f"{percent(min(shares))}-{percent(max(shares))}"


def draw(models: dict[str, list[Trained]], to: Path) -> None:
    """Accuracy by depth, a line for each N: the mean of the seeds, in a band from the lowest to the highest."""
    figure, panels = new_figure(columns=len(SETUPS))
    for setup, axes in zip(SETUPS, panels, strict=True):
        trained = models[setup.task]
        depths = list(trained[0].floor)
        for passes, color in zip(PASSES, COLORS, strict=True):
            shares = [[model.accuracy[depth] for model in trained if model.passes == passes] for depth in depths]
            axes.plot(
                depths, [statistics.mean(s) for s in shares], "o-", color=color, label=f"N = {passes}", clip_on=False
            )
            axes.fill_between(depths, [min(s) for s in shares], [max(s) for s in shares], color=color, alpha=0.2, lw=0)
        floor = [statistics.mean(model.floor[depth] for model in trained) for depth in depths]
        axes.plot(depths, floor, ":", color=GREY, label="constant guess")
        axes.set_xlabel(setup.depth_name)
        axes.set_title(f"{setup.task}: answers right on held-out problems", loc="left", fontsize=11)
        share_axis(axes)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(to, dpi=150)
