"""`python -m benchmarks [NAME ...] [--quick]`: run from the repository root; writes benchmarks/results/."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: every number is for one thread unless it says otherwise

import argparse
import importlib
from pathlib import Path

from benchmarks import common

ON_CPU = [
    "delta_rule",
    "sleep",
    "generate",
    "stack",
    "beside_transformers",
    "pipeline",
    "stage_memory",
    "loader",
    "corpora",
    "checkpoint",
    "tracking",
]
ON_DEMAND = [
    "demo",
    "trend",
    "text",
    "retrofit",
    "schedules",
    "device",
]  # a quarter of an hour; hours; hours; half an hour; two hours; a CUDA device
STUDY = "study"  # study NAME ...: hours, see studies.py


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(ON_CPU)} (all by default), {', '.join(ON_DEMAND)}, or study NAME",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: does it still run?")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder to write into")
    parser.add_argument("--tiny", action="store_true", help="device: a tiny model on the CPU, to try the script itself")
    parser.add_argument(
        "--folder",
        type=Path,
        help="demo, trend, text, retrofit, schedules, study: where runs are kept (default: below runs/)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="study, text, schedules: models trained side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="study, text, retrofit, schedules: write the page of what is done, train nothing",
    )
    options = parser.parse_args()
    common.RESULTS = options.results
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    if options.names[:1] == [STUDY]:
        importlib.import_module("benchmarks.study").main(options, "")
        return
    if unknown := set(options.names) - {*ON_CPU, *ON_DEMAND}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join([*ON_CPU, *ON_DEMAND])}")
    for name in options.names or ON_CPU:
        flags = [f"--{flag}" for flag in ("quick", "tiny") if getattr(options, flag)]
        importlib.import_module(f"benchmarks.{name}").main(options, " ".join(["python -m benchmarks", name, *flags]))


if __name__ == "__main__":
    main()
