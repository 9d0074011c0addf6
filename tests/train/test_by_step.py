"""Values that change over the steps: each step trains with its own in every layout, resumes exactly, and is planned."""

import itertools
import json
import shutil
from collections import Counter

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.planning.plan import plan, plan_run
from powernap.train.config import Recipe
from powernap.train.data.loader import training_batches
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder, save_recipe
from powernap.train.tracking.metrics import read_metrics
from powernap.train.trainer import draw_passes
from tests.helpers import runs
from tests.helpers.cases import asked_for, names

# Depo's answers share the last window of 12 tokens; of 6 they take two.
CHANGES = {
    "sleep.passes": "{0: 1, 2: 3, 5: [1, 2]}",
    "sleep.eviction": "{0: hard, 3: sliding}",
    "sleep.backprop_passes": "{0: 1, 4: null}",
    "model.window": "{0: 12, 4: 6}",
}
OVERRIDES = [f"{field}={value}" for field, value in CHANGES.items()]
STEPS = 7
# name: processes, overrides
LAYOUTS = {
    "one": (1, []),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "zero3": (2, ["parallel.data=2", "zero.stage=3"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_step")
    train = {"steps": STEPS, "global_batch_size": 8, "log_every": 1}
    sections = {"train": train, "checkpoint": {"every": 1, "keep_last": STEPS}, "model": {"vocab_size": 16}}
    runs.prepare(folder, evaluation={"every": None}, **sections)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    found, asked = {}, asked_for(request, LAYOUTS, "one")
    for processes in (1, 2):
        chosen = {name: [*OVERRIDES, *its] for name, (needs, its) in asked.items() if needs == processes}
        found |= runs.train_in_turn(folder, processes, chosen)
    return found


def losses_of(weights, recipe, folder, topology, monkeypatch):
    """Of the batch of every step after the first, by the loop alone, with the weights before it and the step's own values."""
    monkeypatch.chdir(folder)
    batches = training_batches(recipe.data, batch_size=8, vocab_size=16, rank=0, world_size=1, seed=0)
    found = []
    for step, (batch, _) in zip(range(1, STEPS + 1), batches, strict=False):
        if step == 1:
            continue
        passes, eviction, _, window = values_of(step, recipe)
        model = recipe.model.model_copy(update={"window": window})
        sleep = recipe.sleep.model_copy(update={"eviction": eviction, "backprop_passes": None})
        stage = HybridStage(model, sleep, topology.groups)
        Checkpoint.open(weights / f"step_{step - 1:08}").load_weights(stage)
        segments = plan_segments(batch.tokens, batch.loss_mask, model, sleep, passes)
        with torch.no_grad():
            total = sleep_and_predict(stage, segments, batch.tokens, batch.loss_mask, recompute="none").loss
        found.append(float(total / batch.loss_mask[:, 1:].sum()))
    return found


def values_of(step, recipe):
    """Written down anew."""
    passes = 1 if step <= 2 else 3 if step <= 5 else draw_passes(recipe.at(step), step)
    return passes, "hard" if step <= 3 else "sliding", 1 if step <= 4 else None, 12 if step <= 4 else 6


@pytest.mark.parametrize("name", names(["pipeline"], ["one", "zero3", "sequence"]))
def test_every_step_has_its_own_values(folder, trained, topology, monkeypatch, name):
    recipe = RunFolder(trained[name]).recipe()
    records = read_metrics(trained[name] / "metrics.jsonl")
    assert [record["passes"] for record in records] == [values_of(step, recipe)[0] for step in range(1, STEPS + 1)]
    expected = losses_of(trained[name] / "checkpoints", recipe, folder, topology, monkeypatch)
    assert [record["loss"] for record in records[1:]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.wide  # test_a_resumed_run_may_change_what_is_to_come_alone resumes in a schedule
def test_a_resumed_run_is_the_unbroken_one(folder, trained):
    for done in (2, 4):
        broken = shutil.copytree(trained["one"], folder / f"again{done}" / "one")
        for step in range(done + 1, STEPS + 1):
            shutil.rmtree(broken / "checkpoints" / f"step_{step:08}")
        runs.train_in_turn(folder, 1, {"one": [*OVERRIDES, f"run.root=again{done}", "--resume"]})
        one, other = (read_metrics(run / "metrics.jsonl") for run in (trained["one"], broken))
        assert [line["loss"] for line in one] == [line["loss"] for line in other]
        weights, expected = runs.weights(broken), runs.weights(trained["one"])
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_resumed_run_may_change_what_is_to_come_alone(folder, trained, capfd, monkeypatch):
    plain = ["train.steps=3", "optimizer.hold=1"]
    run = runs.train_in_turn(folder, 1, {"plain": [*plain, "sleep.passes=1"]})["plain"]
    again = ["train", "tiny.yaml", "run.name=plain", *plain, "--resume"]
    monkeypatch.chdir(folder)
    capfd.readouterr()
    runs.assert_refused([*again, "sleep.passes=2"], capfd, "sleep.passes=2 cannot change on --resume: runs/plain has")
    runs.assert_refused(
        [*again, "sleep.passes={0: 1, 2: 2}"],
        capfd,
        "cannot change on --resume: step 3, which is done, had sleep.passes=1",
    )
    more = ["train.steps=5", "optimizer.hold=1", "sleep.passes={0: 1, 3: 2}", "--resume"]
    runs.train_in_turn(folder, 1, {"plain": more})
    assert [record["passes"] for record in read_metrics(run / "metrics.jsonl")] == [1, 1, 1, 2, 2]


def test_report_and_log_say_what_changes(folder, trained, monkeypatch):
    log = (trained["one"] / "logs" / "train.log").read_text()
    assert "N=1, from step 3 3, from step 6 one of [1, 2]" in log
    work = json.loads((trained["one"] / "work.json").read_text())
    assert [part["after"] for part in work["phases"]] == [0, 2, 3, 4, 5]
    by_passes = [list(part["flops_per_step"]) for part in work["phases"]]
    assert by_passes == [["1"], ["3"], ["3"], ["3"], ["1", "2"]]
    result = runs.warm_powernap("report", str(trained["one"]), cwd=folder)
    assert result.returncode == 0, result.stderr
    tracked = [json.loads(line) for line in (trained["one"] / "mlflow_spool.jsonl").read_text().splitlines()]
    assert [record["values"]["passes"] for record in tracked if record["type"] == "metrics"][:5] == [1, 1, 3, 3, 3]


def recipe_with(folder, *overrides):
    return load_recipe(str(folder / "tiny.yaml"), [*overrides])


def test_a_recipe_is_the_same_after_it_was_written(folder):
    recipe = recipe_with(folder, *OVERRIDES)
    save_recipe(recipe, folder / "written.yaml")
    from_json = Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    for again in (load_recipe(str(folder / "written.yaml")), from_json):
        assert again == recipe and [again.at(step) for step in (1, 3, 5)] == [recipe.at(step) for step in (1, 3, 5)]
    assert recipe.model_dump(mode="json")["sleep"]["passes"] == {"0": 1, "2": 3, "5": [1, 2]}
    assert (recipe.sleep.passes, recipe.model.window) == ([1, 2], 6)  # the last ones
    assert [recipe.at(step).sleep.passes for step in (1, 2, 3, 5, 6, 7)] == [1, 1, 3, 3, [1, 2], [1, 2]]
    assert recipe_with(folder).phases == [(0, recipe_with(folder))]


def test_stages_of_a_pipeline_are_the_same_throughout(folder):
    recipe = recipe_with(folder, *OVERRIDES, "parallel.pipeline=2", "model.pattern=AGAGAG")
    assert {tuple(part.stage_blocks) for _, part in recipe.phases} == {tuple(recipe.stage_blocks)}


def test_tokens_are_steps(folder):
    """A step of RECIPE reads 8 x 23 tokens."""
    recipe = recipe_with(
        folder, "train.steps=0.0184M tokens", "optimizer.warmup_steps=1k tokens", "sleep.passes={0: 1, 1840 tokens: 2}"
    )
    assert (recipe.train.steps, recipe.optimizer.warmup_steps) == (100, 6)
    assert [start for start, _ in recipe.phases] == [0, 10]


def test_n_is_drawn_by_its_weights_from_seed_and_step(folder):
    recipe = recipe_with(folder, "sleep.passes=[1, 2, 4]", "sleep.pass_weights=[5, 3, 2]")
    drawn = [draw_passes(recipe, step) for step in range(1, 4001)]
    counts = Counter(drawn)
    assert [counts[n] / 4000 for n in (1, 2, 4)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert drawn[:50] == [
        draw_passes(recipe_with(folder, "sleep.passes=[1, 2, 4]", "sleep.pass_weights=[5, 3, 2]"), step)
        for step in range(1, 51)
    ]
    other = recipe_with(folder, "sleep.passes=[1, 2, 4]", "sleep.pass_weights=[5, 3, 2]", "run.seed=1")
    assert drawn[:50] != [draw_passes(other, step) for step in range(1, 51)]


def test_plan_adds_flops_and_takes_the_most_memory(folder):
    changing = recipe_with(folder, *OVERRIDES, "train.recompute=true")
    found = plan_run(changing, lambda recipe: (None, ()))
    ends = [2, 3, 4, 5, STEPS]
    values = [(1, "hard", 1, 12), (3, "hard", 1, 12), (3, "sliding", 1, 12), (3, "sliding", None, 6)]
    parts = []
    for passes, eviction, backprop, window in values:
        constant = [f"sleep.passes={passes}", f"sleep.eviction={eviction}", f"model.window={window}"]
        gradient = f"sleep.backprop_passes={json.dumps(backprop)}"
        parts.append(plan(recipe_with(folder, *constant, gradient, "train.recompute=true")))
    last = [
        plan(
            recipe_with(folder, f"sleep.passes={n}", "sleep.eviction=sliding", "model.window=6", "train.recompute=true")
        )
        for n in (1, 2)
    ]
    lengths = [end - start for start, end in itertools.pairwise([0, *ends])]
    flops = [one.flops_per_step * length for one, length in zip(parts, lengths, strict=False)]
    flops.append(sum(one.flops_per_step for one in last) / 2 * lengths[-1])
    assert [phase.flops for phase in found.phases] == flops and found.flops_of_run == sum(flops)
    memories = [max(stage.memory.total for stage in one.stages) for one in [*parts, last[1]]]
    assert [phase.memory for phase in found.phases] == memories
    assert max(stage.memory.total for stage in found.stages) == max(memories)
    text = found.text()
    assert "1-2 " in text and "1:50% 2:50%" in text and max(map(len, text.splitlines())) <= 80
    assert not plan_run(changing, lambda recipe: (None, ()), max(memories)).fits
    content = json.loads(found.as_json())
    assert content["flops_of_run"] == sum(flops) and content["phases"][-1]["passes"] == {"1": 0.5, "2": 0.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sleep.passes={10: 2}", "sleep.passes={'10': 2}: write what it is in the first steps, too, as 0: VALUE"),
        ("sleep.passes={0: 1, 7: 2}", "sleep.passes changes after 7 steps, but train.steps=7"),
        ("sleep.passes={0: 0, 2: 2}", "after 0 steps: sleep.passes: Input should be greater than or equal to 1"),
        ("sleep.passes={0: 1, later: 2}", "sleep.passes: later is neither a number of steps nor of tokens"),
        ("model.window={0: 24, 4: 0}", "model.window=0"),
        ("sleep.eviction={0: soft, 4: hard}", "after 0 steps: sleep.eviction"),
        ("sleep.write={0: every, 4: last}", "sleep.write"),
        ("sleep.pass_weights=[1, 2]", "pass_weights=[1.0, 2.0] are 2, passes=2 has 1: write one for each"),
        ("train.steps=many tokens", "train.steps: many tokens is neither"),
        ("model.window={0: 9, 4: 12}", "model.window=9 must divide"),
    ],
)
def test_a_wrong_value_is_refused_before_any_process_starts(folder, capfd, monkeypatch, override, words):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", "parallel.data=2", override], capfd, words)
