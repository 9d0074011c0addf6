"""powernap wait: wait until jobs are over."""

import argparse
import sys
import time

from powernap.launch.commands.arguments import add_jobs, duration
from powernap.launch.jobs.status import Row

NOT_OVER = 124  # as timeout(1)


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "wait",
        help="wait for submitted runs to end",
        description="Wait for jobs to end. Exit code 0: all succeeded; 1: one failed or is lost; 3: one was cancelled; "
        "124: not over in time.",
        epilog="example: powernap wait mine --timeout 12h && powernap eval mine",
    )
    add_jobs(parser)
    parser.add_argument("--timeout", type=duration, metavar="TIME", help="such as 90m or 12h (default: forever)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.overview import find_jobs, rows_of
    from powernap.launch.jobs.status import as_table

    records = [record for name in options.runs for record in find_jobs(name)]
    deadline = time.monotonic() + options.timeout if options.timeout else float("inf")
    interval, shown = 0.5, None
    while True:
        rows = rows_of(records)
        over = all(row.status.is_over for row in rows)
        table = "\n".join(as_table(rows))
        if over or time.monotonic() > deadline:
            print(table)
            break
        # The table changes with every step: in a log, print only the reasons of pending jobs.
        reasons = "\n".join(f"{row.run} is pending: {row.status.reason}" for row in rows if _has_reason(row))
        news = table if sys.stderr.isatty() else reasons
        if news and news != shown:
            print(news, file=sys.stderr, flush=True)
            shown = news
        record, id = next((record, row.id) for record, row in zip(records, rows, strict=True) if not row.status.is_over)
        waiting = record.model_copy(update={"id": id})  # found only now, if submitting was interrupted
        record.profile.backend().wait_for_change(waiting, min(interval, max(0.0, deadline - time.monotonic())))
        interval = min(10.0, interval * 1.5)  # spare the scheduler
    states = {row.status.state for row in rows}
    if not over:
        return NOT_OVER
    return 1 if states & {"failed", "lost"} else 3 if "cancelled" in states else 0


def _has_reason(row: Row) -> bool:
    return row.status.state == "pending" and bool(row.status.reason)
