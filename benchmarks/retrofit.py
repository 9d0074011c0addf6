"""Does a model that keeps its cache learn to sleep? The two stages of docs/retrofit.md on fresh seeds, with N=4, with N=1, and with N=4
taught by the model itself.

Sizes are those of the recipes in train/recipes/retrofit and were fixed before seeds were drawn. Shards and runs are kept in a folder: when
stopped, the same command continues; finished runs are only read. The page of the seeds that are done so far can be written at any time
with --page.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import draw_seeds, rounded, table, write
from benchmarks.study import FOLDER, SEEDS, interval_over_seeds, powernap
from powernap.launch.commands.demo import flops_of_step
from powernap.train.evaluation.tables import FLOOR_LABEL
from powernap.train.run.folder import RunFolder

TASK = ("depo", "nodes=6", "max_hop=4", "names=ends")
SHARDS = {  # folder -> sizes, training samples
    "data": (("queries=12",), 48_000),
    "within": (("queries=4",), 0),
    "evicted": (("queries=8", "delay=36"), 0),
}
TEST_SAMPLES = 1000
WITHIN, WHOLE, EVICTED = "1", "2", "3"  # windows of the test sets, as a retrofitted model reads them
HOPS = ("1", "2", "3", "4")


@dataclass(frozen=True)
class Step:
    """A run of a seed. Those that begin with another's weights follow it."""

    name: str
    recipe: str
    start_from: str | None = None
    overrides: tuple[str, ...] = ()
    passes: int = 1  # that it is read with


