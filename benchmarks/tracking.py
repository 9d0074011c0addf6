"""What an unavailable tracking server costs training: step times with an MLflow server up, frozen, and down.

Real runs of a small model on one process, every step tracked, in turn; the server is a separate process on loopback.
The losses of all runs must be the same to the last digit.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.common import ROOT, table, verdicts, write
from powernap.train.tracking.tracker import ui_command

RECIPE = [
    "demo", "data.train=data/train-*.tar", "data.test=null", "train.global_batch_size=16", "optimizer.warmup_steps=5",
    "train.log_every=1",
]  # fmt: skip


def main(options: argparse.Namespace, command: str) -> None:
    steps, rounds = (30, 1) if options.quick else (200, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = ["data", "build", "depo", "data", "nodes=8", "max_hop=4", "queries=18", "names=ends"]
        powernap(folder, [*build, "--train-samples", "2000", "--test-samples", "100"])
        uri, server = start_server(folder / "server")
        runs_by_state: dict[str, list[list[dict]]] = {"up": [], "frozen": [], "down": []}
        try:
            for number in range(rounds):
                for state, runs in runs_by_state.items():
                    os.killpg(server.pid, signal.SIGSTOP if state == "frozen" else signal.SIGCONT)
                    run = f"{state}-{number}"
                    # Nothing listens on port 9, "discard".
                    run_uri = "http://127.0.0.1:9" if state == "down" else uri
                    fields = [*RECIPE, f"run.name={run}", f"train.steps={steps}"]
                    powernap(folder, ["train", *fields], MLFLOW_TRACKING_URI=run_uri)
                    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
                    runs.append([json.loads(line) for line in lines])
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    losses = [[line["loss"] for line in run] for runs in runs_by_state.values() for run in runs]
    assert all(one == losses[0] for one in losses)
    # The first steps start threads and fill caches.
    medians = {
        s: [statistics.median(line["seconds"] for line in run[10:]) for run in runs]
        for s, runs in runs_by_state.items()
    }

    def ratio(state: str) -> float:
        return statistics.median(a / b for a, b in zip(medians[state], medians["up"], strict=True))

    judged, verdict = verdicts(
        [(f"step time, server {state} / up", ratio(state), "<=", 1.1) for state in ("frozen", "down")]
    )
    rows = [[state, *(1e3 * value for value in values)] for state, values in medians.items()]
    report = [
        f"{len(losses)} runs of {steps} steps in turn, every step tracked; all have the same losses. Median step, in ms:",
        "",
        *table(["server", *(f"run {number + 1}" for number in range(rounds))], rows),
        "",
    ]
    write("tracking", command, {"seconds": medians, "targets": judged}, [*report, *verdict], clock="wall")


def powernap(folder: Path, arguments: list[str], **environment: str) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "powernap.launch.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def start_server(folder: Path) -> tuple[str, subprocess.Popen]:
    """Start an MLflow server in its own process group; its address and process, once it answers."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(ui_command(folder, port), stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return uri, server
        except OSError:
            assert time.monotonic() < deadline and server.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
