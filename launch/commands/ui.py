"""powernap ui: MLflow's user interface for the runs, on loopback."""

import argparse
from pathlib import Path

from powernap.launch.commands.arguments import path, whole

TRAINING = "workflowType=machine_learning"  # else MLflow's pages open as those of language-model applications
END_SECONDS = 10  # from SIGTERM to SIGKILL for the server


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ui", help="show the runs in MLflow's user interface", description="Serve the runs on 127.0.0.1."
    )
    parser.add_argument("--root", type=path, default=Path("runs"), help="where the runs are (default: %(default)s)")
    parser.add_argument("--port", type=whole(1, 65535), default=5000, help="(default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    import socket

    from powernap.parallel import loopback
    from powernap.train.tracking.delivery import DeliveryError, prepare_mlflow
    from powernap.train.tracking.tracker import ui_command

    if not options.root.is_dir():
        raise DeliveryError(f"--root {options.root}: no such folder")
    host = loopback.address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is fine
        try:
            probe.bind((host, options.port))
        except OSError as error:
            raise DeliveryError(f"--port {options.port}: {error}: choose another one") from None
    prepare_mlflow()
    from powernap.train.tracking.database import prepare_database

    prepare_database(options.root.absolute() / "mlflow.db")
    place = f"[{host}]" if ":" in host else host
    print(f"all runs: http://{place}:{options.port}/#/experiments?{TRAINING}", flush=True)
    return _serve(ui_command(options.root, options.port))


def _serve(command: list[str]) -> int:
    """Run `command` until it ends or a signal asks this process to end; leave none of its processes behind.

    Returns its exit code, or 128 + the signal's number. SIGHUP and SIGINT stay ignored if this process was started so, as
    by nohup.
    """
    import signal
    import subprocess
    import time

    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    # In its own process group: the server starts others, which do not all end with it.
    server = subprocess.Popen(command, process_group=0)
    while not received and server.poll() is None:
        time.sleep(0.1)
    deadline = time.monotonic() + END_SECONDS
    alive = _send(server.pid, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        server.poll()  # reaps it: a zombie would still count as alive
        alive = _send(server.pid, 0)
    _send(server.pid, signal.SIGKILL)
    code = server.wait()
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _send(group: int, number: int) -> bool:
    """Send a signal to a process group, 0 for none; return whether it has a process."""

    import os

    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
