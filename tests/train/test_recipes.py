"""The shipped recipes fit the data that their first lines say to build."""

import re
import shlex
from importlib import resources

import pytest

from powernap.launch import cli
from powernap.train.check_data import check_data
from powernap.train.config import load_recipe

RECIPES = sorted(
    file.name for file in resources.files("powernap.train.recipes").iterdir() if file.name.endswith(".yaml")
)


def test_these_are_shipped():
    assert RECIPES == [
        "demo.yaml",
        "depo.yaml",
        "gsm.yaml",
        "rule110.yaml",
        "text.yaml",
        "trend_depo.yaml",
        "trend_rule110.yaml",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (resources.files("powernap.train.recipes") / name).read_text()
    (command,) = re.findall(r"#   powernap (data build .*)", text)
    command = re.sub(r"--(train|test)-samples \d+", "", command).replace("CORPUS", "corpus")
    arguments = [*shlex.split(command), "--workers", "1"]
    if name == "text.yaml":
        (tmp_path / "corpus").mkdir()
        for number in range(200):
            (tmp_path / "corpus" / f"{number}.txt").write_text(f"A text, number {number}. " * 300)
    else:
        arguments += ["--train-samples", "40", "--test-samples", "10"]
    assert cli.main(arguments) == 0
    check_data(load_recipe(name))
