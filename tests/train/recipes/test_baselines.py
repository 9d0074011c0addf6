"""The baselines: recipes that say only what differs from another one, of matching size or cost, and that train."""

import math
import re

import pytest
import torch
import yaml

from powernap.model.parameters import count_parameters
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train import trainer
from powernap.train.batches import read_batches
from powernap.train.data.build import build_task
from powernap.train.data.check import check_data
from powernap.train.evaluation.evaluate import evaluate
from powernap.train.recipe_file import RecipeError, load_recipe, shipped_recipes
from powernap.train.run.folder import save_recipe
from powernap.train.tasks import TASKS
from tests.helpers.cases import names

BASELINES = [name for name in shipped_recipes() if name.startswith(("demo/", "depo/"))]
PREDICTS = {"depo": [False] * 4 + [True], "demo": [False] + [True] * 3}  # windows of the base


def size(recipe) -> int:
    return count_parameters(recipe.model, recipe.sleep)


def flops(name: str) -> int:
    recipe, base = load_recipe(name), name.split("/")[0]
    whole = recipe.model.window == recipe.data.sequence_length - 1
    return step_flops(recipe, segments_of(recipe, [True] if whole else PREDICTS[base]))


def test_these_are_shipped():
    names = ["deeper", "evicted", "full_attention", "last_write", "n1", "refed"]
    assert [f"{base}/{name}" for base in ("demo", "depo") for name in names] == BASELINES


@pytest.mark.parametrize("base", PREDICTS)
def test_a_deeper_model_without_sleep_costs_what_sleep_costs(base):
    assert flops(f"{base}/deeper") == pytest.approx(flops(base), rel=0.1)
    assert flops(f"{base}/n1") < 0.6 * flops(base)  # the control
    assert load_recipe(f"{base}/deeper").sleep.passes == 1


@pytest.mark.parametrize("name", BASELINES)
def test_what_a_baseline_says_of_its_size_and_cost_is_so(name):
    base = load_recipe(name.split("/")[0])
    text = " ".join(line.lstrip("# ") for line in shipped_recipes()[name].read_text().splitlines() if line[0] == "#")
    (said,) = re.findall(r"([\d,]+) parameters", text)
    assert int(said.replace(",", "")) == size(load_recipe(name))
    assert name.endswith("deeper") or size(load_recipe(name)) == pytest.approx(size(base), rel=0.01)
    share = flops(name) / flops(name.split("/")[0])
    if found := re.findall(r"([\d.]+) % of its training FLOPs|: ([\d.]+) % of them", text):
        assert 100 * share == pytest.approx(float("".join(found[0])), abs=0.5)
    else:
        assert "and training FLOPs" in text and share == 1


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_differs_from_its_base_in_what_it_says(name):
    said = yaml.safe_load(shipped_recipes()[name].read_text())
    assert said.pop("base") == name.split("/")[0]
    ours, bases = (load_recipe(n).model_dump(mode="json") for n in (name, name.split("/")[0]))
    differing = {
        section: {field: value for field, value in fields.items() if value != bases[section][field]}
        for section, fields in ours.items()
    }
    assert {section: fields for section, fields in differing.items() if fields} == said


SMALL = [
    "model.hidden_size=32", "model.mlp.ffn_hidden_size=32", "model.attention.heads=1",
    "model.gdn={heads: 1, key_dim: 8, value_dim: 8}", "train.steps=2", "train.global_batch_size=4",
    "train.micro_batch_size=null", "optimizer.warmup_steps=1", "parallel.data=1", "evaluation.samples=8",
    "evaluation.every=null", "data.lanes=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few of each base's samples, built as its first lines say."""
    folder = tmp_path_factory.mktemp("baselines")
    settings = dict(train_samples=16, test_samples=8, samples_per_shard=16, seed=0, workers=1)
    build_task("depo", TASKS["depo"](), folder / "data" / "depo", **settings)
    demo = TASKS["depo"](nodes=8, max_hop=4, queries=18, names="ends")
    build_task("depo", demo, folder / "runs" / "demo" / "data", **settings)
    return folder


@pytest.mark.parametrize("name", names(BASELINES[-3:], BASELINES))
def test_a_baseline_trains(folder, topology, monkeypatch, name):
    """Two steps and an evaluation on data that its base's first lines say to build."""
    monkeypatch.chdir(folder)
    recipe = load_recipe(name, SMALL)
    check_data(recipe)
    stage, zero = trainer.build(recipe, topology)
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    batches = read_batches(recipe, topology, None)
    losses = [trainer.train_step(recipe, stage, zero, next(batches)[0], step, topology)[0]["loss"] for step in (1, 2)]
    assert all(math.isfinite(loss) for loss in losses)
    changed = [not torch.equal(*pair) for pair in zip(before, stage.parameters(), strict=True)]
    assert all(changed), name
    accuracy = evaluate(stage, recipe, [recipe.sleep.passes], 8, topology).accuracy
    assert len(accuracy[str(recipe.sleep.passes)]) == {"demo": 4, "depo": 16}[name.split("/")[0]]


def write(folder, **recipes):
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def test_a_base_is_found_beside_the_file_and_resolved_in_the_runs_config(tmp_path):
    write(
        tmp_path,
        own={"base": "demo", "run": {"name": "own"}, "data": {"train": {"a": {"shards": "a.tar"}}}},
        further={"base": "own.yaml", "sleep": {"write": "last"}, "data": {"train": {"b": {"shards": "b.tar"}}}},
    )
    recipe = load_recipe(str(tmp_path / "further.yaml"), ["sleep.passes=2"])
    assert (recipe.run.name, recipe.sleep.write, recipe.sleep.passes) == ("own", "last", 2)
    assert recipe.model == load_recipe("demo").model
    assert list(recipe.data.datasets) == ["b"]  # a field is taken whole
    save_recipe(recipe, tmp_path / "config.yaml")
    assert "base" not in yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert load_recipe(str(tmp_path / "config.yaml")) == recipe


@pytest.mark.parametrize(
    "recipes, words",
    [
        ({"a": {"base": "demoo"}}, ["a.yaml: base=demoo", "did you mean demo?"]),
        ({"a": {"base": "b.yaml"}}, ["a.yaml: base=b.yaml: no recipe 'b.yaml'"]),
        ({"a": {"base": ["demo"]}}, ["a.yaml: base=['demo']", "write one recipe's name or path"]),
        ({"a": {"base": "a.yaml"}}, ["a.yaml: base=a.yaml", "must stand alone"]),
        ({"a": {"base": "b.yaml"}, "b": {"base": "a.yaml"}}, ["b.yaml: base=a.yaml", "must stand alone"]),
        ({"a": {"base": "demo", "modle": {"window": 9}}}, ["unknown key modle"]),
        ({"a": {"base": "demo", "model": {"pattern": "AA"}}}, ["sleep.passes=4 with model.pattern=AA"]),
    ],
)
def test_a_base_that_cannot_be_is_told_in_one_line(tmp_path, recipes, words):
    write(tmp_path, **recipes)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
