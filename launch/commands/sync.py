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
        "they ended. Exit code 1 if some are left.",
        epilog="examples: powernap sync mine; powernap sync",
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help=f"{RUN} (default: all runs below {ROOT}/)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    folders = [run_folder(name) for name in options.runs]

    from powernap.train.delivery import DeliveryError, prepare_mlflow, spooled_runs, sync_run

    folders = folders or spooled_runs(ROOT)
    if not folders:
        raise DeliveryError(f"no run below {ROOT}/ has records for MLflow: name a run's folder")
    prepare_mlflow()
    left = False
    for folder in folders:
        try:
            delivered = sync_run(folder, progress=sys.stderr.isatty())
            print(f"{folder}: {delivered} records delivered" if delivered else f"{folder}: nothing waits")
        except DeliveryError as error:
            left = True
            print(f"powernap: error: {error}", file=sys.stderr)
    return int(left)
