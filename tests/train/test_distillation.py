"""Distillation while a model is retrofitted: the same in every layout, resumed, by step, planned; and what does not fit."""

import shutil

import pytest

from powernap.model.parameters import parameters
from powernap.parallel.planning.memory import stage_memory
from powernap.parallel.planning.plan import plan
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train.distillation import build_teacher
from powernap.train.recipe_file import RecipeError, load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs
from tests.helpers.cases import asked_for, names

STEPS = 4
SOURCE = ["model.pattern=AA", "sleep.passes=1", "model.window=32", "sleep.eviction=sliding", "model.hidden_size=24"]
RETROFIT = [
    "train.start_from=base", "model.pattern=AgAg", "train.insert=[1, 3]", "distillation.teacher=base", "model.hidden_size=24",
]  # fmt: skip
SEQUENCE = [*RETROFIT, "distillation.context=sequence", "distillation.temperature=2"]
# name: processes, what it is compared with, overrides
RUNS = {
    "window": (1, None, RETROFIT),
    "sequence": (1, None, [*SEQUENCE, "distillation.weight={0: 0.5, 2: 0}"]),
    "alone": (1, None, RETROFIT[:3] + RETROFIT[4:]),
    "zero3": (2, "window", [*RETROFIT, "parallel.data=2", "zero.stage=3"]),
    "tensor": (2, "sequence", [*SEQUENCE, "distillation.weight={0: 0.5, 2: 0}", "parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, "window", [*RETROFIT, "parallel.pipeline=2"]),
    "bf16": (2, "window", [*RETROFIT, "parallel.pipeline=2", "train.precision=bf16"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    train = {"steps": STEPS, "log_every": 1, "global_batch_size": 8}
    sections = {"train": train, "checkpoint": {"every": 2}, "model": {"vocab_size": 16}}
    runs.prepare(folder, train_samples=128, evaluation={"every": None}, **sections)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    found = runs.train_in_turn(folder, 1, {"base": SOURCE})
    asked = asked_for(request, RUNS, "window", "sequence", "alone")
    for processes in (1, 2):
        found |= runs.train_in_turn(folder, processes, {n: o for n, (p, _, o) in asked.items() if p == processes})
    return found


def metrics_of(run, name):
    return [record.get(name) for record in read_metrics(run / "metrics.jsonl")]


def test_at_first_the_model_is_its_teacher_within_a_window(trained):
    """Inserted blocks add nothing, so the divergence is zero; then it is not, and the loss has other gradients."""
    found = metrics_of(trained["window"], "loss/distillation")
    assert abs(found[0]) < 1e-6 and min(found[1:]) > 1e-6
    assert metrics_of(trained["window"], "loss")[0] == metrics_of(trained["alone"], "loss")[0]
    assert metrics_of(trained["window"], "loss")[2] != pytest.approx(metrics_of(trained["alone"], "loss")[2], rel=1e-6)
    assert "distillation: the teacher is " in (trained["window"] / "logs" / "train.log").read_text()


def test_a_weight_of_zero_lets_the_teacher_rest(trained):
    found = metrics_of(trained["sequence"], "loss/distillation")
    assert min(found[:2]) > 1e-6 and found[2:] == [None, None]


@pytest.mark.parametrize("name", names(["tensor"], [name for name, (_, other, _) in RUNS.items() if other]))
def test_every_layout_trains_the_same(trained, name):
    bound = 0.02 if name == "bf16" else 1e-5
    for metric in ("loss", "grad_norm"):
        expected = metrics_of(trained[RUNS[name][1]], metric)
        assert metrics_of(trained[name], metric) == pytest.approx(expected, rel=bound * (10 if metric != "loss" else 1))
    found, expected = (metrics_of(trained[n], "loss/distillation")[:2] for n in (name, RUNS[name][1]))
    assert found == pytest.approx(expected, rel=20 * bound, abs=bound)


@pytest.mark.faults
def test_a_run_that_is_resumed_goes_on_with_its_teacher(folder, trained):
    expected = metrics_of(trained["window"], "loss")
    shutil.copytree(trained["window"], folder / "again" / "window")
    shutil.copytree(trained["base"], folder / "again" / "base")
    shutil.rmtree(folder / "again" / "window" / "checkpoints" / f"step_{STEPS:08}")
    found = runs.train_in_turn(folder, 1, {"window": [*RETROFIT, "run.root=again", "--resume"]})
    assert found and metrics_of(folder / "again" / "window", "loss") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plan_counts_the_teachers_weights(folder, trained, topology, monkeypatch, precision):
    monkeypatch.chdir(folder)
    recipe, plain = (
        load_recipe("tiny.yaml", ["run.name=new", f"train.precision={precision}", *overrides])
        for overrides in (RETROFIT, RUNS["alone"][2])
    )
    stage = build_teacher(recipe, topology).stage
    tensors = [*stage.parameters(), *(v for m in stage.modules() for v in getattr(m, "unrounded", {}).values())]
    segments = segments_of(recipe)
    memory, without = stage_memory(recipe, segments, 0), stage_memory(plain, segments, 0)
    assert memory.weights - without.weights == sum(tensor.nbytes for tensor in tensors) > 0
    rows = stage.model.hidden_size * recipe.micro_batch_size * sum(len(s.tokens) for s in segments if s.predicts)
    assert memory.segments - without.segments == rows * stage.like.element_size()
    assert not any(parameter.requires_grad for parameter in stage.parameters())


def test_plan_counts_a_stages_part_and_the_teachers_flops(folder, trained, monkeypatch):
    monkeypatch.chdir(folder)
    layout = ["run.name=new", "parallel.tensor=2", "parallel.pipeline=2", "train.recompute=none"]
    recipe, plain = (load_recipe("tiny.yaml", [*layout, *overrides]) for overrides in (RETROFIT, RUNS["alone"][2]))
    whole = parameters(recipe.teacher.model, recipe.teacher.sleep, range(2))
    more = [
        one.memory.weights - other.memory.weights
        for one, other in zip(plan(recipe).stages, plan(plain).stages, strict=True)
    ]
    assert sum(more) == 4 * sum(weight.size(2) for weight in whole)
    segments = segments_of(recipe, [True, True])
    # Forward alone: a third of what a step of the teacher's own would compute.
    expected = step_flops(
        recipe.teacher.model_copy(update={"train": recipe.train}), teachers := segments_of(recipe, [True, True])
    )
    assert len(teachers) == 2
    assert step_flops(recipe, segments) - step_flops(plain, segments) == pytest.approx(expected / 3, rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distillation.teacher=nowhere"], "distillation.teacher=nowhere: no run below run.root=runs"),
        (["model.vocab_size=18"], "distillation.teacher=base: has model.vocab_size=16, this recipe 18"),
        (["model.pattern=AgAgA", "parallel.pipeline=3", "train.global_batch_size=9"], "distillation.teacher=base: parallel.pipeline=3 exceeds the 2 blocks"),
        (["distillation.context=sequence", "data.documents=separate", "data.sequence_length=25"], "write distillation.context=window"),
        (["distillation.weight=-1"], "distillation.weight=-1"),
        (["distillation.weight={1: 0.5}"], "write what it is in the first steps, too"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_before_any_process_starts(
    folder, trained, capfd, monkeypatch, overrides, words
):
    monkeypatch.chdir(folder)
    teacher = ["distillation.teacher=base", "model.pattern=AgAg"]
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", *teacher, *overrides], capfd, words)


def test_another_teacher_on_resume_is_refused(folder, trained, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = load_recipe("tiny.yaml", ["run.name=window", *RETROFIT, "distillation.temperature=3"])
    with pytest.raises(RecipeError, match="distillation.temperature=3.0 cannot change on --resume"):
        RunFolder(recipe.run_folder).check_start(recipe, resume=True)
    recipe = load_recipe("tiny.yaml", ["run.name=window", *RETROFIT, f"distillation.weight={{0: 1, {STEPS - 1}: 0}}"])
    with pytest.raises(RecipeError, match="distillation.weight"):
        RunFolder(recipe.run_folder).check_start(recipe, resume=True)
