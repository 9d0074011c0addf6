"""powernap list: all jobs."""

import argparse
from pathlib import Path

from powernap.launch.commands.arguments import path


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "list",
        help="all submitted runs",
        description="All runs that were submitted from this folder, newest last.",
        epilog="example: powernap list --active",
    )
    parser.add_argument("--root", type=path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--active", action="store_true", help="only jobs that are not over")

    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.overview import all_jobs, rows_of
    from powernap.launch.jobs.status import as_json, as_table

    rows = [row for row in rows_of(all_jobs(options.root)) if not (options.active and row.status.is_over)]
    if options.json:
        print(as_json(rows))
    else:
        print("\n".join(as_table(rows)) if rows else f"no jobs below {options.root}/")
    return 0
