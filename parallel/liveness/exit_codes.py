"""Exit codes of `powernap train`, for schedulers and scripts, and which ones allow a restart. README.md lists them."""

from typing import Literal

FAILED = 1  # such as a lost rank: restart with --resume
WRONG_USE = 2  # of the command or of a recipe: a restart will not help
HUNG = 70  # a rank waited longer than parallel.timeout_seconds (EX_SOFTWARE)
PREEMPTED = 75  # asked to stop (SIGTERM, SIGUSR1, SIGHUP), checkpoint written: restart with --resume (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C

HOPELESS = (WRONG_USE, INTERRUPTED)
Verdict = Literal["done", "again", "retry", "hopeless"]


def verdict(code: int) -> Verdict:
    """again: restart without counting; retry: restart while job.retries last.

    slurm.py and kubernetes.py in launch/jobs/backends/ express the same in their schedulers' terms.
    """
    if code == 0:
        return "done"
    if code == PREEMPTED:
        return "again"
    return "hopeless" if code in HOPELESS else "retry"
