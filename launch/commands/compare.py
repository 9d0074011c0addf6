"""powernap compare: two runs' metrics to the digit."""

import argparse

from powernap.launch.commands.arguments import RUN, run_folder


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare two runs' metrics to the digit",
        description="Compare two runs' metrics to the digit. Exit code 0 if they agree exactly, 1 if not.",
    )
    parser.add_argument("runs", metavar="RUN", nargs=2, help=RUN)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.report.compare import compare

    report, equal = compare(*(run_folder(run) for run in options.runs))
    print(report)
    return 0 if equal else 1
