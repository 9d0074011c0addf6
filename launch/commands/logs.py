"""powernap logs: what a job printed."""

import argparse
import sys
import time

from powernap.launch.commands.arguments import add_jobs
from powernap.launch.jobs.status import Status

ASK_AGAIN = 5.0  # seconds, why a job that prints nothing waits


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
    from powernap.launch.jobs.description import JobError
    from powernap.launch.jobs.overview import find_jobs
    from powernap.launch.jobs.submission import status_of

    records = find_jobs(options.job)
    if len(records) > 1:
        raise JobError(f"{options.job} is a sweep: name one of {', '.join(record.run for record in records)}")
    record, status = status_of(records[0])
    if record.id is None:
        raise JobError(f"{record.run}: {status.reason}")
    said, asked = _waits(record.run, status), time.monotonic()
    if said:
        print(said, file=sys.stderr, flush=True)
    for piece in record.profile.backend().logs(record, options.follow):
        if not piece and time.monotonic() > asked + ASK_AGAIN:
            before, asked = said, time.monotonic()
            said = _waits(record.run, status_of(record)[1])
            if said and said != before:
                print(said, file=sys.stderr, flush=True)
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0


def _waits(run: str, status: Status) -> str:
    """Why there may be nothing to read yet; "" once it runs."""
    return f"{run} is pending: {status.reason or 'the scheduler has not said why'}" if status.state == "pending" else ""
