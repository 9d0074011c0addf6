"""The table of `powernap status`."""

from powernap.launch.jobs.status import Progress, Row, Status, as_table


def test_a_run_whose_folder_is_elsewhere_shows_no_step():
    rows = [
        Row("far", "kubernetes", "far-1", 1, Status("succeeded"), Progress(), 60),
        Row("near", "local", "7", 1, Status("running", restarts=1), Progress(3, 0.51237), 60),
    ]
    heads, far, near = (line.split() for line in as_table(rows))
    assert heads == ["run", "job", "state", "step", "loss", "restarts", "reason"]
    assert far == ["far", "far-1", "succeeded", "-/60", "-", "0"]
    assert near == ["near", "7", "running", "3/60", "0.5124", "1"]
