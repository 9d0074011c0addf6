"""powernap ui: the runs in MLflow's pages, on loopback."""

import argparse
from pathlib import Path

from powernap.launch.commands.arguments import path, whole


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ui", help="show the runs in MLflow's pages", description="Serve the runs on 127.0.0.1."
    )
    parser.add_argument("--root", type=path, default=Path("runs"), help="where the runs are (default: %(default)s)")
    parser.add_argument("--port", type=whole(1, 65535), default=5000, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    import subprocess

    from powernap.train.tracking import ui_command

    return subprocess.call(ui_command(options.root, options.port))
