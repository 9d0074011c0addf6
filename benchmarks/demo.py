"""The demo on three fresh seeds: does it hold every time, and how long does it take?

Runs `powernap demo` as `make demo` does, each seed in a folder of its own, and keeps the first seed's picture.
"""

import argparse
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.common import table, verdicts, write

SEEDS = 3
HOP = "4"  # the bars are on the deepest questions


def main(options: argparse.Namespace, command: str) -> None:
    seeds = [secrets.randbelow(10_000) for _ in range(SEEDS)]
    overrides = ["train.steps=6", "optimizer.warmup_steps=2"] if options.quick else []
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            place = Path(folder) / str(seed)
            run = [sys.executable, "-m", "powernap.launch.cli", "demo", "--seed", str(seed), "--folder", str(place)]
            subprocess.run([*run, *overrides], check=True)
            results[seed] = json.loads((place / "results.json").read_text())
        common.RESULTS.mkdir(exist_ok=True)
        if not options.quick:
            shutil.copy(Path(folder) / str(seeds[0]) / "demo.png", common.RESULTS / "demo.png")

    rows, worst = [], {"4": 1.0, "1": 0.0}
    for seed, result in results.items():
        for passes in ("4", "1"):
            by_hop = result["accuracy"][passes][passes]
            rows.append([seed, f"N={passes}", *(by_hop[hop] for hop in sorted(by_hop)), result["seconds"]])
            worst[passes] = (min if passes == "4" else max)(worst[passes], by_hop[HOP])
    judged, verdict = verdicts(
        [
            (f"worst seed at hop {HOP}, N=4", worst["4"], ">=", 0.95),
            (f"best seed at hop {HOP}, N=1", worst["1"], "<=", 0.6),
            ("longest run in seconds", max(result["seconds"] for result in results.values()), "<=", 360.0),
        ]
    )
    steps = next(iter(results.values()))["steps"]
    report = [
        f"Held-out accuracy by hop after {steps} steps on two processes, each model read at its own N; seconds on the clock.",
        "",
        *table(["seed", "trained", "1", "2", "3", "4", "both, s"], rows),
        "",
        *verdict,
    ]
    if options.quick:
        print("\n".join(report))
    else:
        write("demo", command, {"results": results, "targets": judged}, report)
