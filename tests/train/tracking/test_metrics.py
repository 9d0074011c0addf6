import json
import math

import pytest

from powernap.train.tracking.metrics import MetricsLog, read_metrics


def write(log, step, loss=0.5, **more):
    return log.write(step, loss=loss, grad_norm=1.0, lr=1e-3, tokens=64, seconds=0.1, **more)


def test_floats_come_back_to_the_last_bit(tmp_path):
    losses = [0.1 + 0.2, math.nextafter(1.0, 2.0), 5e-324, 1e308]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step, loss in enumerate(losses, start=1):
            write(log, step, loss)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["loss"] for record in records] == losses
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert list(records[0]) == ["step", "loss", "grad_norm", "lr", "tokens", "seconds"]


def test_a_line_is_there_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    record = write(log, 1, passes=[1, 4])
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]  # not closed yet
    log.close()


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        write(log, 1, math.nan, health={"norms": [math.inf, -math.inf, 1.0]})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] == "NaN"
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert record["health"]["norms"] == [math.inf, -math.inf, 1.0]


def test_resuming_cuts_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            write(log, step)
    kept = "".join(path.read_text().splitlines(keepends=True)[:4])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a crash in the middle of a line
    with MetricsLog(path, resume_step=4) as log:
        assert path.read_text() == kept
        write(log, 5, loss=0.25)
    assert [(record["step"], record["loss"]) for record in read_metrics(path)][3:] == [(4, 0.5), (5, 0.25)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_restores_a_missing_last_line_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsLog(path, resume_step=2) as log:
        write(log, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_run_that_starts_over_keeps_nothing_and_needs_no_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):  # the first time there is no file
        with MetricsLog(path, resume_step=0) as log:
            write(log, 1)
        assert len(read_metrics(path)) == 1


def test_a_new_run_never_overwrites_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: holds the metrics of an earlier run"):
        MetricsLog(path)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("garbage", ["hello", "[1, 2]", '{"loss": 1.0}', '{"step": 1.5}', "", "\x00\x00"])
def test_garbage_is_named_by_file_and_line(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + garbage + '\n{"step": 3}\n')
    for read in (read_metrics, lambda path: MetricsLog(path, resume_step=1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: ") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be read \(No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
