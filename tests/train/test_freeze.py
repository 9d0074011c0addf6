"""Frozen weights: the others train as if those had a learning rate of zero, to the bit, in every layout; and no wrong pattern."""

import json
import shutil

import pytest
import torch

from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.config import OptimizerConfig
from powernap.train.optimizer import build_optimizer
from powernap.train.run.folder import RunFolder
from tests.helpers import runs, tiny
from tests.helpers.cases import asked_for, names

STEPS = 6
FIRST = ["embedding", "decoder.layers.0"]  # all of the first of two stages
SOME = ["decoder.layers.*.mlp", "output_layer", "decoder.layers.1.self_attention.A_log"]
# name: processes, what is frozen, overrides
LAYOUTS = {
    "zero3": (2, FIRST, ["parallel.data=2", "zero.stage=3"]),
    "sequence": (
        2,
        ["*norm*", "embedding", "decoder.layers.0.self_attention", "decoder.layers.0.mlp"],
        ["parallel.tensor=2", "parallel.sequence=true"],
    ),
}
WIDE = {
    "one": (1, SOME, []),
    "pipeline": (2, FIRST, ["parallel.pipeline=2"]),
    "tensor_pipeline": (4, SOME, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "zero1": (2, FIRST, ["parallel.data=2"]),
    "zero2": (2, SOME, ["parallel.data=2", "zero.stage=2"]),
    "bf16": (2, FIRST, ["parallel.pipeline=2", "train.precision=bf16"]),
    "offload": (2, SOME, ["parallel.data=2", "zero.offload=true"]),
    "tensor": (2, SOME, ["parallel.tensor=2"]),
    "tied": (2, ["embedding"], ["parallel.pipeline=2", "model.tie_embeddings=true"]),
}
# name: run that is resumed, processes, overrides
RESUMED = {
    "pipeline_from_data": ("zero3", 2, ["parallel.pipeline=2"]),
}
WIDE_RESUMED = {
    "one_from_four": ("tensor_pipeline", 1, []),
    "data_from_pipeline": ("pipeline", 2, ["parallel.data=2", "zero.stage=3"]),
    "tensor_from_data": ("zero2", 2, ["parallel.tensor=2"]),
}


def frozen(patterns: list[str]) -> str:
    return f"train.freeze={json.dumps(patterns)}"


def still(patterns: list[str]) -> str:
    """The same weights with a learning rate of zero."""
    return f"optimizer.groups={json.dumps({pattern: {'lr': 0.0} for pattern in patterns})}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freeze")
    # The norm that clips is that of what is trained: the two runs would differ.
    optimizer = {"clip": 0.0, "lr": 2.0e-3}
    train = {"steps": STEPS, "global_batch_size": 8}
    checkpoint = {"every": STEPS // 2, "keep_last": 3}
    sections = {"train": train, "checkpoint": checkpoint, "optimizer": optimizer, "model": {"vocab_size": 16}}
    runs.prepare(folder, evaluation={"every": None}, **sections)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    """name -> the folder of that run; of a layout also NAME_still."""
    sources = (source for source, *_ in asked_for(request, RESUMED | WIDE_RESUMED).values())
    return train_all(folder, asked_for(request, LAYOUTS | WIDE, "zero3", *sources))


def train_all(folder, layouts, more=()):
    found = {}
    for processes in (1, 2, 4):
        chosen = {}
        for name, (needs, patterns, overrides) in layouts.items():
            if needs == processes:
                chosen[name] = [*overrides, frozen(patterns), *more]
                chosen[f"{name}_still"] = [*overrides, still(patterns), *more]
        found |= runs.train_in_turn(folder, processes, chosen)
    return found


def is_frozen(recipe, name):
    return not recipe.train.trains(name)


@pytest.mark.parametrize("name", names(LAYOUTS, WIDE))
def test_the_others_train_as_if_the_frozen_ones_had_a_learning_rate_of_zero(trained, name):
    assert_trained_alike(trained, name, STEPS // 2)


@pytest.mark.wide  # the same for fifty steps
def test_so_they_do_for_fifty_steps(folder):
    trained = train_all(folder, LAYOUTS | WIDE, ["run.root=long", "train.steps=50", "checkpoint.every=25"])
    for name in LAYOUTS | WIDE:
        assert_trained_alike({n: folder / "long" / path.name for n, path in trained.items()}, name, 25)


def assert_trained_alike(trained, name, half):
    weights, expected = runs.weights(trained[name]), runs.weights(trained[f"{name}_still"])
    before = Checkpoint.open(trained[name] / "checkpoints" / f"step_{half:08}")
    recipe = RunFolder(trained[name]).recipe()
    assert 0 < sum(is_frozen(recipe, n) for n in weights) < len(weights)
    for parameter, value in weights.items():
        if name == "bf16" and is_frozen(recipe, parameter):  # it has no float32 master weights
            assert torch.equal(value, expected[parameter].bfloat16().float())
        else:
            assert torch.equal(value, expected[parameter]), parameter
        assert torch.equal(value, before.whole(parameter)) == is_frozen(recipe, parameter), parameter


def test_a_frozen_run_has_no_states_of_what_is_frozen_and_says_what_it_trains(trained):
    checkpoint = RunFolder(trained["zero3"]).newest_checkpoint()
    for name, entry in checkpoint.manifest["parameters"].items():
        assert (entry["group"] is None) == name.startswith(("embedding", "decoder.layers.0."))
    log = (trained["zero3"] / "logs" / "train.log").read_text()
    assert "trains 12,212 of 23,028 parameters, in 12 of 19 tensors" in log


@pytest.fixture(scope="module")
def resumed(request, folder, trained):
    """name -> the folder of that run, which went on from the middle."""
    found = {}
    for processes in (1, 2):
        for name, (source, needs, overrides) in asked_for(request, RESUMED | WIDE_RESUMED).items():
            if needs != processes:
                continue
            shutil.copytree(trained[source], folder / "again" / source)
            shutil.rmtree(folder / "again" / source / "checkpoints" / f"step_{STEPS:08}")
            _, patterns, its = (LAYOUTS | WIDE)[source]
            own = [one for one in its if not one.startswith(("parallel.", "zero."))]
            again = [*own, *overrides, frozen(patterns), "run.root=again", "--resume"]
            runs.train_in_turn(folder, processes, {source: again})
            found[name] = folder / "again" / source
    return found


@pytest.mark.parametrize("name", names([], RESUMED | WIDE_RESUMED))
def test_a_checkpoint_of_a_frozen_run_goes_on_in_another_layout(trained, resumed, name):
    source = (RESUMED | WIDE_RESUMED)[name][0]
    weights, expected = runs.weights(resumed[name]), runs.weights(trained[source])
    recipe = RunFolder(trained[source]).recipe()
    for parameter, value in weights.items():
        if is_frozen(recipe, parameter):
            assert torch.equal(value, expected[parameter])
        else:
            torch.testing.assert_close(value, expected[parameter], rtol=0, atol=1e-5)


def test_another_run_may_start_from_it_and_train_what_was_frozen(folder, trained):
    chosen = {
        "all": ["train.start_from=zero3", "train.steps=1", "optimizer.warmup_steps=1"],
        "fewer": ["train.start_from=zero3", "train.start_optimizer=true", frozen([*FIRST, "output_layer"])],
    }
    started = runs.train_in_turn(folder, 1, chosen)
    before, after = runs.weights(trained["zero3"]), runs.weights(started["all"])
    assert not any(torch.equal(before[name], after[name]) for name in before)
    after = runs.weights(started["fewer"])
    assert torch.equal(before["output_layer.weight"], after["output_layer.weight"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.freeze=[embeding]"], "train.freeze: embeding matches no trained parameter; near names are embedding"),
        (
            ["train.only=[decoder.layers.7]"],
            "train.only: decoder.layers.7 matches no trained parameter; near names are",
        ),
        (["train.freeze=[embedding,decoder,output_layer]"], "matches all 19 parameters: nothing is left to train"),
        (["train.only=['*']"], "train.only=['*'] matches all 19 parameters: write null, which trains all"),
        (["train.freeze=[]"], "train.freeze=[]"),
        (["train.freeze=[embedding]", "train.only=[decoder]"], "freeze and only are both given"),
        (["optimizer.groups={decoder.layer: {lr: 0.1}}"], "optimizer.groups: decoder.layer matches no trained"),
        (
            ["optimizer.groups={embedding: {lr: 0.1}}", "train.freeze=[embedding]"],
            "optimizer.groups: embedding matches no trained parameter",
        ),
        (
            ["optimizer.groups={decoder: {lr: 0.1}, '*.mlp': {lr: 0.1}}"],
            "decoder.layers.0.mlp.linear_fc1.weight is in two groups, decoder and *.mlp",
        ),
        (["optimizer.groups={embedding: {momentum: 0.1}}"], "optimizer.groups.embedding.momentum"),
        (
            ["run.name=zero3", "train.freeze=[embedding]", "--resume"],
            "train.freeze=['embedding'] cannot change on --resume",
        ),
        (
            ["train.start_from=zero3", "train.start_optimizer=true"],
            "step_00000006 has no states of embedding.weight, decoder.layers.0.",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_pattern_is_refused_before_any_process_starts(folder, trained, capfd, monkeypatch, overrides, words):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", "parallel.data=2", *overrides], capfd, words)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_group_has_its_settings_and_the_others_theirs(topology, name):
    model = tiny.model_config()
    group = {"lr": 0.5, "weight_decay": 0.25, "betas": [0.5, 0.75]}
    config = OptimizerConfig(name=name, groups={"decoder.layers.1.mlp": {"lr": 0.0}, "*norm*": group})
    stage = tiny.build_stage(topology, model)
    optimizer = build_optimizer(stage, config, lambda name: name != "embedding.weight")
    usual = config.muon_lr if name == "muon" else config.lr
    found = {}
    for settings in optimizer.param_groups:
        for parameter in settings["params"]:
            found[id(parameter)] = settings["peak_lr"], settings["weight_decay"], settings.get("betas")
    for parameter_name, parameter in stage.named_parameters():
        if parameter_name == "embedding.weight":
            assert id(parameter) not in found and not parameter.requires_grad
            continue
        lr, decay, betas = found[id(parameter)]
        if "norm" in parameter_name:
            assert (lr, decay, betas) == (0.5, 0.25, (0.5, 0.75))
        elif ".1.mlp." in parameter_name:
            assert (lr, decay) == (0.0, config.weight_decay)
        elif parameter.ndim == 2 and parameter_name.startswith("decoder"):
            assert (lr, decay) == (usual, config.weight_decay)
        else:
            assert lr == config.lr
