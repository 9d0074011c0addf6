"""powernap status: how a job, or all jobs of a sweep, stand."""

import argparse

from powernap.launch.commands.arguments import add_jobs


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="how a submitted run or sweep stands",
        description="How jobs stand: pending, running, stopping, succeeded, failed, cancelled, or lost, if the scheduler "
        "does not know them any more.",
        epilog="example: powernap status mine --json",
    )
    add_jobs(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.overview import find_jobs, rows_of
    from powernap.launch.jobs.status import as_json, as_table

    rows = rows_of([record for name in options.runs for record in find_jobs(name)])
    print(as_json(rows) if options.json else "\n".join(as_table(rows)))
    return 0
