"""Runs that are asked to stop, lose a rank, find their checkpoints broken: real processes, real signals."""

import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial

import psutil
import pytest

from powernap.parallel.checkpoint.manifest import checkpoints, newest_valid, read_manifest
from powernap.parallel.liveness import exit_codes
from powernap.train.run.lock import ProcessLock
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.disks import small_disk

pytestmark = pytest.mark.faults

LONG = ["train.steps=100000", "optimizer.warmup_steps=2", "checkpoint.every=100000", "evaluation.every=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    runs.prepare(folder, parallel={"timeout_seconds": 20})
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """One process, ten steps; what went on elsewhere from its fifth step has these losses."""
    return runs.train_in_turn(folder, 1, {"one": []})["one"]


STARTED: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    """A run of a test that failed would train for ever."""
    yield
    while STARTED:
        with suppress(psutil.NoSuchProcess):
            launcher = STARTED.pop()
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()


def start(folder, name, *overrides, watch=None, launcher=None, **options):
    """The command, when its run has come to its third step; by default a warm one, without children."""
    command = [*(launcher or runs.warm_command()), "train", "tiny.yaml", f"run.name={name}", *LONG, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    options = {"stderr": subprocess.PIPE, "start_new_session": True} | options
    process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)
    STARTED.append(psutil.Process(process.pid))
    metrics = (watch or folder / "runs" / name) / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def end(process, timeout=60):
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def test_sigterm_to_the_command_stops_all_ranks_after_a_step_with_a_checkpoint(folder):
    process = start(folder, "asked", "parallel.data=2", "data.workers=1", launcher=runs.COMMAND)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: launcher, ranks and readers
    code, errors = end(process)
    assert code == exit_codes.PREEMPTED == 75, errors
    assert "Traceback" not in errors
    (checkpoint,) = checkpoints(folder / "runs" / "asked" / "checkpoints")
    step = read_manifest(checkpoint)["step"]
    assert [line["step"] for line in read_metrics(folder / "runs" / "asked" / "metrics.jsonl")] == list(
        range(1, step + 1)
    )
    assert f"asked to stop: stopped after step {step} of 100000; continue with --resume" in errors
    resumed = runs.warm_powernap(
        "train", "tiny.yaml", "run.name=asked", *LONG[1:], f"train.steps={2 * step}", "--resume", cwd=folder
    )
    assert resumed.returncode == 0, resumed.stderr  # the plateau ends earlier now: the steps done are as they were
    done = read_metrics(folder / "runs" / "asked" / "metrics.jsonl")
    assert [line["step"] for line in done] == list(range(1, 2 * step + 1))


@pytest.mark.parametrize(("name", "number"), [("usr1", signal.SIGUSR1), ("hup", signal.SIGHUP)])
def test_a_signal_to_one_rank_is_enough(folder, name, number):
    process = start(folder, name, "parallel.pipeline=2")
    runs.rank_of(f"run.name={name}", 1).send_signal(number)
    code, errors = end(process)
    assert code == 75, errors
    assert len(checkpoints(folder / "runs" / name / "checkpoints")) == 1


def test_sighup_to_the_command_stops_all_ranks(folder):
    process = start(folder, "hung-up", "parallel.data=2")
    process.send_signal(signal.SIGHUP)
    code, errors = end(process)
    assert code == 75, errors
    assert len(checkpoints(folder / "runs" / "hung-up" / "checkpoints")) == 1


def test_a_terminal_that_closes_costs_nothing(folder):
    """Its processes get SIGHUP, and cannot write to it any more."""
    terminal, end_of_it = pty.openpty()
    take_over = partial(fcntl.ioctl, end_of_it, termios.TIOCSCTTY, 0)
    streams = {"stderr": end_of_it, "stdout": end_of_it}
    process = start(folder, "closed", "data.workers=1", launcher=runs.COMMAND, preexec_fn=take_over, **streams)
    os.close(end_of_it)
    os.close(terminal)
    assert process.wait(60) == 75
    (checkpoint,) = checkpoints(folder / "runs" / "closed" / "checkpoints")
    log = (folder / "runs" / "closed" / "logs" / "train.log").read_text()
    assert f"stopped after step {read_manifest(checkpoint)['step']} of" in log and "ERROR" not in log


def test_what_nohup_and_a_script_have_ignored_stays_ignored(folder):
    ignored = signal.SIGHUP, signal.SIGINT

    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    options = {"launcher": runs.COMMAND, "preexec_fn": ignore}
    process = start(folder, "nohup", "parallel.data=2", "data.workers=1", **options)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        for number in ignored:
            member.send_signal(number)
    metrics = folder / "runs" / "nohup" / "metrics.jsonl"
    before = len(read_metrics(metrics))
    runs.wait_for(lambda: process.poll() is not None or len(read_metrics(metrics)) > before + 5)
    assert process.poll() is None and all(member.is_running() for member in family)
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 75, errors


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(runs.COMMAND, id="powernap"),
        pytest.param([*TORCHRUN, "-m", "powernap.launch.cli"], id="torchrun", marks=pytest.mark.wide),
    ],
)
def test_ranks_whose_launcher_was_killed_save_and_leave(folder, launcher):
    name = "orphans" if launcher == runs.COMMAND else "torchrun-orphans"
    process = start(folder, name, "parallel.data=2", "data.workers=2", launcher=launcher)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4  # two ranks and their readers
    process.kill()
    assert not psutil.wait_procs(family, 60)[1]
    assert f"process {process.pid}, which started this one, is gone: stopping" in process.communicate()[1]
    run = folder / "runs" / name
    (checkpoint,) = checkpoints(run / "checkpoints")
    assert read_manifest(checkpoint)["step"] == len(read_metrics(run / "metrics.jsonl"))
    assert ProcessLock(run / "lock").acquire()


