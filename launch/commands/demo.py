"""powernap demo: a small model with sleep beside others of the same cost, from shards to a picture, by the commands a user
would type."""

import argparse
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powernap.launch.commands.arguments import OVERRIDES, path, seed
from powernap.launch.side_by_side import powernap, powernap_side_by_side

if TYPE_CHECKING:
    from powernap.train.config import Recipe

# Fields that the demo sets, and the option to use instead, if there is one.
FIXED = {
    "run.root": "--folder",
    "run.seed": "--seed",
    "run.name": None,
    "sleep.passes": None,
    "data.train": None,
    "data.test": None,
}


@dataclass(frozen=True)
class Model:
    """One of a demo's models."""

    key: str  # in results.json
    label: str
    folder: str  # its run
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Demo:
    """What `powernap demo --task TASK` trains and shows."""

    recipe: str
    shards: Mapping[str, tuple[str, ...]]  # folder -> arguments of `data build`; the first one's are trained on
    models: tuple[Model, ...]  # the first one sleeps
    equal_flops: bool  # the others get as many steps as the first one's training FLOPs allow; False: as many steps
    title: str  # of the picture
    asked: str  # what the table counts
    depth: str


# A transformer that keeps its whole cache: sliding eviction in a window longer than any sequence evicts nothing.
WHOLE_CACHE = ("model.pattern=AAAA", "sleep.eviction=sliding", "model.window=1024")
TRACK = ("asked=each", "--samples-per-shard", "6000")
DEMOS = {
    "track": Demo(
        recipe="track",
        shards={
            "data": ("track", "min_windows=8", *TRACK, "--train-samples", "24000", "--test-samples", "1000"),
            "data16": ("track", "windows=16", "min_windows=16", *TRACK, "--train-samples", "0", "--test-samples", "500"),
            "data64": ("track", "windows=64", "min_windows=64", *TRACK, "--train-samples", "0", "--test-samples", "100"),
        },
        models=(
            Model("sleep", "sleep, N=2", "sleep", ("sleep.passes=2",)),
            Model("no_sleep", "no sleep, N=1", "no_sleep", ("sleep.passes=1",)),
            Model("transformer", "transformer, whole cache", "transformer", ("sleep.passes=1", *WHOLE_CACHE)),
        ),
        equal_flops=True,
        title="Where is it now? Permutations composed window by window, asked after each",
        asked="Share of right answers about held-out words, by windows so far",
        depth="windows",
    ),
    "depo": Demo(
        recipe="demo",
        shards={
            "data": ("depo", "nodes=8", "max_hop=4", "queries=18", "names=ends", "--train-samples", "48000",
                     "--test-samples", "2000", "--samples-per-shard", "6000"),
        },
        models=tuple(Model(str(n), f"trained and read with N={n}", f"N{n}", (f"sleep.passes={n}",)) for n in (4, 1)),
        equal_flops=False,
        title="Following a chain that was read, slept on and evicted",
        asked="Share of right answers on held-out cycles, by hops along the cycle",
        depth="hops",
    ),
}  # fmt: skip


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="train with and without sleep and compare, in minutes",
        description="Build shards, train one small hybrid that sleeps and, with as many FLOPs, the same one without sleep and "
        "a transformer that keeps its whole cache; test all on held-out sequences, longer ones too; write "
        "runs/demo/results.json and runs/demo/demo.png. --task depo: one hybrid with N=4 and one with N=1, equal steps.",
    )
    parser.add_argument("--task", choices=list(DEMOS), default="track", help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of data, weights and order (default: %(default)s)")
    parser.add_argument("--folder", type=path, default=Path("runs/demo"), help="(default: %(default)s)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDES)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    return run_demo(DEMOS[options.task], options.folder, options.seed, options.overrides)


def run_demo(demo: Demo, folder: Path, seed: int, overrides: list[str]) -> int:
    """Build the shards, train the models, evaluate them on held-out sequences, compare; resumes a demo that was stopped.

    Writes results.json and demo.png into `folder`. `overrides` change every run's recipe (tests shorten it).

    Raises:
        RecipeError: if `overrides` do not fit the recipe, or change fields that the demo sets.
    """
    from powernap.train.evaluation.pictures import draw_demo
    from powernap.train.evaluation.tables import FLOOR_LABEL, format_accuracy, some_depths, with_intervals
    from powernap.train.recipe_file import RecipeError, load_recipe

    check_overrides(demo.recipe, overrides)
    results = folder / "results.json"
    if results.is_file():
        raise RecipeError(f"{results} exists: remove {folder} to run the demo again, or choose another --folder")
    start = time.monotonic()
    for name, arguments in demo.shards.items():
        if not (folder / name).exists():
            task, *options = arguments
            powernap("data", "build", task, str(folder / name), *options, "--seed", str(seed))
    commands = {model: train_command(demo, model, folder, seed, overrides) for model in demo.models}
    recipes = {model: load_recipe(demo.recipe, command[2:]) for model, command in commands.items()}
    steps = {model: recipe.train.steps for model, recipe in recipes.items()}
    if demo.equal_flops:
        first = next(iter(recipes.values()))
        budget = first.train.steps * flops_of_step(first)
        steps = {model: round(budget / flops_of_step(recipe)) for model, recipe in recipes.items()}
    missing = [model for model in demo.models if "guesses" not in read_evaluation(folder, model)]  # the others are done
    for model in missing:
        if steps[model] != recipes[model].train.steps:
            commands[model].append(f"train.steps={steps[model]}")
        if (folder / model.folder / "config.yaml").is_file():
            commands[model].append("--resume")
    train_all({model: commands[model] for model in missing}, steps, folder, recipes[demo.models[0]].parallel.world_size)
    for model in missing:
        powernap("eval", str(folder / model.folder), "--passes", str(max(recipes[model].sleep.pass_choices)))

    evaluations = {model.key: read_evaluation(folder, model) for model in demo.models}
    summary = summarize(demo, evaluations, seed, round(time.monotonic() - start, 1))
    if demo.equal_flops:
        summary["flops_per_step"] = {model.key: flops_of_step(recipe) for model, recipe in recipes.items()}
    curves = {model.label: by_depth(evaluations[model.key]) for model in demo.models}
    losses = {model.label: training_loss(folder / model.folder) for model in demo.models}
    draw_demo(
        curves,
        losses,
        trained=list(evaluations[demo.models[0].key]["floor"]),
        depth_name=demo.depth,
        title=demo.title,
        to=folder / "demo.png",
    )
    results.write_text(json.dumps(summary, indent=2) + "\n")

    print(f"\n{demo.asked}")
    for windows in ["", *evaluations[demo.models[0].key]["lengths"]]:
        of_length = {
            m.label: evaluations[m.key]["lengths"][windows] if windows else evaluations[m.key] for m in demo.models
        }
        accuracy = {label: only(of["accuracy"]) for label, of in of_length.items()}
        intervals = {label: only(of["interval"]) for label, of in of_length.items()}
        floor = of_length[demo.models[0].label]["floor"]
        if windows:
            print(f"\n{windows} windows, a length never trained:")
            shown = some_depths(floor)
            accuracy = {label: {depth: values[depth] for depth in shown} for label, values in accuracy.items()}
            print(format_accuracy(accuracy | {FLOOR_LABEL: {d: floor[d] for d in shown}}, depth_name=demo.depth))
        else:
            print(format_accuracy(with_intervals(accuracy, intervals) | {FLOOR_LABEL: floor}, depth_name=demo.depth))
    same = "training FLOPs" if demo.equal_flops else f"{summary['steps']} steps"
    print(f"\nAll models: the same {same} on the same data, {summary['seconds']:.0f} s in all.")
    print(f"Picture:   {folder / 'demo.png'}")
    print(f"Numbers:   {results}")
    print(f"Curves:    powernap ui --root {shlex.quote(str(folder))}")
    print("Next:      powernap recipe list")
    return 0


def train_command(demo: Demo, model: Model, folder: Path, seed: int, overrides: list[str]) -> list[str]:
    first, *longer = demo.shards
    tests = [f"{folder}/{name}/test-*.tar" for name in (first, *longer)]
    return [
        "train", demo.recipe, f"run.name={model.folder}", f"run.root={folder}", f"run.seed={seed}", *model.overrides,
        f"data.train={folder}/{first}/train-*.tar", f"data.test=[{','.join(tests)}]" if longer else f"data.test={tests[0]}",
        *overrides,
    ]  # fmt: skip


def flops_of_step(recipe: "Recipe") -> int:
    """FLOPs of an optimizer step, from the windows of the first training sample."""
    from powernap.parallel.planning.work import segments_of, step_flops
    from powernap.train.data.check import predicting_windows

    return step_flops(recipe, segments_of(recipe, *predicting_windows(recipe)))


def summarize(demo: Demo, evaluations: Mapping[str, dict], seed: int, seconds: float) -> dict[str, Any]:
    """The content of results.json."""
    first = evaluations[demo.models[0].key]
    steps = {key: evaluation["step"] for key, evaluation in evaluations.items()}
    summary = {
        "accuracy": {key: evaluation["accuracy"] for key, evaluation in evaluations.items()},  # model -> N -> depth
        "interval": {key: evaluation["interval"] for key, evaluation in evaluations.items()},
        "floor": first["floor"],  # depth -> accuracy of the best surface guess, see train/evaluation/floors.py
        "constant_guess": first["guesses"]["constant"],
        "steps": steps if demo.equal_flops else first["step"],
        "seed": seed,
        "seconds": seconds,
    }
    if first["lengths"]:
        summary["lengths"] = {  # windows of longer sequences -> model -> N -> depth
            windows: {
                "accuracy": {
                    key: evaluation["lengths"][windows]["accuracy"] for key, evaluation in evaluations.items()
                },
                "floor": first["lengths"][windows]["floor"],
            }
            for windows in first["lengths"]
        }
    return summary


def by_depth(evaluation: dict) -> tuple[dict[str, float], dict[str, tuple[float, float]], dict[str, float]]:
    """Accuracy, interval and floor by depth: of the trained length, then the deeper ones of the next longer length."""
    accuracy, intervals = dict(only(evaluation["accuracy"])), dict(only(evaluation["interval"]))
    floor = dict(evaluation["floor"])
    for longer in list(evaluation["lengths"].values())[:1]:
        for depth in longer["floor"].keys() - floor.keys():
            accuracy[depth], intervals[depth] = only(longer["accuracy"])[depth], only(longer["interval"])[depth]
        floor |= {depth: share for depth, share in longer["floor"].items() if depth not in floor}
    order = sorted(floor, key=int)
    return {d: accuracy[d] for d in order}, {d: intervals[d] for d in order}, {d: floor[d] for d in order}


def only(by_passes: Mapping[str, Any]) -> Any:
    """The values of the one N that a model was read with."""
    (values,) = by_passes.values()
    return values


def training_loss(run: Path) -> list[float]:
    from powernap.train.tracking.metrics import read_metrics

    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def check_overrides(recipe: str, overrides: list[str]) -> None:
    """Raise RecipeError, before anything is built, for overrides that would fail later or move runs out of the demo's folder."""
    from powernap.train.config import Recipe
    from powernap.train.recipe_file import RecipeError, flatten, load_recipe, parse_overrides
    from powernap.train.yaml_core import settle

    for key in flatten(settle(parse_overrides(overrides), Recipe)):
        for field, option in FIXED.items():
            if key == field or key.startswith(f"{field}."):
                instead = f"use {option}" if option else "train your own run: powernap train demo ..."
                raise RecipeError(f"{key} is set by the demo: {instead}")
    load_recipe(recipe, overrides)


def read_evaluation(folder: Path, model: Model) -> dict:
    """The results of `powernap eval` for one of the demo's models; empty before it has run."""
    path = folder / model.folder / "evaluation.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def train_all(commands: Mapping[Model, Sequence[str]], steps: Mapping[Model, int], folder: Path, ranks: int) -> None:
    """Train the models side by side, one on each core, or on `ranks` of them; alone, with its output on the terminal."""
    from powernap.train.tracking.metrics import read_metrics

    side_by_side = min(len(commands), max(1, len(os.sched_getaffinity(0)) // ranks))
    if side_by_side < 2:
        for command in commands.values():
            powernap(*command)
        return

    def progress() -> str:
        files = {model: folder / model.folder / "metrics.jsonl" for model in commands}
        done = {model: len(read_metrics(file)) if file.is_file() else 0 for model, file in files.items()}
        return "step " + ", ".join(f"{number}/{steps[model]} of {model.folder}" for model, number in done.items())

    powernap_side_by_side({m.folder: command for m, command in commands.items()}, folder, side_by_side, progress)
