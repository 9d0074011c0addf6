"""Exit codes of `powernap train`, for schedulers and scripts, and which ones allow a restart. README.md lists them."""

from typing import Literal

FAILED = 1  # such as a lost rank: restart with --resume
WRONG_USE = 2  # of the command or of a recipe: a restart will not help
HUNG = 70  # a rank waited longer than parallel.timeout_seconds (EX_SOFTWARE)
PREEMPTED = 75  # asked to stop (SIGTERM, SIGUSR1, SIGHUP), checkpoint written: restart with --resume (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C

FATAL = (WRONG_USE, INTERRUPTED)
RestartPolicy = Literal["done", "again", "retry", "fatal"]


def restart_policy(code: int) -> RestartPolicy:
    """What a scheduler does after this exit code.

    again: restart, not counted; retry: restart up to job.retries times; fatal: a restart would not help.
    slurm.py and kubernetes.py in launch/jobs/backends/ implement the same in their own terms.
    """
    if code == 0:
        return "done"
    if code == PREEMPTED:
        return "again"
    return "fatal" if code in FATAL else "retry"
