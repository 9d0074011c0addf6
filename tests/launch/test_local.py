"""Which of several ranks that failed is the cause."""

from types import SimpleNamespace

import pytest

from powernap.launch import local
from powernap.parallel import exit_codes


@pytest.mark.parametrize(
    ("exit_codes_and_times", "cause"),
    [
        ([(exit_codes.FAILED, 10), (-9, 10)], 1),  # torchrun knows seconds, and looks five times in one
        ([(exit_codes.FAILED, 10), (exit_codes.FAILED, 9)], 1),
        ([(exit_codes.WRONG_USE, 10), (-6, 10)], 0),
    ],
)
def test_the_cause_is_not_a_rank_that_left_because_another_was_gone(exit_codes_and_times, cause):
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in enumerate(exit_codes_and_times)
    }
    assert local._cause(SimpleNamespace(failures=failures)) == (cause, failures[cause])
