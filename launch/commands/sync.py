"""powernap sync: what MLflow has missed of runs."""

import argparse
import sys
from pathlib import Path

from powernap.launch.commands.arguments import RUN, run_folder

ROOT = Path("runs")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sync",
        help="deliver what MLflow has missed of runs",
        description="Deliver the records of runs that wait for MLflow: its server, MLFLOW_TRACKING_URI, was away when "
        "they ended, or its database beside the runs was set aside. Exit code 1 if some still wait.",
        epilog="examples: powernap sync mine; powernap sync",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help=f"{RUN}, or a folder of runs (default: all runs below {ROOT}/)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.tracking.delivery import (
        SYNC_ATTEMPTS,
        SYNC_TIMEOUT,
        Delivery,
        DeliveryError,
        prepare_mlflow,
        spooled_runs,
        sync_run,
    )

    folders = [folder for name in options.runs for folder in spooled_runs(Path(name)) or [run_folder(name)]]
    folders = folders or spooled_runs(ROOT)
    if not folders:
        raise DeliveryError(f"no run below {ROOT}/ has records for MLflow: name a run's folder")
    # Runs that wait first: what they find broken is mended before the others are looked for in it.
    folders.sort(key=lambda folder: not Delivery(folder).waiting())
    prepare_mlflow(SYNC_TIMEOUT)
    left = False
    ask = True
    for folder in folders:
        try:
            # Where MLflow has not answered for one run, the next ones need not wait as long.
            synced = sync_run(folder, sys.stderr.isatty(), ask, attempts=1 if left or not ask else SYNC_ATTEMPTS)
        except DeliveryError as error:
            left = True
            print(f"powernap: error: {error}", file=sys.stderr)
            continue
        words = [f"{synced.delivered} records delivered" if synced.delivered else "nothing waits"]
        if synced.unknown:
            ask = False
            words.append(f"whether MLflow has this run is not known: {synced.unknown}")
        if synced.refused:
            words.append(f"MLflow refused {len(synced.refused)}, which it will not get: {synced.refused[0]}")
        print(f"{folder}: {'; '.join(words)}", flush=True)
    return int(left)
