"""The process behind a job on this machine: python -m powernap.launch.jobs.backends.supervisor FOLDER.

It runs the command of FOLDER/local.yaml until that succeeds, fails fatally or too often, or is cancelled.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from powernap.launch.jobs.job import JobFolder
from powernap.launch.jobs.secret_values import read_secret_file
from powernap.parallel.liveness.exit_codes import restart_policy
from powernap.parallel.liveness.parent import not_to_outlive_this
from powernap.train.run.lock import RUN_LOCK, ProcessLock
from powernap.train.run.provenance import LOCAL_JOB

LOCK = "supervisor.lock"
MACHINE_LOCK = "local.lock"  # in the folder of all runs: one job runs at a time


def is_supervised(folder: Path) -> bool:
    """Whether a job's supervisor is alive."""
    lock = ProcessLock(folder / LOCK)
    if free := lock.acquire():
        lock.release()
    return not free


class Supervisor:
    def __init__(self, folder: Path) -> None:
        self._folder = JobFolder(folder)
        self._plan = yaml.safe_load((folder / "local.yaml").read_text())
        self._state = {
            "submission_id": self._plan["submission_id"],
            "pid": os.getpid(),
            "restarts": 0,
            "exit_code": None,
            "reason": "",
        }
        self._child: subprocess.Popen | None = None
        self._killer: threading.Timer | None = None

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a job outlives the terminal, and so does its run
        if not self._wait_for_turn():
            return self._write("cancelled", "cancelled")
        failures = 0
        while True:
            self._write("running")
            code = self._start()
            if self._cancelled:
                return self._write("cancelled", "cancelled", code)
            match restart_policy(code):
                case "done":
                    return self._write("succeeded", "", code)
                case "fatal":
                    return self._write("failed", f"exit code {code}: a restart would not help", code)
                case "retry":
                    failures += 1
                    if failures > self._plan["retries"]:
                        return self._write("failed", f"exit code {code} after {failures} failed starts", code)
            self._wait_for_ranks()
            if self._cancelled:
                return self._write("cancelled", "cancelled", code)
            print(f"powernap: ended with exit code {code}: restarting", flush=True)
            self._state["restarts"] += 1

    def _wait_for_turn(self) -> bool:
        """Wait for the machine's other jobs: they would share its GPUs. False if cancelled meanwhile."""
        root = self._folder.path.parent.parent.parent
        self._machine_lock = ProcessLock(root / MACHINE_LOCK)
        while not self._machine_lock.acquire():
            if self._cancelled:
                return False
            self._write("pending", "another job on this machine is running")
            time.sleep(0.5)
        return True

    def _start(self) -> int:
        """Run the command once; return its exit code, 128 + N if signal N ended it."""
        secrets = {name: read_secret_file(name, file) for name, file in self._plan["secrets"].items() if file}
        # The run must end with its supervisor: nothing else would restart it.
        own = {LOCAL_JOB: str(os.getpid())}
        environment = os.environ | own | self._plan["env"] | secrets | not_to_outlive_this()
        self._child = subprocess.Popen(self._plan["command"], env=environment, stdin=subprocess.DEVNULL)
        if self._cancelled:  # before there was a child to terminate
            self._end()
        code = self._child.wait()
        if self._killer:
            self._killer.cancel()
        return code if code >= 0 else 128 - code

    @property
    def _cancelled(self) -> bool:
        return self._folder.cancelled.exists()

    def _end(self, *_: object) -> None:
        """Signal handler: have the run save and end within job.grace."""
        self._folder.cancelled.touch()
        if self._child is None or self._killer:
            return
        self._write("stopping")
        self._child.terminate()
        self._killer = threading.Timer(self._plan["grace_seconds"], self._kill)
        self._killer.start()

    def _kill(self) -> None:
        """Kill the run with its ranks."""
        assert self._child is not None
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._child.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _wait_for_ranks(self) -> None:
        """Ranks whose launcher was killed are still saving and hold the run's lock: a restart would be refused."""
        lock = ProcessLock(self._folder.path.parent.parent / RUN_LOCK)
        while not lock.acquire():
            time.sleep(0.1)
        lock.release()

    def _write(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        self._state |= {"state": state, "reason": reason, "exit_code": exit_code}
        path = self._folder.state
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self._state) + "\n")
        os.replace(part, path)


def main() -> None:
    folder = Path(sys.argv[1])
    lock = ProcessLock(folder / LOCK)
    if not lock.acquire():
        sys.exit(f"{folder} already has a supervisor")

    Supervisor(folder).run()


if __name__ == "__main__":
    main()
