"""`powernap compare`: equal means equal to the last bit, and a difference is named by metric and step."""

import math

import pytest

from powernap.train.report.compare import compare
from powernap.train.tracking.metrics import MetricsLog


def write(folder, losses, seconds=0.1):
    folder.mkdir()
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step, loss in enumerate(losses, start=1):
            log.write(step, loss=loss, grad_norm=1.0, lr=1e-3, tokens=64, seconds=seconds * step)
    return folder


def test_equal_runs_are_equal_whatever_the_clock_said(tmp_path):
    report, equal = compare(write(tmp_path / "a", [0.5, math.nan], 0.1), write(tmp_path / "b", [0.5, math.nan], 0.2))
    assert equal and report.endswith("equal to the digit")
    assert "seconds" not in report


def test_the_last_bit_counts(tmp_path):
    losses = [0.5, 0.25, 0.125]
    other = [0.5, math.nextafter(0.25, 1), 0.625]
    report, equal = compare(write(tmp_path / "a", losses), write(tmp_path / "b", other))
    assert not equal
    (line,) = [line for line in report.splitlines() if line.startswith("loss")]
    assert line.split() == ["loss", "step", "2", "0.5", "0.5"]
    assert "step 2: 0.25 and 0.25000000000000006" in report
    assert max(len(line) for line in report.splitlines() if "tmp" not in line and str(tmp_path) not in line) <= 80


def test_a_shorter_run_is_not_equal(tmp_path):
    report, equal = compare(write(tmp_path / "a", [0.5, 0.5]), write(tmp_path / "b", [0.5]))
    assert not equal and "steps 1 to 2" in report and "steps 1 to 1" in report


@pytest.mark.parametrize("losses", [[], [math.inf]])
def test_nothing_in_common_or_not_finite(tmp_path, losses):
    report, equal = compare(write(tmp_path / "a", losses), write(tmp_path / "b", [0.5]))
    assert not equal
    assert ("no step in common" in report) == (not losses)
    assert ("inf" in report) == bool(losses)


def test_a_metric_that_one_run_lacks_is_said_to_be_missing(tmp_path):
    """Not told as an infinite difference."""
    one, other = tmp_path / "a", tmp_path / "b"
    for folder, more in ((one, [{}, {"x": 1.0}, {"y": 2.0}]), (other, [{"x": 1.0}, {"x": 3.0}, {}])):
        folder.mkdir()
        with MetricsLog(folder / "metrics.jsonl") as log:
            for step, extra in enumerate(more, start=1):
                log.write(step, loss=0.5, grad_norm=1.0, lr=1e-3, tokens=64, seconds=0.1, **extra)
    report, equal = compare(one, other)
    assert not equal and "inf" not in report.replace(str(tmp_path), "")
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert f"x missing in {one} at 1 steps, first 1" in lines and f"y missing in {other}" in lines
    assert "x step 2 2 2" in lines and "loss equal" in lines
