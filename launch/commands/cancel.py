"""powernap cancel: end jobs."""

import argparse

from powernap.launch.commands.arguments import add_jobs


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cancel",
        help="end submitted runs; they save first",
        description="End jobs. Runs that are training save a checkpoint first; the same powernap submit resumes them.",
        epilog="example: powernap cancel mine",
    )
    add_jobs(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.overview import find_jobs
    from powernap.launch.jobs.submission import status_of

    for record in [record for name in options.runs for record in find_jobs(name)]:
        record, status = status_of(record)
        if status.is_over:
            print(f"{record.run}: {status.state} already")
            continue
        record.profile.backend().cancel(record)
        print(f"{record.run}: job {record.id} was asked to end")

    return 0
