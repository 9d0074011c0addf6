"""powernap commands in processes of their own: one after another on the terminal, or side by side, each with a log."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from powernap.launch.torchrun import forwarding
from powernap.parallel.liveness import exit_codes
from powernap.parallel.liveness.parent import not_to_outlive_this

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
EVERY = 0.5  # seconds between looks at the processes


def powernap(*arguments: str) -> None:
    """Print and run one powernap command. Exits with its code if it fails; it has printed its error."""
    print("$ powernap " + " ".join(arguments), flush=True)
    with forwarding(*SIGNALS):
        exit_code = _start(arguments, None).wait()
    _exit_unless(exit_code)


def powernap_side_by_side(
    commands: Mapping[str, Sequence[str]], logs: Path, jobs: int, progress: Callable[[], str]
) -> None:
    """Print and run commands, `jobs` at a time, with their output in logs/NAME.log.

    The first that fails ends the others, prints the end of its log and exits with its code.

    Args:
        commands: by name, the arguments of each.
        progress: a line that says how far they are; shown in place on a terminal, else every half minute.
    """
    for arguments in commands.values():
        print("$ powernap " + " ".join(arguments), flush=True)
    waiting, running, failed = list(commands), dict[str, subprocess.Popen[bytes]](), dict[str, int]()
    shown = _Progress(progress)
    with forwarding(*SIGNALS) as signals:
        while running or (waiting and not failed and not signals):
            if waiting and len(running) < jobs and not failed and not signals:
                name = waiting.pop(0)
                with open(logs / f"{name}.log", "ab") as log:
                    running[name] = _start(commands[name], log)
                continue
            time.sleep(EVERY)
            shown.show()
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if code := running.pop(name).returncode:
                    failed[name] = code
                    for process in running.values():
                        process.terminate()
    shown.end()
    for name, code in failed.items():
        if not signals:
            lines = (logs / f"{name}.log").read_text().strip().splitlines()
            print(lines[-1] if lines else f"{name}: exit code {code}, without a word", file=sys.stderr)
        _exit_unless(code)
    if signals and waiting:  # those that ran were done just then
        sys.exit(exit_codes.PREEMPTED)


class _Progress:
    """A line that is written over on a terminal, and seldom elsewhere."""

    def __init__(self, line: Callable[[], str]):
        self._line = line
        self._terminal = sys.stdout.isatty()
        self._last = time.monotonic()

    def show(self) -> None:
        if self._terminal:
            print(f"\r{self._line()[:79]:79}", end="", flush=True)
        elif time.monotonic() - self._last > 30:
            self._last = time.monotonic()
            print(self._line(), flush=True)

    def end(self) -> None:
        print(f"\r{self._line()[:79]:79}" if self._terminal else self._line(), flush=True)


def _start(arguments: Sequence[str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "powernap.launch.cli", *arguments],
        env=os.environ | not_to_outlive_this(),
        process_group=0,  # otherwise Ctrl-C would arrive twice, from the terminal and from here
        stdout=log,
        stderr=log,
    )


def _exit_unless(code: int) -> None:
    if code:
        sys.exit(code if code > 0 else 128 - code)
