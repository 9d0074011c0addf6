"""SLURM's commands, and errors that name what to do if one is missing or does not answer."""

import os
import re
import subprocess
from pathlib import Path

from powernap.launch.jobs.backends.slurm_json import JobLine, parse_jobs
from powernap.launch.jobs.description import JobError, UnknownOutcomeError

ANSWERS_WITHIN = 60.0  # seconds; if the controller is down, sbatch fails after 9, scontrol after 18
# A job gets these variables of the submitting shell, and the secrets without a file in the profile.
PASSED = r"HOME|USER|LOGNAME|PATH|LANG|LC_\w+|SLURM_CONF|MLFLOW_\w+"


def call(*command: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run one of SLURM's commands. The job inherits its environment, which has none of the SBATCH_* option variables."""
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).is_file():
        raise JobError(f"SLURM_CONF={configuration}: no such file")
    environment = {name: value for name, value in os.environ.items() if re.fullmatch(PASSED, name)}
    try:
        return subprocess.run(
            command,
            env=environment | (more or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWERS_WITHIN,
        )
    except FileNotFoundError:
        raise JobError(f"SLURM's {command[0]} is not here: use a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UnknownOutcomeError(
            f"SLURM does not answer: {command[0]} took more than {ANSWERS_WITHIN:.0f} s"
        ) from None


def checked_call(*command: str) -> subprocess.CompletedProcess:
    done = call(*command)
    if done.returncode:
        raise JobError(f"SLURM does not answer: {last_error(done)}")
    return done


def jobs_of(text: str) -> list[JobLine]:
    try:
        return parse_jobs(text)
    except ValueError as error:
        raise JobError(f"SLURM's answer cannot be read: {error}") from None


def last_error(done: subprocess.CompletedProcess) -> str:
    """The last line that a command wrote to stderr."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return without_prefix(lines[-1])


def without_prefix(line: str) -> str:
    """An error without the name of the command before it."""
    return re.sub(r"^(\w+: )?((error|fatal): )?(Batch job submission failed: )?", "", line).strip()


def setting(name: str) -> str | None:
    """A value of SLURM's configuration."""
    match = re.search(rf"^{name}\s*=\s*(\S+)", call("scontrol", "show", "config").stdout, re.MULTILINE)
    return match[1] if match else None
