"""What a run says: a bar on a terminal, plain lines elsewhere, and what happens to it when a run fails."""

import os
import pty
import subprocess
import sys

import pytest

import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    runs.prepare(folder, train_samples=128)
    return folder


def on_a_terminal(command, folder):
    """Run a command whose stderr is a terminal of 80 columns; returns what it showed there."""
    import fcntl
    import struct
    import termios

    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=end, stdout=subprocess.DEVNULL)
    os.close(end)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how a terminal whose other end is closed says so
            break
        if not piece:
            break
        shown += piece
    assert process.wait(60) == 0, shown
    return shown.decode()


def test_a_terminal_gets_a_bar_and_no_step_lines(folder):
    command = [sys.executable, "-m", "powernap.launch.cli", "train", "tiny.yaml", "run.name=bar", "data.lanes=1"]
    shown = on_a_terminal(command, folder)
    bars = [piece for piece in shown.split("\r") if piece.startswith("bar:") and "|" in piece]
    assert any("10/10" in bar and "loss " in bar and "tokens/s" in bar for bar in bars), shown
    assert max(len(line) for piece in shown.split("\r") for line in piece.split("\n")) <= 80
    assert "grad norm" not in shown  # the step lines are in the file
    assert "held-out accuracy" in shown
    log = (folder / "runs" / "bar" / "logs" / "train.log").read_text()
    assert log.count("grad norm") == 3 and "held-out accuracy" in log and "\x1b" not in log


def test_a_diverged_run_stops_with_one_line_and_is_marked_failed(folder):
    from mlflow import MlflowClient

    result = runs.powernap(
        "train", "tiny.yaml", "run.name=diverged", "data.lanes=1", "optimizer.lr=1e30", "train.steps=50", cwd=folder
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("powernap: error: ")]
    assert len(errors) == 1 and "not finite" in errors[0] and "optimizer.lr" in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    run = folder / "runs" / "diverged"
    assert "DivergedError" in (run / "logs" / "train.log").read_text()
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    assert client.get_run((run / "mlflow_run_id").read_text().strip()).info.status == "FAILED"
