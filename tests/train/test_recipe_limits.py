"""Values that no run can have: `powernap plan`, and `train` up to its first process, say so in one line."""

import os
from contextlib import contextmanager
from unittest import mock

import pytest

from powernap.launch import cli
from powernap.train.config import Recipe
from powernap.train.recipe_file import field_names
from tests.helpers import runs
from tests.helpers.fuzzing import no_longer_than

FIELDS = field_names(Recipe)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    runs.prepare(folder, train_samples=64)
    return folder


@pytest.fixture
def command(prepared, capsys, monkeypatch, tmp_path):
    """command("plan", ...) runs it in a prepared folder, where nothing may change, and returns its exit code."""
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def command(*arguments):
        before = sorted(prepared.rglob("*"))
        with no_longer_than(), no_processes():
            try:
                code = cli.main(list(arguments))
            except (_Started, SystemExit) as end:  # argparse answers what is no override in its own words
                code = end.code
        error = capsys.readouterr().err
        assert code in (0, 2), error
        if code == 2 and not error.startswith("usage:"):
            assert error.startswith("powernap: error: ") and error.count("\n") == 1 and error[:-1].isprintable(), error
        assert sorted(prepared.rglob("*")) == before
        return code

    return command


class _Started(BaseException):
    code = 0


@contextmanager
def no_processes():
    """The checks of `train` run; where it would become or start the processes of the run, it ends."""
    with (
        mock.patch("powernap.launch.torchrun.run_alone", side_effect=_Started),
        mock.patch("powernap.launch.torchrun.start", return_value=0),
        mock.patch("powernap.launch.torchrun.already_started", return_value=False),
    ):
        yield


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "..", "/", "."])
def test_names_that_are_no_recipes(command, name):
    assert command("train", name) == 2


@pytest.mark.parametrize(
    "override",
    [
        *(f"run.name={name}" for name in ("..", "a/../b", "../b", "/tmp/b", "x" * 300, "''", ".b", '"a\\n"')),
        *(f"run.root={root}" for root in ("''", "x" * 300, "tiny.yaml", "../a?b", "a%20b")),
        *(f"sleep.passes={n}" for n in ("1000000000", "[1, 9999999999]", "9" * 400)),
        *(f"{field}={'9' * 400}" for field in FIELDS if field.endswith(("_size", "_dim", "_length", "window", "steps"))),
        *(f"{field}={n}" for field in ("optimizer.lr", "data.cache_limit_gb") for n in (".inf", ".nan", "1e999")),
        "data.cache=~nobody-of-that-name/x", "model.pattern=" + "AG" * 5000, "data.sequence_length=1000000001",
        *(f"data.train={shards}" for shards in (
            "'{'", "'{{{{'", "'http://[x'", "'file://[x'", "x" * 5000, "nowhere://x", "''", "['']", "[]", "{}",
            "{a: {shards: []}}", "/dev/zero", "/dev/nul[l]",
        )),
    ],
)  # fmt: skip
def test_values_out_of_range_and_names_that_lead_elsewhere(command, override):
    assert command("train", "tiny.yaml", override) == 2


@pytest.mark.parametrize(
    "overrides",
    [["data.sequence_length=65537", "model.window=1"], ["train.global_batch_size=1048576", "model.window=1"]],
)
def test_a_plan_without_end_is_refused(command, overrides):
    assert command("plan", "tiny.yaml", "train.micro_batch_size=1", "data.train=none", *overrides) == 2


def test_a_named_pipe_among_the_shards_is_not_waited_for(command, tmp_path):
    os.mkfifo(tmp_path / "train-0.tar")
    assert command("train", "tiny.yaml", f"data.train={tmp_path}/train-*.tar") == 2
    assert command("train", "tiny.yaml", f"data.train={tmp_path}/train-0.tar") == 2
