"""powernap sync: deliver records that MLflow has missed."""

import argparse
import sys
from pathlib import Path

from powernap.launch.commands.arguments import RUN, run_folder

ROOT = Path("runs")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sync",
        help="deliver records that MLflow has missed",
        description="Deliver runs' records that wait for MLflow: its server, MLFLOW_TRACKING_URI, was unavailable when "
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
    # Waiting runs first: a broken database that they find is repaired before it is searched for the others.
    folders.sort(key=lambda folder: not Delivery(folder).waiting())
    prepare_mlflow(SYNC_TIMEOUT)
    failed = False
    ask = True
    for folder in folders:
        try:
            # If MLflow has not answered for one run, do not wait as long for the next ones.
            synced = sync_run(folder, sys.stderr.isatty(), ask, attempts=1 if failed or not ask else SYNC_ATTEMPTS)
        except DeliveryError as error:
            failed = True
            print(f"powernap: error: {error}", file=sys.stderr)
            continue
        words = [f"{synced.delivered} records delivered" if synced.delivered else "nothing waits"]
        if synced.unknown:
            ask = False
            words.append(f"unknown whether MLflow has this run: {synced.unknown}")
        if synced.refused:
            words.append(f"MLflow refused {len(synced.refused)}, which are not sent again: {synced.refused[0]}")
        print(f"{folder}: {'; '.join(words)}", flush=True)
    return int(failed)
