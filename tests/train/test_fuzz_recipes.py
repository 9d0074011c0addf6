"""Recipes of all kinds: `powernap plan`, and `train` up to its first process, succeed or say why not in one line."""

import copy
import datetime
import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from powernap.launch import cli
from powernap.train.config import Recipe
from powernap.train.recipe_file import field_names
from tests.helpers import runs
from tests.helpers.fuzzing import fuzz, no_longer_than

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


def assert_answered(command, recipe, *overrides):
    assert {command("plan", str(recipe), *overrides), command("train", str(recipe), *overrides)} <= {0, 2}


BOMB = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join(9 * ['*' + a])}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "run: {name: *l}", BOMB + "data: {train: *l}", "run: &a {name: *a}", "[" * 5000,
        "run: " + "[" * 900 + "]" * 900, "run: " + "{a: " * 900 + "}" * 900, "run: !!bool x", "run: !!int x",
        "run: !!timestamp x", "run: 2001-99-99", "run: 0x_", "run: " + "9" * 5000, "1: 2\nnull: 3", "? [1]\n: 2", "[]", "",
        "run: !!python/object/apply:os.system ['touch pwned']", "base: .", "base: 'a\\0b'", f"base: {'a' * 5000}",
        "base: recipe.yaml", "base: {}", 'run: {name: "\\ud800\\e[31m"}', "\0", "\ufeff",
    ],
)  # fmt: skip
def test_texts_that_break_readers_of_yaml(command, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert command("plan", str(tmp_path / "recipe.yaml")) == 2


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x/" * 3000, "..", "/", "\udcff", "."])
def test_names_that_are_no_recipes(command, name):
    assert command("train", name) == 2


@pytest.mark.parametrize(
    "override",
    [
        *(f"run.name={name}" for name in ("..", "a/../b", "../b", "/tmp/b", "'a\\0b'", '"a\\0b"', "x" * 300, "''", ".b", '"a\\n"')),
        *(f"run.root={root}" for root in ('"a\\0b"', "''", "x" * 300, "tiny.yaml", "../a?b", "a%20b")),
        *(f"sleep.passes={n}" for n in ("1000000000", "[1, 9999999999]", "9" * 400)),
        *(f"{field}={'9' * 400}" for field in FIELDS if field.endswith(("_size", "_dim", "_length", "window", "steps"))),
        *(f"{field}={n}" for field in ("optimizer.lr", "data.cache_limit_gb") for n in (".inf", ".nan", "1e999")),
        "data.cache=~nobody-of-that-name/x", "data.cache_limit_gb=1.0e308", "model.pattern=" + "AG" * 5000,
        "data.sequence_length=1000000001", "train.global_batch_size=1000000000000",
        *(f"data.train={shards}" for shards in (
            "'{0..99999999999}'", "'{{a,b}{a,b}'" + "'{a,b}'" * 60 + "',c}'", "'{'", "'{{{{'", "'http://[x'", "'file://[x'",
            "x" * 5000, '"a\\0*/b*"', "nowhere://x", "''", "['']", "[]", "{}", "{a: {shards: []}}", "/dev/zero", "/dev/nul[l]",
        )),
    ],
)  # fmt: skip
def test_values_without_end_and_names_that_lead_elsewhere(command, override):
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


yaml_text = st.text(alphabet="{}[]:,-&*!|>'\"\n #%@`?0xeab_~<.=\0\x1b\x85\u2028", max_size=40).map(str.encode)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(min_value=datetime.date(1, 1, 1)),
    st.binary(max_size=4),
    st.sampled_from([10**400, -1, 0, 1, 2, 3, 2**20, 2**32]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def write(value, path: Path) -> None:
    path.write_bytes(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))


@fuzz
@given(st.binary(max_size=60) | yaml_text)
def test_any_bytes(command, tmp_path, data):
    (tmp_path / "recipe.yaml").write_bytes(data)
    assert_answered(command, tmp_path / "recipe.yaml")


@fuzz
@given(values | st.dictionaries(st.sampled_from(["base", *Recipe.model_fields]), values, max_size=4))
def test_any_structure(command, tmp_path, value):
    write(value, tmp_path / "recipe.yaml")
    assert_answered(command, tmp_path / "recipe.yaml")


@fuzz
@given(st.sampled_from([field for field in FIELDS if field != "data.cache"]), values)  # the cache may be anywhere
def test_a_recipe_with_any_value_in_a_field(command, tmp_path, field, value):
    recipe = copy.deepcopy(runs.RECIPE)
    section, name = field.split(".")
    recipe.setdefault(section, {})[name] = value
    write(recipe, tmp_path / "recipe.yaml")
    assert_answered(command, tmp_path / "recipe.yaml")


overrides = st.text(max_size=15).filter(lambda text: not text.startswith("-")) | st.builds(
    "{}={}".format,
    st.sampled_from([field for field in FIELDS if field != "data.cache"]),
    st.text(max_size=10) | st.integers(0, 64) | yaml_text.map(bytes.decode),
)


@fuzz
@given(st.lists(overrides, max_size=3))
def test_any_overrides(command, given):
    assert_answered(command, "tiny.yaml", *given)
