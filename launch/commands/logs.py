"""powernap logs: what a job printed."""

import argparse
import sys

from powernap.launch.commands.arguments import add_jobs


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "logs",
        help="what a submitted run printed",
        description="What a job printed, over all its starts.",
        epilog="example: powernap logs -f mine",
    )
    add_jobs(parser, several=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job is over")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.backend import backend_of
    from powernap.launch.jobs.description import JobError
    from powernap.launch.jobs.overview import find_jobs
    from powernap.launch.jobs.submission import status_of

    records = find_jobs(options.job)
    if len(records) > 1:
        raise JobError(f"{options.job} is a sweep: name one of {', '.join(record.run for record in records)}")
    record, status = status_of(records[0])
    if record.id is None:
        raise JobError(f"{record.run}: {status.reason}")
    for piece in backend_of(record.profile).logs(record, options.follow):
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0
