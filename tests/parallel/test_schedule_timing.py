"""A step of the real pipeline, on the clock, against the plan: processes, messages, Megatron-core's schedule, sleeping stages.

Stages take 40 ms forward and 120 ms backward with recomputation. What a segment takes above that is the overhead of
Megatron-core's schedule, autograd and gloo: some milliseconds on two cores, which four processes share. The plan knows of
none, so a step is never faster.
"""

import pytest

from tests.helpers import fixed_cost
from tests.helpers.fixed_cost import Case, even
from tests.helpers.processes import in_processes

# On the clock: for a machine with nothing else to do, so not part of `make test`.
pytestmark = pytest.mark.wide

SECONDS = 0.04
STEPS = 3
CASES = {
    "P=2, no sleep: plain 1F1B": even((1,), 2, 2, SECONDS),
    "P=2, W=1, N=2": even((2, 1), 2, 2, SECONDS),
    "P=2, W=2, N=2, no recomputation": even((2, 2, 1), 2, 2, SECONDS, recompute="none", backward_over_forward=3.0),
    "P=4, W=1, N=2": even((2, 1), 4, 4, SECONDS),
    "P=3, uneven stages, short last passes": Case(
        (2, 1), 3, tuple((scale * SECONDS, 0.5 * scale * SECONDS, scale * SECONDS) for scale in (0.6, 1.0, 0.8))
    ),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Seconds of the fastest step, as its slowest process sees it: whatever else runs here only makes a step slower."""
    ranks = in_processes(
        fixed_cost.time_steps, max(case.stages for case in CASES.values()), list(CASES.values()), STEPS
    )
    by_case = zip(*ranks, strict=True)
    return {
        name: min(map(max, zip(*(steps for steps in by_rank if steps), strict=True)))
        for name, by_rank in zip(CASES, by_case, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_step_time_is_the_plans(measured, name):
    assert 1.0 <= measured[name] / CASES[name].plan().total < 1.05


@pytest.mark.parametrize("name", CASES)
def test_measurement_sees_the_bubble(measured, name):
    """The bound above is tight enough: work alone, without any waiting, does not explain the time."""
    plan = CASES[name].plan()
    assert measured[name] / ((1 - plan.bubble) * plan.total) > 1.05
