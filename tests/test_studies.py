"""The studies are about models and depths that exist; a page is what its JSON says, word for word."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import common, retrofit, schedules, text
from benchmarks.studies import STUDIES, TRACK
from benchmarks.study import Trained, describe, draw, flops_of_training, interval_over_seeds, of_steps
from powernap.train.data.text import Text
from powernap.train.recipe_file import check, load_recipe, parse_overrides
from powernap.train.tasks import TASKS

PAGES = sorted(common.RESULTS.glob("study_*.json"))
BY_NAME = {study.name: study for study in STUDIES}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_its_models_and_sizes_are_valid(study):
    assert len({model.folder for model in study.models}) == len(study.models)
    for longer in ((), *study.longer):
        sizes = {size.split("=")[0]: size for size in (*study.sizes, *longer)}
        check(TASKS[study.task], {field: parse_overrides([size])[field] for field, size in sizes.items()})
    for model in study.models:
        window = [] if any("model.window" in change for change in model.overrides) else ["model.window=8"]
        load_recipe(study.recipe, [*(of_steps(change, 1000) for change in model.overrides), *window])
    named = {name for claim in study.claims for name in (claim.above, *claim.below)}
    assert named <= {model.name for model in study.models}


def trained(seed: int, model: str, share: float) -> Trained:
    at = {windows: {str(d): share for d in range(1, int(windows) + 1)} for windows in ("8", "16", "64")}
    interval = {w: {d: (s, s) for d, s in of.items()} for w, of in at.items()}
    answers = {w: dict.fromkeys(of, 10) for w, of in at.items()}
    floor = {w: dict.fromkeys(of, 0.33) for w, of in at.items()}
    run = dict(seed=seed, model=model, passes=2, parameters=1000, steps=10, flops=1e12, commit="abc")
    return Trained(**run, loss=0.1, accuracy=at, interval=interval, floor=floor, answers=answers)


def test_a_claim_holds_only_in_every_seed():
    shares = {1: {"N=2": 0.99, "N=1": 0.3, "N=1, AGAG": 0.4}, 2: {"N=2": 0.97, "N=1": 0.6, "N=1, AGAG": 0.2}}
    found = [trained(seed, model, share) for seed, of in shares.items() for model, share in of.items()]
    page = "\n".join(describe(TRACK, found))
    (row,) = [line for line in page.splitlines() if line.startswith("| N=1 with the same FLOPs is not, at 8")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["+59.0, +37.0", "48.0 ± 139.8", "40", "NO"]
    assert "| N=2 is right at the trained length" in page and "attention with its cache is not" not in page
    assert "98.0 (97–99)" in page and re.search(r"^\| surface guess +\| +33.0 \|", page, re.M)


def test_a_depth_that_one_seed_lacks_is_no_column(tmp_path):
    one, other = trained(1, "N=2", 0.9), trained(2, "N=2", 0.8)
    for part in (other.accuracy, other.interval, other.floor, other.answers):
        del part["64"]["64"]
    study = replace(TRACK, claims=())
    page = "\n".join(describe(study, [one, other]))
    header = page[page.index("## 64 windows") :].splitlines()[4]
    assert header.strip("| ").split("|")[-1].strip() == "63"
    draw(study, [one, other], tmp_path / "page.png")


def test_the_interval_over_seeds_is_students():
    assert interval_over_seeds([1.0, 2.0, 3.0]) == "2.0 ± 2.5" and interval_over_seeds([4.0]) == "4.0"


def test_the_models_of_text_are_valid():
    for model in text.TEXT.models:
        load_recipe(text.TEXT.recipe, list(model.overrides))
    check(Text, parse_overrides(["inputs=x", *(size for size in text.TEXT.sizes if not size.startswith("-"))]))
    names = {model.name for model in text.TEXT.models}
    assert names >= {name for _, *pair in text.CLAIMS for name in pair}


def test_a_claim_about_text_holds_only_in_every_seed(tmp_path):
    bits = {(1, "N=2"): 2.0, (1, "N=1, as many bytes"): 2.125, (2, "N=2"): 2.5, (2, "N=1, as many bytes"): 2.25}
    run = dict(passes=2, parameters=10, steps=10, flops=1e12, commit="abc", bytes=10)
    found = [
        text.Trained(seed=seed, model=name, **run, bits=dict.fromkeys(("all", "1", "2"), b))
        for (seed, name), b in bits.items()
    ]
    page = "\n".join(text.describe(found))
    (row,) = [line for line in page.splitlines() if line.startswith("| N=2 is better than N=1 after as many bytes")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["+0.125, -0.250", "-0.062 ± 2.382", "NO"]
    assert re.search(r"^\| N=2 +\| 2.250 \| 2.250 \| 2.250 \|", page, re.M)
    text.draw(found, tmp_path / "text.png")
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_of_the_schedules_are_valid_and_cost_the_same():
    for of_task in schedules.STUDIES.values():
        flops = []
        for model in of_task.models:
            changes = ["model.window=8", *(of_steps(change, 1000) for change in model.overrides)]
            recipe = load_recipe(of_task.recipe, ["train.steps=1000", *changes])
            assert max(recipe.sleep.pass_choices) == schedules.PASSES
            flops.append(flops_of_training(recipe))
        fixed, growing, drawn = flops
        assert drawn < growing < fixed  # of as many steps


def scheduled(seed: int, model: str, right: float) -> schedules.Trained:
    run = dict(seed=seed, model=model, passes=4, parameters=10, steps=10, flops=1e12, commit="abc", task="depo")
    return schedules.Trained(
        **run, loss=0.1, accuracy={"4": right}, floor={"4": 0.5}, course=[(1e11, 2.0), (1e12, 0.1)]
    )


def test_schedules_are_compared_seed_by_seed(tmp_path):
    shares = {(1, "N=4"): 0.5, (2, "N=4"): 0.7, (1, "N drawn"): 0.75, (2, "N drawn"): 0.75}
    found = [scheduled(seed, model, share) for (seed, model), share in shares.items()]
    page = "\n".join(schedules.describe(found))
    (line,) = [line for line in page.splitlines() if line.startswith("| N drawn")]
    assert [cell.strip() for cell in line.strip("|").split("|")][-2:] == ["75.0, 75.0", "15.0 ± 127.1"]
    schedules.draw(found, tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", [text, schedules], ids=lambda module: module.__name__.split(".")[-1])
def test_every_number_on_the_page_of_another_study_is_in_its_json(module):
    path = common.RESULTS / f"{module.__name__.split('.')[-1]}.json"
    if not path.exists():
        pytest.skip("has not been run")
    found = [module.Trained(**one) for one in json.loads(path.read_text())["trained"]]
    assert path.with_suffix(".md").read_text().endswith("\n".join(module.describe(found)).rstrip() + "\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_number_on_a_page_is_in_its_json(path):
    study = BY_NAME[path.stem.removeprefix("study_")]
    document = json.loads(path.read_text())
    found = [Trained(**one) for one in document["trained"]]
    page = path.with_suffix(".md").read_text()
    assert page.endswith("\n".join(describe(study, found)).rstrip() + "\n")
    assert path.with_suffix(".png").exists()
    changed = [replace(one, accuracy={w: dict.fromkeys(of, 0.123) for w, of in one.accuracy.items()}) for one in found]
    assert "\n".join(describe(study, changed)) not in page
    assert asdict(found[0]).keys() == document["trained"][0].keys()


def retrofitted(seed: int, step: retrofit.Step, evicted: float, within: float) -> retrofit.Result:
    windows = ("1",) if step.name == retrofit.BASE else ("1", "2", "3")
    accuracy = {w: dict.fromkeys(retrofit.HOPS, evicted if w == "3" else 0.99) for w in windows}
    floor = dict.fromkeys(retrofit.HOPS, 0.4)
    return retrofit.Result(
        seed, step.name, step.passes, 10, 1e12, accuracy, dict.fromkeys(windows, within), floor, "abc"
    )


def test_a_claim_about_the_retrofit_holds_only_in_every_seed():
    found = []
    for seed, taught in ((1, 0.95), (2, 0.85)):
        for step in retrofit.STEPS:
            shares = {retrofit.BEFORE: 0.2, "N=4": 0.95, "N=4, taught": taught, "N=1": 0.9}
            found.append(retrofitted(seed, step, shares.get(step.name, 0.5), 0.103 if step.name == "N=4" else 0.1))
    page = "\n".join(retrofit.describe(found))
    for row in (
        r"N=4: right at 1 hops with the cycle evicted, % +\| +95, 95 \| .* yes \|",
        r"N=4, taught: right at 2 hops with the cycle evicted, % +\| +95, 85 \| .* NO \|",
        r"N=4, taught: points above N=1 at 4 hops +\| +5, -5 \| .* NO \|",
        r"N=4: loss within a window, after / before +\| 1.03, 1.03 \| .* NO \|",
        r"without it, it guesses: points above the surface guess at 1 hop +\| +-20, -20 \| .* yes \|",
        r"surface guess +\| +40.0",
    ):
        assert re.search(row, page), row
    assert not retrofit.claims(found[:3])  # of a seed that is not done
    for step in retrofit.STEPS:
        one = retrofit.overrides(step, Path("runs"), 1)
        assert load_recipe(step.recipe, one).run.name == retrofit.folder_of(step.name)