BASE, BEFORE = "base", "before"
STEPS = (
    Step(BASE, "retrofit/base"),
    # Blocks inserted and nothing learned: what the base knows without its cache, at the windows of the others.
    Step(BEFORE, "retrofit/attention", BASE, ("train.steps=1", "optimizer.warmup_steps=1", "optimizer.lr=1e-9", "sleep.passes=1")),
    Step("N=4, stage 1", "retrofit/attention", BASE, passes=4),
    Step("N=4", "retrofit/attention_all", "N=4, stage 1", passes=4),
    Step("N=1, stage 1", "retrofit/attention", BASE, ("sleep.passes=1",)),
    Step("N=1", "retrofit/attention_all", "N=1, stage 1", ("sleep.passes=1",)),
    Step("N=4, taught", "retrofit/attention_all", "N=4, stage 1", ("distillation.context=sequence", "distillation.weight=0.3"), passes=4),
)  # fmt: skip
TINY = (
    "model.hidden_size=16", "model.mlp.ffn_hidden_size=16", "model.gdn={heads: 2, key_dim: 8, value_dim: 8}", "train.steps=2",
    "train.global_batch_size=4", "optimizer.warmup_steps=1", "evaluation.samples=8", "data.lanes=1",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished run of a seed."""

    seed: int
    name: str
    passes: int
    steps: int
    flops: float
    accuracy: dict[str, dict[str, float]]  # windows -> hops -> share right
    loss: dict[str, float]  # windows -> held-out loss
    floor: dict[str, float]  # hops -> a surface guess, evicted
    commit: str


@dataclass(frozen=True)
class Claim:
    """A sentence that any seed may refute."""

    text: str
    values: tuple[float, ...]  # by seed
    sign: str
    bound: float

    @property
    def holds(self) -> bool:
        return min(self.values) >= self.bound if self.sign == ">=" else max(self.values) <= self.bound


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), seeds=1, more=TINY, samples=40)
            print("\n".join(describe(finished(Path(folder)))))
        return
    home = (options.folder or FOLDER) / "retrofit"
    if not options.page:
        measure(home, SEEDS)
    results = finished(home)
    write("retrofit", command, {"results": [asdict(one) for one in results]}, describe(results), clock="no times")


def measure(home: Path, seeds: int, more: tuple[str, ...] = (), samples: int | None = None) -> None:
    """Train what is missing, seed after seed."""
    home.mkdir(parents=True, exist_ok=True)
    for seed in draw_seeds(home, seeds):
        root = home / str(seed)
        root.mkdir(exist_ok=True)
        for name, (sizes, train) in SHARDS.items():
            counts = ["--train-samples", min(train, samples or train), "--test-samples", samples or TEST_SAMPLES]
            task, *fields = TASK
            options = map(str, [*counts, "--seed", seed])
            powernap("data", "build", task, str(root / name), *fields, *sizes, *options, log=root / "data.log")
        for step in STEPS:
            train_and_evaluate(step, root, seed, more)


def train_and_evaluate(step: Step, root: Path, seed: int, more: tuple[str, ...]) -> None:
    run = root / folder_of(step.name)
    if (run / "evaluation.json").exists():
        return
    print(f"retrofit, seed {seed}: {step.name}", flush=True)
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    log = root / f"{run.name}.log"
    powernap("train", step.recipe, *overrides(step, root, seed), *more, *resume, log=log)
    powernap("eval", str(run), "--passes", str(step.passes), log=log)


def overrides(step: Step, root: Path, seed: int) -> list[str]:
    tests = [f"{root}/{name}/test-*.tar" for name in (SHARDS if step.name != BASE else list(SHARDS)[:2])]
    found = [
        f"run.name={folder_of(step.name)}", f"run.root={root}", f"run.seed={seed}", "run.trackers=[]",
        f"data.train={root}/data/train-*.tar", f"data.test={json.dumps(tests)}",
    ]  # fmt: skip
    if step.start_from:
        found.append(f"train.start_from={root / folder_of(step.start_from)}")
    if any("distillation" in change for change in step.overrides):
        found.append(f"distillation.teacher={root / BASE}")
    return [*found, *step.overrides]


def folder_of(name: str) -> str:
    return name.replace("=", "").replace(", ", "-").replace(" ", "-")


def finished(home: Path) -> list[Result]:
    """Every evaluated run, as its JSON will have it, by seed in the order of STEPS."""
    found = [
        read(home / str(seed) / folder_of(step.name), seed, step)
        for seed in draw_seeds(home, SEEDS)
        for step in STEPS
        if (home / str(seed) / folder_of(step.name) / "evaluation.json").exists()
    ]
    return [Result(**rounded(asdict(one))) for one in found]  # type: ignore[arg-type]


def read(path: Path, seed: int, step: Step) -> Result:
    evaluation: dict[str, Any] = json.loads((path / "evaluation.json").read_text())
    folder = RunFolder(path)
    passes = str(step.passes)
    of_length = {str(evaluation["windows"]): evaluation, **evaluation["lengths"]}
    return Result(
        seed=seed,
        name=step.name,
        passes=step.passes,
        steps=evaluation["step"],
        flops=float(evaluation["step"] * flops_of_step(folder.recipe())),
        accuracy={windows: of["accuracy"][passes] for windows, of in of_length.items()},
        loss={windows: of["loss"][passes] for windows, of in of_length.items()},
        floor=of_length[EVICTED]["floor"] if EVICTED in of_length else {},
        commit=json.loads(folder.origin.read_text())["commit"][:10],
    )


def claims(results: list[Result]) -> list[Claim]:
    """Of the seeds that are done."""
    by_seed: dict[int, dict[str, Result]] = {}
    for one in results:
        by_seed.setdefault(one.seed, {})[one.name] = one
    done = [of for of in by_seed.values() if len(of) == len(STEPS)]
    if not done:
        return []

    def evicted(of: dict[str, Result], name: str, hops: str) -> float:
        return 100 * of[name].accuracy[EVICTED][hops]

    found = [
        Claim("the base answers at 4 hops with its cache, %", tuple(100 * of[BASE].accuracy["1"]["4"] for of in done), ">=", 90),
        Claim(
            "without it, it guesses: points above the surface guess at 1 hop",
            tuple(evicted(of, BEFORE, "1") - 100 * of[BEFORE].floor["1"] for of in done),
            "<=",
            5,
        ),
    ]  # fmt: skip
    for name in ("N=4", "N=4, taught"):
        for hops in ("1", "2"):
            text = f"{name}: right at {hops} hops with the cycle evicted, %"
            found.append(Claim(text, tuple(evicted(of, name, hops) for of in done), ">=", 90))
        for hops in ("3", "4"):
            points = tuple(evicted(of, name, hops) - evicted(of, "N=1", hops) for of in done)
            found.append(Claim(f"{name}: points above N=1 at {hops} hops", points, ">=", 0))
        ratios = tuple(of[name].loss[WITHIN] / of[BEFORE].loss[WITHIN] for of in done)
        found.append(Claim(f"{name}: loss within a window, after / before", ratios, "<=", 1.02))
    return found


def describe(results: list[Result]) -> list[str]:
    """The page: everything in it is from `results` alone."""
    seeds = list(dict.fromkeys(one.seed for one in results))
    lines = [
        "**A model of attention alone, trained with its cache, learns to sleep**",
        "",
        f"Recipes `retrofit/base`, `retrofit/attention` and `retrofit/attention_all`, shards `{' '.join(TASK)}` with 12 questions in two "
        f"windows of 24. Seeds {', '.join(map(str, seeds))}, drawn after the sizes were fixed. Each model is read at its own N.",
        "",
        "Stage 1 trains two inserted gated delta nets without MLPs under hard eviction, stage 2 all weights under sliding eviction. *Taught*: "
        "stage 2 with the base, which reads the whole sequence, as a teacher.",
        "",
    ]
    if found := claims(results):
        rows = [
            [
                claim.text, ", ".join(f"{value:.3g}" for value in claim.values), interval_over_seeds(list(claim.values), 2),
                f"{claim.sign} {claim.bound:g}", "yes" if claim.holds else "NO",
            ]
            for claim in found
        ]  # fmt: skip
        columns = ["claim", "by seed", "mean, 95 % (t)", "wanted", "in every seed"]
        lines += ["## Claims", "", *table(columns, rows, left=1), ""]
    retrofitted = [step.name for step in STEPS if step.name != BASE]
    for windows, title in ((EVICTED, "The cycle is evicted"), (WITHIN, "All within a window")):
        rows = [
            [name, *(_mean(results, name, windows, hops) for hops in HOPS), _mean(results, name, windows, None)]
            for name in retrofitted
            if any(one.name == name for one in results)
        ]
        before = [one for one in results if one.name == BEFORE]
        if windows == EVICTED and before:
            floors = [f"{100 * statistics.fmean(one.floor[hops] for one in before):.1f}" for hops in HOPS]
            rows.append([FLOOR_LABEL, *floors, ""])
        lines += [f"## {title}", "", *table(["", *(f"{hops} hops, %" for hops in HOPS), "loss"], rows, left=1), ""]
    costs = []
    for step in STEPS:
        if same := [one for one in results if one.name == step.name]:
            costs.append([step.name, step.passes, same[0].steps, f"{same[0].flops / 1e12:.2f}"])
    lines += ["## Cost", "", *table(["run", "N", "steps", "training TFLOPs"], costs, left=1), ""]
    return [*lines, f"Commits of the runs: {', '.join(sorted({one.commit for one in results}))}.", ""]


def _mean(results: list[Result], name: str, windows: str, hops: str | None) -> str:
    """Over the seeds: percent right at `hops`, or the loss."""
    same = [one for one in results if one.name == name]
    if hops is None:
        return f"{statistics.fmean(one.loss[windows] for one in same):.3f}"
    return f"{100 * statistics.fmean(one.accuracy[windows][hops] for one in same):.1f}"
