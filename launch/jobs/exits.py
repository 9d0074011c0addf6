"""What the exit code of `powernap train` means for starting it again. slurm.py and kubernetes.py say the same in their own terms."""

from typing import Literal

from powernap.parallel import exit_codes

HOPELESS = (exit_codes.WRONG_USE, exit_codes.INTERRUPTED)
Verdict = Literal["done", "again", "retry", "hopeless"]


def verdict(code: int) -> Verdict:
    """again: start it again without counting; retry: start it again while job.retries last."""
    if code == 0:
        return "done"
    if code == exit_codes.PREEMPTED:
        return "again"
    return "hopeless" if code in HOPELESS else "retry"
