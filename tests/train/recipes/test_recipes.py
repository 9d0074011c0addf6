"""The shipped recipes fit the data that their first lines say to build."""

import re
import shlex

import pytest

from powernap.launch import cli
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train.data.check import check_data
from powernap.train.recipe_file import load_recipe, shipped_recipes

RECIPES = [name for name in shipped_recipes() if "/" not in name]


def test_these_are_shipped():
    assert RECIPES == [
        "automata", "demo", "depo", "gsm", "own_text", "program", "prose", "rule110", "text", "track", "trend_depo", "trend_rule110",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = shipped_recipes()[name].read_text()
    (command,) = re.findall(r"#   powernap (data build .*)", text)
    command = (
        re.sub(r"--(train|test)-samples \d+", "", command)
        .replace("CORPUS", "corpus")
        .replace("FOLDER", "corpus")
        .replace("0.5MB", "0.05MB")
    )
    arguments = [*shlex.split(command), "--workers", "1"]
    if "corpus" in command:
        (tmp_path / "corpus").mkdir()
        for number in range(200):
            (tmp_path / "corpus" / f"{number}.txt").write_text(f"A text, number {number}. " * 300)
    else:
        arguments += ["--train-samples", "40", "--test-samples", "10"]
    assert cli.main(arguments) == 0
    check_data(load_recipe(name))


@pytest.mark.parametrize("name", ["depo", "gsm", "rule110"])
def test_what_a_paper_size_recipe_says_of_its_cost_is_so(name):
    header = " ".join(shipped_recipes()[name].read_text().split("run:")[0].replace("#", "").split())
    steps, petaflops, hours = re.search(
        r"Its ([\d,]+) steps are (\d+) PFLOP .*?: ([\d.]+) hours on an H100", header
    ).groups()
    recipe = load_recipe(name)
    flops = recipe.train.steps * step_flops(recipe, segments_of(recipe))
    assert int(steps.replace(",", "")) == recipe.train.steps
    assert int(petaflops) == pytest.approx(flops / 1e15, rel=0.01)
    assert float(hours) == pytest.approx(flops / 20e12 / 3600, abs=0.06) and "Not trained here" in header
