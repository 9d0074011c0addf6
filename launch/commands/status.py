"""powernap status: the status of a job, or of all jobs of a sweep."""

import argparse

from powernap.launch.commands.arguments import add_jobs


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "status",
        help="the status of a submitted run or sweep",
        description="The status of jobs: pending, running, stopping, succeeded, failed, cancelled, or lost, if the "
        "scheduler no longer knows them.",
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
