"""powernap report: runs side by side, as a page and as Markdown."""

import argparse
from pathlib import Path

from powernap.launch.commands.arguments import RUN, path, run_folder


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="runs side by side: a page with tables and plots",
        description="Compare runs: what differs, accuracy by depth and N with intervals and floors, loss curves, cost. "
        "Writes a self-contained report.html, and report.md with its pictures. Runs that differ only in seed and folders "
        "are pooled.",
        epilog="example: powernap report sleep-s0 sleep-s1 n1-s0 n1-s1 --to runs/report",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    parser.add_argument("--to", type=path, default=Path("runs/report"), metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--title", help="(default: the runs' names)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.report.write import write_report

    page, text, *pictures = write_report([run_folder(name) for name in options.runs], options.to, options.title)
    print(f"{page}\n{text} and {len(pictures)} picture{'s' if len(pictures) != 1 else ''}")
    return 0
