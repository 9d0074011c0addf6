"""Runs that are killed, stopped and cut short at random moments, and must resume as if nothing had happened.

    python -m tests.helpers.chaos --trials 100 --seed 0

A trial trains a small model in a layout, injects a fault at a random moment, and resumes until the run is done; then
losses, sample fingerprints and weights must be those of an undisturbed run: to the last bit in the same layout, to
rounding if the run resumed in another one. One line is printed per trial.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from powernap.parallel.liveness.watchdog import JOINING

STEPS, EVERY = 16, 3
TIMEOUT = 8  # seconds, parallel.timeout_seconds
LEAVE = TIMEOUT + 12  # seconds until every rank but a frozen one must have exited
ROUNDING = 2e-4  # of a loss after up to 16 steps in another layout
LAYOUTS = {
    "DP2": ["parallel.data=2"],
    "DP2 ZeRO 3": ["parallel.data=2", "zero.stage=3"],
    "TP2": ["parallel.tensor=2"],
    "PP2": ["parallel.pipeline=2"],
    "DP3": ["parallel.data=3"],
    "TP2xPP2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "PP2xDP2": ["parallel.pipeline=2", "parallel.data=2"],
}
FAULTS = ("SIGKILL", "SIGKILL during save", "SIGTERM", "SIGUSR1", "SIGSTOP", "SIGKILL, then a file cut short",
          "SIGKILL, then a bit flipped", "SIGKILL, then a file lost", "SIGHUP", "SIGKILL of the launcher")  # fmt: skip
LAUNCHER = FAULTS[-1]


class Failed(AssertionError):
    """A trial with a wrong outcome."""


@dataclass(frozen=True)
class Trial:
    """A fault and its moment; a function of number and seed."""

    number: int
    layout: str
    fault: str
    rank: int
    step: int  # the fault comes when this one is done; 0: while the run starts
    delay: float  # seconds later
    then: str  # the layout to resume in
    by_command: bool  # `powernap train` starts the processes, torchrun inside

    @classmethod
    def draw(cls, seed: int, number: int) -> "Trial":
        chance = random.Random(f"{seed}/{number}")
        layout = chance.choice(list(LAYOUTS))
        fault = FAULTS[number % len(FAULTS)]
        trial = cls(
            number,
            layout,
            fault,
            chance.randrange(size(layout)),
            chance.randrange(1, STEPS - 1),
            chance.uniform(0, 0.15),
            chance.choice(list(LAYOUTS)) if chance.random() < 0.3 else layout,
            chance.random() < 0.1 or fault == LAUNCHER,
        )
        if (not trial.by_command or fault == LAUNCHER) and chance.random() < 0.1:
            return replace(trial, step=0, delay=chance.uniform(0, 3))
        return trial

    def describe(self) -> str:
        who = "powernap train" if self.by_command else f"rank {self.rank}"
        what = self.fault if self.fault == LAUNCHER else f"{self.fault} to {who}"
        then = f", goes on as {self.then}" if self.then != self.layout else ""
        when = f"after step {self.step}" if self.step else f"{self.delay:.1f} s after its start"
        return f"{self.layout}: {what} {when}{then}"


def size(layout: str) -> int:
    return math.prod(int(field.split("=")[1]) for field in LAYOUTS[layout] if field.startswith("parallel"))


class Chaos:
    """Trials in one folder, against one unbroken run per layout."""

    def __init__(self, folder: Path, seed: int):
        import torch

        from powernap.train.tracking import tracker  # noqa: F401  once, for all processes forked from this one
        from tests.helpers import runs

        torch.set_num_threads(1)
        self.folder, self.seed = folder, seed
        self._starts = itertools.count()
        self._orphans: list[psutil.Process] = []  # ranks whose launcher was killed
        sections = {
            "train": {"steps": STEPS, "global_batch_size": 12, "log_every": 5},
            "checkpoint": {"every": EVERY, "keep_last": 2},
            "parallel": {"timeout_seconds": TIMEOUT},
            "data": {"test": None},
            "model": {"vocab_size": 16},
        }
        runs.prepare(folder, **sections)
        self._unbroken: dict[str, tuple[list[dict], dict]] = {}

    def run(self, number: int) -> str:
        """Run one trial; return what happened, in a line. Raises Failed."""
        trial = Trial.draw(self.seed, number)
        name = f"trial-{number}"
        run_folder = self.folder / "runs" / name
        start = self._start_by_command if trial.by_command else self._start
        processes = start(name, trial.layout, [])
        try:
            happened = self._interfere(trial, run_folder, processes)
            codes = self._wait(trial, processes)
            self._wait_for_orphans(trial)
        finally:
            _end_all(processes)
        self._check_codes(trial, codes)
        starts = 1
        resumed_at = "done already"
        if any(code != 0 for code in codes):
            if list((run_folder / "checkpoints").glob("*.tmp")):
                happened += ", cut a write short"
            self._damage(trial, run_folder)
            resume = ["--resume"] if (run_folder / "config.yaml").is_file() else []
            codes = self._wait(None, self._start(name, trial.then, resume), 120)
            if any(codes):
                raise Failed(f"did not resume: exit codes {codes}; see {run_folder / 'logs' / 'train.log'}")
            starts += 1
            log = (run_folder / "logs" / "train.log").read_text()
            resumed_at = "from the start"
            if "resumed after" in log:
                resumed_at = f"after step {log.split('resumed after step ')[-1].split()[0]}"
                passed = log.count("passed over a checkpoint")
                resumed_at += f", passed over {passed} checkpoint" if passed else ""
        self._compare(trial, run_folder)
        shutil.rmtree(run_folder)
        return f"{trial.describe()}: {happened}; resumed {resumed_at}; equal"

    def _start(self, name: str, layout: str, options: list[str]) -> list[psutil.Process]:
        """The ranks of a run, forked: importing the libraries takes longer than a trial."""
        arguments = ["train", "tiny.yaml", f"run.name={name}", *LAYOUTS[layout], *options]
        name, ranks, processes = f"{self.folder.name}.{next(self._starts)}", size(layout), []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os._exit(self._be_rank(rank, ranks, name, arguments))
            processes.append(psutil.Process(pid))
        return processes

    def _be_rank(self, rank: int, ranks: int, name: str, arguments: list[str]) -> int:
        os.chdir(self.folder)
        output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "POWERNAP_RENDEZVOUS": name, "MLFLOW_TRACKING_URI": "",
        }  # fmt: skip
        from powernap.launch import cli

        try:
            return cli.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _start_by_command(self, name: str, layout: str, options: list[str]) -> list[psutil.Process]:
        command = [sys.executable, "-m", "powernap.launch.cli", "train", "tiny.yaml", f"run.name={name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
        with (self.folder / "output.txt").open("a") as output:
            process = subprocess.Popen(
                [*command, *LAYOUTS[layout], *options], cwd=self.folder, env=environment, stdout=output, stderr=output
            )
        return [psutil.Process(process.pid)]

    def _interfere(self, trial: Trial, run_folder: Path, processes: list[psutil.Process]) -> str:
        """Wait for the moment and inject the fault; return what happened."""
        metrics = run_folder / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while trial.step and (not metrics.exists() or metrics.read_bytes().count(b"\n") < trial.step):
            if time.monotonic() > deadline or not all(process.is_running() for process in processes):
                raise Failed("did not come to its step")
            time.sleep(0.002)
        if trial.fault == "SIGKILL during save" and trial.step:
            while not list((run_folder / "checkpoints").glob("*.tmp")) and time.monotonic() < deadline:
                if metrics.read_bytes().count(b"\n") == STEPS:
                    break
        else:
            time.sleep(trial.delay)
        victim = processes[0 if trial.by_command else trial.rank]
        if trial.fault == LAUNCHER:
            self._orphans = victim.children(recursive=True)
        elif trial.by_command and ("SIGKILL" in trial.fault or trial.fault == "SIGSTOP"):
            victim = victim.children()[trial.rank]  # a rank: killing the launcher kills no rank
        try:
            victim.send_signal(getattr(signal, trial.fault.split()[0].strip(",")))
        except psutil.NoSuchProcess:
            return "was done already"
        last = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return f"came during step {last + 1}" if last else "came before step 1 was done"

    def _wait(self, trial: Trial | None, processes: list[psutil.Process], limit: float = LEAVE) -> list[int]:
        """Exit codes of all; a frozen rank is killed when the others have exited."""
        frozen = trial.rank if trial and trial.fault == "SIGSTOP" and not trial.by_command else None
        if trial and trial.by_command:
            limit += 35  # torchrun gives remaining processes, such as a frozen one, 30 s
        if trial and not trial.step:
            limit += JOINING - TIMEOUT
        deadline = time.monotonic() + limit
        codes: dict[int, int] = {}
        order = [i for i in range(len(processes)) if i != frozen] + ([frozen] if frozen is not None else [])
        for index in order:
            if index == frozen:
                processes[index].kill()
            while True:
                pid, status = os.waitpid(processes[index].pid, os.WNOHANG)
                if pid:
                    codes[index] = os.waitstatus_to_exitcode(status)
                    break
                if time.monotonic() > deadline:
                    _end_all(processes)
                    raise Failed(f"rank {index} had not left after {limit} s")
                time.sleep(0.01)
        return [codes[index] for index in range(len(processes))]

    def _wait_for_orphans(self, trial: Trial) -> None:
        _, left = psutil.wait_procs(self._orphans, LEAVE if trial.step else LEAVE + JOINING)
        self._orphans = []
        if left:
            _end_all(left)
            raise Failed(f"{len(left)} processes outlived their launcher")

    def _check_codes(self, trial: Trial, codes: list[int]) -> None:
        if all(code == 0 for code in codes):
            return  # it was over before it began
        asked = trial.fault in ("SIGTERM", "SIGUSR1", "SIGHUP")
        if asked and any(code != 75 for code in codes):
            raise Failed(f"exit codes {codes}, asked to stop: all must be 75")
        if not asked and any(code in (0, 75) for code in codes):
            raise Failed(f"exit codes {codes}: a rank took what happened for a good end")

    def _damage(self, trial: Trial, run_folder: Path) -> None:
        """Damage the newest checkpoint, if there is another one."""
        checkpoints = sorted((run_folder / "checkpoints").glob("step_????????"))
        if ", then" not in trial.fault or len(checkpoints) < 2:
            return
        chance = random.Random(f"damage {self.seed}/{trial.number}")
        file = chance.choice(sorted(checkpoints[-1].iterdir()))
        data = bytearray(file.read_bytes())
        if "lost" in trial.fault:
            file.unlink()
        elif "cut" in trial.fault:
            file.write_bytes(data[: chance.randrange(len(data))])
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)

    def _compare(self, trial: Trial, run_folder: Path) -> None:
        expected, expected_weights = self._answer(trial.layout)
        found = _lines(run_folder)
        if [line["step"] for line in found] != list(range(1, STEPS + 1)):
            raise Failed(f"steps {[line['step'] for line in found]}")
        if [line["samples"] for line in found] != [line["samples"] for line in expected]:
            raise Failed("other samples, or in another order")
        own = _weights(run_folder)
        if trial.then == trial.layout:
            if [line["loss"] for line in found] != [line["loss"] for line in expected]:
                raise Failed("other losses")
            if any((own[name] != weight).any() for name, weight in expected_weights.items()):
                raise Failed("other weights")
            return
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))
        if not worst < ROUNDING:
            raise Failed(f"a loss differs by {worst:.1e}")
        worst = max((own[name] - weight).abs().max().item() for name, weight in expected_weights.items())
        if not worst < 100 * ROUNDING:
            raise Failed(f"a weight differs by {worst:.1e}")

    def _answer(self, layout: str) -> tuple[list[dict], dict]:
        if layout not in self._unbroken:
            name = f"unbroken-{layout.replace(' ', '-')}"
            codes = self._wait(None, self._start(name, layout, []), 120)
            if any(codes):
                raise Failed(f"the unbroken run ended with {codes}")
            run_folder = self.folder / "runs" / name
            self._unbroken[layout] = (_lines(run_folder), _weights(run_folder))
        return self._unbroken[layout]


def _end_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for child in process.children():
                child.kill()
            process.kill()


def _lines(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _weights(run_folder: Path) -> dict:
    from tests.helpers import runs

    return runs.weights(run_folder, STEPS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--numbers", help="these trials alone, such as 3,17")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    numbers = [int(number) for number in options.numbers.split(",")] if options.numbers else range(options.trials)
    start, failed = time.monotonic(), 0
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(folder, options.seed)
    for number in numbers:
        began = time.monotonic()
        try:
            told = chaos.run(number)
            print(f"{number:3} ok {time.monotonic() - began:4.0f} s  {told}", flush=True)
        except Failed as error:
            failed += 1
            print(f"{number:3} FAILED  {Trial.draw(options.seed, number).describe()}: {error}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(numbers) - failed} of {len(numbers)} trials in {seconds:.0f} s, seed {options.seed}")
    if not failed:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
