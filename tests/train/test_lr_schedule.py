"""Learning rates by step, against their formulas."""

import math

import pytest

from powernap.train.config import OptimizerConfig
from powernap.train.lr_schedule import lr_factor, rate_in_words
from powernap.train.recipe_file import RecipeError, load_recipe

STEPS, WARMUP, FINAL = 100, 10, 0.1


def rates(schedule, **changes):
    config = OptimizerConfig(**{"schedule": schedule, "warmup_steps": WARMUP, "final_lr": FINAL, **changes})
    return [lr_factor(step, STEPS, config) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "inverse_sqrt"])
def test_all_warm_up_linearly_and_never_rise_after(schedule):
    found = rates(schedule)
    assert found[:WARMUP] == pytest.approx([step / WARMUP for step in range(1, WARMUP + 1)])
    assert all(one >= other for one, other in zip(found[WARMUP - 1 :], found[WARMUP:], strict=False))
    assert found[-1] == pytest.approx(math.sqrt(WARMUP / STEPS) if schedule == "inverse_sqrt" else FINAL, abs=0.02)


def test_against_formulas():
    part = [(step - WARMUP) / (STEPS - WARMUP) for step in range(WARMUP + 1, STEPS + 1)]
    assert rates("linear")[WARMUP:] == pytest.approx([1 - (1 - FINAL) * p for p in part])
    assert rates("cosine")[WARMUP:] == pytest.approx(
        [FINAL + (1 - FINAL) * (1 + math.cos(math.pi * p)) / 2 for p in part]
    )
    assert rates("inverse_sqrt")[39] == pytest.approx(0.5)  # a quarter of the way through 40 steps of warm-up
    assert rates("inverse_sqrt", final_lr=0.4)[-1] == 0.4
    decayed = rates("wsd", hold=0.8, decay="sqrt")
    assert decayed[79] == 1.0 and decayed[85] == pytest.approx(1 - math.sqrt(0.05 / 0.2)) and decayed[-1] == FINAL
    assert rates("wsd", hold=0.8)[85] == pytest.approx(0.15 / 0.2)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "inverse_sqrt"])
def test_without_a_warm_up_and_with_nothing_else(schedule):
    for warmup in (0, STEPS):
        assert all(0 < rate <= 1 for rate in rates(schedule, warmup_steps=warmup))
    assert lr_factor(1, 1, OptimizerConfig(schedule=schedule, warmup_steps=0)) > 0


def test_one_that_is_not_known_is_refused():
    with pytest.raises(RecipeError, match=r"optimizer.schedule.*cosin"):
        load_recipe("demo", ["optimizer.schedule=cosin"])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("wsd", "0.001 after 100 steps of warm-up, constant to step 600, then linear to 0.02 of it at step 1,000"),
        ("cosine", "0.001 after 100 steps of warm-up, cosine to 0.02 of it at step 1,000"),
        ("linear", "0.001 after 100 steps of warm-up, linear to 0.02 of it at step 1,000"),
        ("inverse_sqrt", "0.001 after 100 steps of warm-up, then with the inverse square root of the step, to 0.02 of it at least"),
    ],
)  # fmt: skip
def test_in_words(schedule, words):
    chosen = ["train.steps=1000", "optimizer.lr=1e-3", "optimizer.warmup_steps=100", f"optimizer.schedule={schedule}"]
    recipe = load_recipe("demo", chosen)
    assert rate_in_words(recipe) == words
    if schedule == "wsd":  # as the steps have it
        assert [lr_factor(step, 1000, recipe.optimizer) < 1 for step in (600, 602)] == [False, True]