def test_copies_of_a_signal_do_not_hurry_it(folder):
    process = start(folder, "copies")
    for _ in range(6):
        process.send_signal(signal.SIGTERM)  # launchers pass on what their processes got already
        time.sleep(0.05)
    code, errors = end(process)
    assert code == 75, errors


def test_a_run_that_is_training_is_not_started_again(folder):
    process = start(folder, "twice")
    second = runs.warm_powernap("train", "tiny.yaml", "run.name=twice", *LONG, "--resume", cwd=folder)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    runs.assert_one_line(second, "runs/twice: another process is training this run")


def test_a_killed_rank_is_named_and_nothing_is_left_running(folder):
    process = start(folder, "killed", "parallel.data=2")
    ranks = [runs.rank_of("run.name=killed", rank) for rank in (0, 1)]
    ranks[1].kill()
    code, errors = end(process)
    assert code not in (0, 75)
    assert "rank 1 was ended by SIGKILL; continue with --resume" in errors or "another rank is gone" in errors
    assert "step" in errors
    assert not any(rank.is_running() for rank in ranks)


def test_resuming_passes_over_a_broken_checkpoint_and_says_why(folder, trained):
    again = shutil.copytree(trained, folder / "again" / "one")
    (again / "checkpoints" / "step_00000010" / "rank-00000.safetensors").write_bytes(b"x")
    runs.train_in_turn(folder, 1, {"one": ["run.root=again", "--resume"]})
    log = (again / "logs" / "train.log").read_text()
    assert (
        "passed over a checkpoint: again/one/checkpoints/step_00000010/rank-00000.safetensors: 1 bytes in place" in log
    )
    assert "resumed after step 5 of 10" in log
    a, b = (read_metrics(run / "metrics.jsonl") for run in (trained, again))
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert [line["samples"] for line in a] == [line["samples"] for line in b]


