"""docs/sizes.md says what `powernap plan` counts for the recipes in train/recipes/sizes."""

import re
from pathlib import Path

import pytest

from powernap.parallel.planning.plan import in_bytes
from powernap.parallel.planning.plan import plan as planned
from powernap.train.hugging_face.export import family_of
from powernap.train.recipe_file import load_recipe, shipped_recipes

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "sizes.md").read_text()
ROWS = {name: cells.split(" | ") for name, cells in re.findall(r"^\| `(sizes/\w+)` \| (.*) \|$", PAGE, re.M)}
SIZES = [name for name in shipped_recipes() if name.startswith("sizes/")]
UNITS = {"M": 1e6, "G": 1e9, "B": 1e9, "P": 1e15}
H100 = 400e12  # FLOP/s, which the page assumes


def number(text: str) -> float:
    """Such as 1.3G or 524,288."""
    text = text.replace(",", "").removesuffix(" GB")
    return float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text)


def test_every_size_has_a_row():
    assert sorted(ROWS) == SIZES and len(SIZES) == 5


@pytest.mark.parametrize("name", SIZES)
def test_the_row_of_a_size_is_what_plan_counts(name):
    recipe = load_recipe(name)
    plan, model, parallel = planned(recipe, memory_limit=80 * 10**9), recipe.model, recipe.parallel
    parameters, shape, batch, steps, tokens, lr, gpus, memory, step, total, days = ROWS[name]
    all_tokens, all_flops = plan.tokens_per_step * recipe.train.steps, plan.flops_per_step * recipe.train.steps
    assert number(parameters) == pytest.approx(plan.parameters, rel=0.03)
    assert shape == f"{model.hidden_size} x {model.num_layers}"
    assert (number(batch), number(steps), float(lr)) == (plan.tokens_per_step, recipe.train.steps, recipe.optimizer.lr)
    assert number(tokens) == pytest.approx(all_tokens, rel=0.01)
    assert 20 == pytest.approx(all_tokens / plan.parameters, rel=0.02)
    grid = f"data {parallel.data}" + f" x tensor {parallel.tensor}" * (parallel.tensor > 1)
    assert gpus == f"{parallel.world_size} = {grid}" and plan.fits
    assert memory == in_bytes(max(stage.memory.total for stage in plan.stages))
    assert number(step) == pytest.approx(plan.flops_per_step, rel=0.03)
    assert float(total) == pytest.approx(all_flops / 1e21, rel=0.1)
    assert float(days) == pytest.approx(all_flops / H100 / parallel.world_size / 86400, rel=0.2)
    # What the page advises of a segment and of the heads.
    assert model.window * recipe.micro_batch_size >= 2048
    assert model.gdn.heads * model.gdn.key_dim == model.hidden_size


@pytest.mark.parametrize("name", SIZES)
def test_a_class_of_transformers_loads_its_export(name):
    assert family_of(load_recipe(name).model).model_type == "qwen3_5_text"


def test_what_other_numbers_of_passes_cost():
    low, high, lowest, highest = map(float, re.search(
        r"N=1 costs (\d\.\d+) to (\d\.\d+) of N=2, N=4 (\d\.\d+) to (\d\.\d+)", PAGE
    ).groups())  # fmt: skip
    for name in SIZES:
        flops = {n: planned(load_recipe(name, [f"sleep.passes={n}"])).flops_per_step for n in (1, 2, 4)}
        assert low - 0.005 <= flops[1] / flops[2] <= high + 0.005, name
        assert lowest - 0.005 <= flops[4] / flops[2] <= highest + 0.005, name
