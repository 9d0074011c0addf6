"""powernap demo: the same small hybrid with and without sleep, from shards to a picture, by the commands a user would type."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from powernap.launch.commands.arguments import OVERRIDES, path, seed

TRAINED = (4, 1)  # N of the two models: four passes of sleep, and the plain hybrid
# Fields that the demo sets, and the option to use instead, if there is one.
FIXED = {
    "run.root": "--folder",
    "run.seed": "--seed",
    "run.name": None,
    "sleep.passes": None,
    "data.train": None,
    "data.test": None,
}
TASK = ["nodes=8", "max_hop=4", "queries=18", "names=ends"]


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="train with and without sleep and compare, in minutes",
        description="Build Depo shards, train one small hybrid with N=4 passes of sleep and one without (N=1), test "
        "both on held-out cycles; write runs/demo/results.json and runs/demo/demo.png.",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of data, weights and order (default: %(default)s)")
    parser.add_argument("--folder", type=path, default=Path("runs/demo"), help="(default: %(default)s)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDES)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    return demo(options.folder, options.seed, options.overrides)


def demo(folder: Path, seed: int, overrides: list[str]) -> int:
    """Build the shards, train both models, evaluate both on held-out cycles, compare them; resumes a demo that was stopped.

    Writes results.json and demo.png into `folder`. `overrides` change both runs' recipe (tests shorten it).

    Raises:
        RecipeError: if `overrides` do not fit the recipe, or change fields that the demo sets.
    """
    from powernap.train.evaluation.pictures import draw_demo
    from powernap.train.evaluation.tables import FLOOR_LABEL, format_accuracy, with_intervals
    from powernap.train.recipe_file import RecipeError
    from powernap.train.tracking.metrics import read_metrics

    check_overrides(overrides)
    results = folder / "results.json"
    if results.is_file():
        raise RecipeError(f"{results} exists: remove {folder} to run the demo again, or choose another --folder")
    start = time.monotonic()
    data = folder / "data"
    if not data.exists():
        powernap("data", "build", "depo", str(data), *TASK, "--test-samples", "2000", "--train-samples", "48000",
            "--samples-per-shard", "6000", "--seed", str(seed))  # fmt: skip
    for passes in TRAINED:
        if "guesses" in read_evaluation(folder, passes):
            continue  # done before the demo was stopped
        resume = ["--resume"] if (folder / f"N{passes}" / "config.yaml").is_file() else []
        powernap(
            "train", "demo", f"run.name=N{passes}", f"run.root={folder}", f"run.seed={seed}", f"sleep.passes={passes}",
            f"data.train={data}/train-*.tar", f"data.test={data}/test-*.tar", *overrides, *resume,
        )  # fmt: skip
        powernap("eval", str(folder / f"N{passes}"), "--passes", str(passes))
    evaluations = {n: read_evaluation(folder, n) for n in TRAINED}
    accuracy = {str(n): evaluations[n]["accuracy"] for n in TRAINED}
    floor, guesses = evaluations[TRAINED[0]]["floor"], evaluations[TRAINED[0]]["guesses"]
    summary = {
        "accuracy": accuracy,  # trained N -> read at N -> hop
        "interval": {str(n): evaluations[n]["interval"] for n in TRAINED},
        "floor": floor,  # hop -> accuracy of the best surface guess, see train/evaluation/floors.py
        "constant_guess": guesses["constant"],
        "steps": evaluations[TRAINED[0]]["step"],
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
    }
    by_model = {f"trained and read with N={n}": accuracy[str(n)][str(n)] for n in TRAINED}
    intervals = {f"trained and read with N={n}": evaluations[n]["interval"][str(n)] for n in TRAINED}
    losses = {
        name: [record["loss"] for record in read_metrics(folder / f"N{n}" / "metrics.jsonl")]
        for name, n in zip(by_model, TRAINED, strict=True)
    }
    picture = folder / "demo.png"
    title = "Following a chain that was read, slept on and evicted"
    draw_demo(by_model, intervals, floor, losses, title=title, to=picture)
    results.write_text(json.dumps(summary, indent=2) + "\n")

    print("\nShare of right answers on held-out cycles, by hops along the cycle")
    print(format_accuracy(with_intervals(by_model, intervals) | {FLOOR_LABEL: floor}, depth_name="hops"))
    print(f"\nBoth models: the same {summary['steps']} steps on the same data, {summary['seconds']:.0f} s in all.")
    print(f"Picture:   {picture}")
    print(f"Numbers:   {results}")
    print("Curves:    make ui      (MLflow on http://127.0.0.1:5000)" if folder == Path("runs/demo") else
          f"Curves:    powernap ui --root {folder}")  # fmt: skip
    print('Next:      powernap train --help, and "Your own run" in the README')
    return 0


def check_overrides(overrides: list[str]) -> None:
    """Raise RecipeError, before anything is built, for overrides that would fail later or move runs out of the demo's folder."""
    from powernap.train.config import Recipe
    from powernap.train.recipe_file import RecipeError, load_recipe, parse_overrides
    from powernap.train.run.folder import flatten
    from powernap.train.yaml_core import settle

    for key in flatten(settle(parse_overrides(overrides), Recipe)):
        for field, option in FIXED.items():
            if key == field or key.startswith(f"{field}."):
                instead = f"use {option}" if option else "train your own run: powernap train demo ..."
                raise RecipeError(f"{key} is set by the demo: {instead}")
    load_recipe("demo", overrides)


def read_evaluation(folder: Path, passes: int) -> dict:
    """The results of `powernap eval` for one of the demo's models; empty before it has run."""
    path = folder / f"N{passes}" / "evaluation.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def powernap(*arguments: str) -> None:
    """Print and run one powernap command in its own process."""
    from powernap.launch.torchrun import forwarding
    from powernap.parallel.liveness.parent import not_to_outlive_this

    print("$ powernap " + " ".join(arguments), flush=True)
    with forwarding(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        command = subprocess.Popen(
            [sys.executable, "-m", "powernap.launch.cli", *arguments],
            env=os.environ | not_to_outlive_this(),
            process_group=0,  # otherwise Ctrl-C would arrive twice, from the terminal and from here
        )
        exit_code = command.wait()
    if exit_code:
        sys.exit(exit_code if exit_code > 0 else 128 - exit_code)  # the command has printed its error