def test_no_whole_checkpoint_is_no_fresh_start(folder, trained):
    broken = shutil.copytree(trained, folder / "broken" / "one")
    for checkpoint in checkpoints(broken / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    result = runs.warm_powernap("train", "tiny.yaml", "run.name=one", "run.root=broken", "--resume", cwd=folder)
    runs.assert_one_line(result, "no checkpoint of broken/one is whole", "manifest.json: missing", "start a new run")


@pytest.fixture
def disk(folder):
    with small_disk(folder / "small") as place:
        yield place


def test_a_disk_that_fills_costs_the_steps_since_the_last_checkpoint(folder, trained, disk):
    process = start(
        folder, "full", "run.root=small", "checkpoint.every=2", "checkpoint.keep_last=1", watch=disk / "full"
    )
    deadline = time.monotonic() + 30
    while not checkpoints(disk / "full" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(OSError), (disk / "others").open("wb") as others:
        while True:
            others.write(bytes(4096))
            others.flush()
    code, errors = end(process)
    assert code not in (0, 75) and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("powernap: error: ")]
    assert "small/full" in line and ("No space left" in line or "bytes needed" in line)
    whole, content, _ = newest_valid(checkpoints(disk / "full" / "checkpoints"))
    assert whole is not None
    (disk / "others").unlink()
    last = content["step"]
    process = start(folder, "full", "run.root=small", "--resume", watch=disk / "full")
    while "resumed after" not in (disk / "full" / "logs" / "train.log").read_text() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, errors = end(process)
    assert code == 75 and f"resumed after step {last} of" in errors, errors


def test_a_run_folder_that_is_deleted_is_told_at_the_next_step_and_in_the_end(folder):
    process = start(folder, "deleted", "checkpoint.every=2")
    # In one step: deleting a tree in which a checkpoint is being written fails now and then.
    (folder / "runs" / "deleted").rename(folder / "thrown-away")
    code, errors = end(process)
    assert code == exit_codes.WRONG_USE and "Traceback" not in errors, errors
    assert "no checkpoint of step" in errors and "runs/deleted/checkpoints: gone" in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("powernap: error: ")]
    assert "3 checkpoints in a row could not be written" in line and "bytes needed there" in line
    assert not (folder / "runs" / "deleted").exists()


def test_a_run_cannot_start_on_a_read_only_disk(folder):
    with small_disk(folder / "fixed", "ro,size=4m"):
        result = runs.warm_powernap("train", "tiny.yaml", "run.root=fixed", cwd=folder)
    runs.assert_one_line(result, "Read-only file system", "fixed/tiny")


@pytest.fixture(scope="module")
def elsewhere(folder, trained):
    """The one-process run taken up after its fifth step in other layouts."""
    layouts = {"data": ["parallel.data=2", "zero.stage=3"], "pipeline": ["parallel.pipeline=2"]}
    for name, fields in layouts.items():
        copy = shutil.copytree(trained, folder / name / "one")
        shutil.rmtree(copy / "checkpoints" / "step_00000010")
        fields += ["run.name=one", f"run.root={name}", "--resume"]
    runs.train_in_turn(folder, 2, layouts)
    return [folder / name / "one" for name in layouts]


def test_a_run_goes_on_in_another_layout(trained, elsewhere):
    expected = read_metrics(trained / "metrics.jsonl")
    for run in elsewhere:
        found = read_metrics(run / "metrics.jsonl")
        assert [line["samples"] for line in found] == [line["samples"] for line in expected]
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
        weights = runs.weights(run)
        assert all((weights[n] - w).abs().max() < 1e-5 for n, w in runs.weights(trained).items())


def test_checkpoint_command(folder, trained, monkeypatch, capfd, topology):
    from powernap.launch import cli

    monkeypatch.chdir(folder)
    assert cli.main(["checkpoint", "inspect", "one"]) == 0
    listed = capfd.readouterr().out
    assert len(listed.splitlines()) == 4 and "DP1 TP1 PP1 ZeRO1" in listed
    assert max(map(len, listed.splitlines()[:3])) <= 80
    assert cli.main(["checkpoint", "inspect", "one", "--step", "5"]) == 0
    assert "22,964 numbers" in capfd.readouterr().out
    assert cli.main(["checkpoint", "verify", "one"]) == 0
    assert capfd.readouterr().out.count("whole") == 2
    assert cli.main(["checkpoint", "export", "one", "exported"]) == 0
    assert sorted(path.name for path in (folder / "exported").iterdir()) == ["config.json", "model.safetensors"]
    capfd.readouterr()
    prompt = ["--prompt", "1 2. 2 3. 3 4. 4 5. 5 6. 6 1. [hop 1]", "--max-tokens", "6"]
    said = []
    for model in ("one", "exported"):
        assert cli.main(["generate", model, *prompt]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] == said[1] and said[0].strip()
    runs.assert_refused(["checkpoint", "export", "one", "exported"], capfd, "exported exists", "new folder")
    runs.assert_refused(["checkpoint", "verify", "one", "--step", "6"], capfd, "none of step 6", "5, 10")
    copy = shutil.copytree(trained, folder / "runs" / "flipped")
    file = copy / "checkpoints" / "step_00000005" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert cli.main(["checkpoint", "verify", "flipped"]) == 1
    told = capfd.readouterr().out
    assert "step_00000005  BROKEN" in told and "step_00000010  whole" in told and str(file.relative_to(folder)) in told
