"""The shipped recipes fit the data that their first lines say to build."""

import re
import shlex

import pytest

from powernap.launch import cli
from powernap.train.data.check import check_data
from powernap.train.recipe_file import load_recipe, shipped_recipes

RECIPES = [name for name in shipped_recipes() if "/" not in name]


def test_these_are_shipped():
    assert RECIPES == [
        "automata", "demo", "depo", "gsm", "program", "rule110", "text", "track", "trend_depo", "trend_rule110",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = shipped_recipes()[name].read_text()
    (command,) = re.findall(r"#   powernap (data build .*)", text)
    command = re.sub(r"--(train|test)-samples \d+", "", command).replace("CORPUS", "corpus")
    arguments = [*shlex.split(command), "--workers", "1"]
    if name == "text":
        (tmp_path / "corpus").mkdir()
        for number in range(200):
            (tmp_path / "corpus" / f"{number}.txt").write_text(f"A text, number {number}. " * 300)
    else:
        arguments += ["--train-samples", "40", "--test-samples", "10"]
    assert cli.main(arguments) == 0
    check_data(load_recipe(name))
