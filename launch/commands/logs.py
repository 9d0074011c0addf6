"""powernap logs: a job's output."""

import argparse
import sys
import time

from powernap.launch.commands.arguments import add_jobs
from powernap.launch.jobs.status import Status

STATUS_SECONDS = 5.0  # between queries why a job without output is pending


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "logs",
        help="the output of a submitted run",
        description="A job's output, over all its starts.",
        epilog="example: powernap logs -f mine",
    )
    add_jobs(parser, several=False)
    parser.add_argument("-f", "--follow", action="store_true", help="follow the output until the job is over")
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
    notice, queried = _pending_notice(record.run, status), time.monotonic()
    if notice:
        print(notice, file=sys.stderr, flush=True)
    for piece in record.profile.backend().logs(record, options.follow):
        if not piece and time.monotonic() > queried + STATUS_SECONDS:
            shown, queried = notice, time.monotonic()
            notice = _pending_notice(record.run, status_of(record)[1])
            if notice and notice != shown:
                print(notice, file=sys.stderr, flush=True)
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0


def _pending_notice(run: str, status: Status) -> str:
    """Why there is no output yet; "" once the job runs."""
    return f"{run} is pending: {status.reason or 'the scheduler gives no reason'}" if status.state == "pending" else ""
