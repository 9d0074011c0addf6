"""What a run says: a bar on a terminal, plain lines elsewhere, and what happens to it when a run fails."""

import os
import pty
import subprocess
from types import SimpleNamespace

import pytest
import torch

from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.run_log import RunLog, slow_on_gpus
from powernap.train.tracking.summary import Summary, held_out
from powernap.train.tracking.trackers import Trackers
from tests.helpers import runs, warm

ONE = SimpleNamespace(is_main=True, device=torch.device("cpu"), world_size=1)


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


def test_the_first_step_is_left_out_of_the_estimate(tmp_path, monkeypatch):
    """A first step of 100 s and 49 more of a second each: once 1:21:40 were left after it, and 7:16 after ten."""
    recipe = load_recipe("demo", ["train.steps=50", "train.log_every=10", f"run.root={tmp_path}"])
    run, clock = RunFolder(recipe.run_folder), [0.0]
    run.create(recipe)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(Trackers, "open", lambda *_, **__: Trackers())
    left = {}
    with RunLog(recipe, run, ONE, None) as log:
        for step in range(1, 51):
            clock[0] += 100 if step == 1 else 1
            log.step(step, {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 10, "seconds": 1.0})
            bar = log._bar.format_dict
            rate = bar["rate"] or (bar["n"] - bar["initial"]) / bar["elapsed"] if bar["elapsed"] else None
            left[step] = rate and (bar["total"] - bar["n"]) / rate
    assert not left[1] and left[2] == pytest.approx(48) and left[10] == pytest.approx(40)
    lines = [line for line in (run.logs / "train.log").read_text().splitlines() if "grad norm" in line]
    assert [line.split("tokens/s  ")[1] for line in lines] == ["first step", *(f"{s} left" for s in ("0:40", "0:30", "0:20", "0:10", "0:00"))]  # fmt: skip


def test_a_terminal_gets_a_bar_and_no_step_lines(folder):
    command = [warm.python(), "-m", "powernap.launch.cli", "train", "tiny.yaml", "run.name=bar", "data.lanes=1"]
    shown = on_a_terminal(command, folder)
    bars = [piece for piece in shown.split("\r") if piece.startswith("bar:") and "|" in piece]
    assert any("10/10" in bar and "loss " in bar and "tokens/s" in bar for bar in bars), shown
    assert max(len(line) for piece in shown.split("\r") for line in piece.split("\n")) <= 80
    assert "grad norm" not in shown  # the step lines are in the file
    assert "step 10: held out, N=2: loss " in shown and "accuracy at depth 1 to 2: " in shown
    end = [line.split() for line in shown.split("done in ")[1].replace("\r", "").splitlines()]
    assert [line[0] for line in end[1:]] == ["loss", "held", "speed", "files", "next"]
    assert end[-1] == ["next", "powernap", "eval", "bar"]
    log = (folder / "runs" / "bar" / "logs" / "train.log").read_text()
    assert log.count("grad norm") == 3 and "held out, N=2" in log and "\x1b" not in log


def test_a_diverged_run_stops_with_one_line_and_is_marked_failed(folder):
    from mlflow import MlflowClient

    result = runs.warm_powernap(
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


def test_what_slows_a_run_on_gpus_is_said(monkeypatch):
    recipe = load_recipe("depo", ["train.precision=fp32"])
    fast = load_recipe("depo", ["train.precision=bf16"])
    place = SimpleNamespace(device=torch.device("cuda", 0), world_size=8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    precision, gloo = slow_on_gpus(recipe, place)
    assert "fp32" in precision and "8 ranks talk by gloo" in gloo and "see 1 of its GPUs" in gloo
    assert slow_on_gpus(fast, SimpleNamespace(device=torch.device("cuda", 0), world_size=1)) == []
    assert slow_on_gpus(recipe, SimpleNamespace(device=torch.device("cpu"), world_size=8)) == []


def test_held_out_results_have_a_line_for_each_n_set_and_length():
    record = {
        "loss": 1.0, "held_out_loss/N2": 1.25, "held_out_loss/N2/window_0": 1.0, "held_out_loss/N4": 0.5,
        "accuracy/N2/depth_1": 0.75, "accuracy/N2/depth_16": 0.5, "accuracy/N2/web/windows_16/depth_3": 0.125,
    }  # fmt: skip
    assert held_out(record) == [
        "held out, N=2: loss 1.2500, accuracy at depth 1 to 16: 0.75 0.50",
        "held out, N=4: loss 0.5000",
        "held out, N=2, web, windows 16: accuracy at depth 3: 0.12",
    ]
    assert held_out({"loss": 1.0}) == []


def test_the_summary_is_of_the_last_tenth_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", ["train.steps=50", "run.name=mine"])
    gpus = SimpleNamespace(device=torch.device("cuda", 0), world_size=4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    summary, on_gpus = Summary(recipe, recipe.run_folder, ONE), Summary(recipe, recipe.run_folder, gpus)
    for step in range(1, 51):
        record = {"loss": 9.0 if step <= 45 else 2.0 + step / 100, "tokens": 300, "seconds": 0.5, "flops": 989e12}
        if step == 40:
            record["held_out_loss/N4"] = 3.0
        summary.add(record)
        on_gpus.add(record)
    assert summary.lines(3675) == [
        "done in 1:01:15",
        "loss     2.4800, the mean of the last 5 steps",
        "         held out, N=4: loss 3.0000",
        "speed    600 tokens/s",
        "files    runs/mine: checkpoints, metrics.jsonl, logs",
        "next     powernap eval mine",
    ]
    assert "600 tokens/s, 50% of the GPUs' peak" in on_gpus.lines(1)[3]
    other = load_recipe("text", ["run.name=b", "run.root=an out", "data.test=null"])
    assert Summary(other, other.run_folder.absolute(), ONE).lines(1) == [
        "done in 0:01",
        "files    an out/b: checkpoints, metrics.jsonl, logs",
        "next     powernap generate 'an out/b'",
    ]
