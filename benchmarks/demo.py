"""The demo on fresh seeds: does it hold every time?

Runs `powernap demo` for each seed. Accuracy is what counts: how long `make demo` takes is not measured here, since machines
are shared. Shards and runs are kept in a folder: when stopped, the same command continues; finished runs are only read. The
first seed's picture is kept beside the results.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, draw_seeds, table, verdicts, write

SEEDS = 3
FOLDER = ROOT / "runs" / "demos"
OTHERS = ("no_sleep", "transformer")


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(Path(folder), 1, ["train.steps=6", "optimizer.warmup_steps=2"])
            print("\n".join(describe(results)[1]))
        return
    folder = options.folder or FOLDER
    results = measure(folder, SEEDS, [])
    shutil.copy(folder / str(next(iter(results))) / "demo.png", common.RESULTS / "demo.png")
    judged, report = describe(results)
    write("demo", command, {"results": results, "targets": judged}, report, clock="times are not measured")


def measure(folder: Path, seeds: int, overrides: list[str]) -> dict[int, dict]:
    """Seed -> its demo's results, without seconds: the machine may be busy with other things."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in draw_seeds(folder, seeds):
        found = folder / str(seed) / "results.json"
        if not found.exists():
            options = ["demo", "--seed", str(seed), "--folder", str(found.parent), *overrides]
            subprocess.run([sys.executable, "-m", "powernap.launch.cli", *options], check=True)
        results[seed] = json.loads(found.read_text())
        del results[seed]["seconds"]
    return results


def describe(results: dict[int, dict]) -> tuple[list[dict], list[str]]:
    """The targets as numbers, and the report."""
    deepest = list(next(iter(results.values()))["floor"])[-1]
    longer = {windows: list(of["floor"])[-1] for windows, of in next(iter(results.values())).get("lengths", {}).items()}
    rows, gaps = [], {deepest: 1.0, **dict.fromkeys(longer, 1.0)}
    for seed, result in results.items():
        found = {}  # model -> length -> share at its last depth
        for model, (by_depth,) in ((model, of.values()) for model, of in result["accuracy"].items()):
            of_lengths = result["lengths"]
            last = {w: next(iter(of_lengths[w]["accuracy"][model].values()))[depth] for w, depth in longer.items()}
            found[model] = {deepest: by_depth[deepest], **last}
            rows.append([seed, model, result["steps"][model], *by_depth.values(), *last.values()])
        floors = [of_lengths[w]["floor"][depth] for w, depth in longer.items()]
        rows.append([seed, "surface guess", "", *result["floor"].values(), *floors])
        for length in gaps:
            gap = found["sleep"][length] - max(found[other][length] for other in OTHERS)
            gaps[length] = min(gaps[length], gap)
    bars = [(f"sleep less the better of the others at {deepest} windows, worst seed", gaps[deepest], ">=", 0.4)]
    twice = next(iter(longer))
    bars.append((f"the same at {twice} windows, never trained", gaps[twice], ">=", 0.3))
    judged, verdict = verdicts(bars)
    columns = [*next(iter(results.values()))["floor"], *(f"{depth} of {windows}" for windows, depth in longer.items())]
    return judged, [
        "Held-out accuracy by windows so far, each model read at its own N; all of a seed have the same shards, order and",
        f"training FLOPs. Sequences of {deepest} windows are trained; the last columns are the deepest question of longer",
        "ones. The *surface guess* is the best of: a constant, the answer of the same question before, the last window alone.",
        "",
        *table(["seed", "model", "steps", *columns], rows),
        "",
        *verdict,
    ]
