"""How `powernap train` ends, for schedulers and scripts, and what it means for starting it again. README.md lists them."""

from typing import Literal

FAILED = 1  # such as a rank that went away: start again with --resume
WRONG_USE = 2  # of the command or of a recipe: starting it again will not help
HUNG = 70  # a rank waited longer than parallel.timeout_seconds (EX_SOFTWARE)
PREEMPTED = 75  # asked to stop (SIGTERM, SIGUSR1, SIGHUP), checkpoint written: start again with --resume (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C

HOPELESS = (WRONG_USE, INTERRUPTED)
Verdict = Literal["done", "again", "retry", "hopeless"]


def verdict(code: int) -> Verdict:
    """again: start it again without counting; retry: start it again while job.retries last.

    slurm.py and kubernetes.py in launch/jobs/backends/ say the same in their own terms.
    """
    if code == 0:
        return "done"
    if code == PREEMPTED:
        return "again"
    return "hopeless" if code in HOPELESS else "retry"
