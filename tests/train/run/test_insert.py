"""Blocks inserted between those of a source change nothing at first: logits to the bit, the first loss in every layout."""

import json

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train import trainer
from powernap.train.recipe_file import load_recipe
from powernap.train.run.start import Source, Start
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import hugging_face, runs
from tests.helpers.cases import asked_for, names

SOURCES = {
    "attention": ["model.pattern=AA", "sleep.passes=1"],
    "hybrid": ["model.pattern=AG"],
}
ALONE = ["train.steps=2", "optimizer.warmup_steps=1"]
# name: processes, source, overrides
INSERTED = {
    "one": (1, "attention", ["model.pattern=AgAG", "train.insert=[1,3]"]),
    "hybrid": (1, "hybrid", ["model.pattern=gAMG", "train.insert=[0,2]"]),
    "bf16": (1, "attention", ["model.pattern=AAgA", "train.insert=[1,2]", "train.precision=bf16"]),
    "zero3": (2, "attention", ["model.pattern=AgAG", "train.insert=[1,3]", "parallel.data=2", "zero.stage=3"]),
    "pipeline": (2, "attention", ["model.pattern=AgAG", "train.insert=[1,3]", "parallel.pipeline=2"]),
}
WIDE = {
    "norms": (1, "attention", ["model.pattern=AAG", "train.insert=[2]", "model.gdn.norms=sandwich"]),
    "tensor": (2, "hybrid", ["model.pattern=AgGg", "train.insert=[1,3]", "parallel.tensor=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("insert")
    train = {"steps": 4, "log_every": 1, "global_batch_size": 8}
    mamba = {"groups": 2, "heads": 2, "head_dim": 8, "state_dim": 8}
    sections = {"train": train, "checkpoint": {"every": 1}, "model": {"vocab_size": 16, "mamba2": mamba}}
    runs.prepare(folder, evaluation={"every": None}, **sections)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    """name -> the folder of that run of SOURCES, INSERTED or WIDE, or of NAME_plain: from the source as it is, in the same layout."""
    found = runs.train_in_turn(folder, 1, SOURCES)
    for processes in (1, 2):
        chosen = {}
        for name, (needs, source, overrides) in asked_for(request, INSERTED | WIDE).items():
            if needs == processes:
                start = [f"train.start_from={source}", *ALONE]
                layout = [one for one in overrides if not one.startswith(("model.", "train.insert"))]
                chosen |= {f"{name}_new": [*start, *overrides], f"{name}_plain": [*start, *SOURCES[source], *layout]}
        found |= runs.train_in_turn(folder, processes, chosen)
    return found


@pytest.mark.parametrize("name", names(["zero3"], INSERTED | WIDE))
def test_the_first_loss_is_the_sources_and_then_the_blocks_learn(trained, name):
    losses, expected = (
        [line["loss"] for line in read_metrics(trained[f"{name}_{kind}"] / "metrics.jsonl")]
        for kind in ("new", "plain")
    )
    assert losses[0] == expected[0]
    assert losses[1] != expected[1]
    first, second = (Checkpoint.open(trained[f"{name}_new"] / "checkpoints" / f"step_{step:08}") for step in (1, 2))
    for block in json.loads((INSERTED | WIDE)[name][2][1].partition("=")[2]):
        inside = f"decoder.layers.{block}.self_attention.out_proj.weight"
        before = f"decoder.layers.{block}.input_layernorm.weight"  # its gradient is zero until the projection is not
        assert first.whole(inside).any()
        assert not torch.equal(first.whole(before), second.whole(before))


def logits_of(folder, overrides, topology, tokens, passes):
    """Of every token, from the weights that a run of the recipe starts with."""
    recipe = load_recipe(str(folder / "tiny.yaml"), overrides)
    source = Source.find(recipe)
    source.check(recipe)
    stage, zero = trainer.build(recipe, topology, Start(source, recipe, topology))
    zero.engine.destroy()
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, -recipe.model.window :] = True
    segments = plan_segments(tokens, loss_mask, recipe.model, recipe.sleep, passes)
    found = []
    token_losses = stage.token_losses

    def keep(hidden_states, *arguments, **options):
        found.append(stage.logits(hidden_states))
        return token_losses(hidden_states, *arguments, **options)

    stage.token_losses = keep
    with torch.no_grad():
        sleep_and_predict(stage, segments, tokens, loss_mask, recompute="none")
    return torch.cat(found)


@pytest.mark.parametrize(
    ("source", "overrides", "passes"),
    [
        ("attention", ["model.pattern=AgAG", "train.insert=[1,3]"], 1),
        ("attention", ["model.pattern=AgAG", "train.insert=[1,3]", "sleep.eviction=sliding"], 1),
        ("attention", ["model.pattern=GAgA", "train.insert=[0,2]"], 3),  # sleeping writes what nothing reads
        ("hybrid", ["model.pattern=gAGM", "train.insert=[0,3]"], 2),
    ],
)
def test_logits_are_the_sources_to_the_bit(folder, trained, topology, monkeypatch, source, overrides, passes):
    monkeypatch.chdir(folder)
    tokens = torch.randint(1, 15, (3, 37), generator=torch.Generator().manual_seed(1))
    plain = [*SOURCES[source], *(one for one in overrides if one.startswith("sleep."))]
    start = [f"train.start_from={source}"]
    expected = logits_of(folder, [*start, *plain], topology, tokens, passes if source == "hybrid" else 1)
    assert torch.equal(logits_of(folder, [*start, *overrides], topology, tokens, passes), expected)
    assert expected.abs().max() > 0.1


def test_without_zeros_the_logits_are_others(folder, trained, topology, monkeypatch):
    monkeypatch.chdir(folder)
    tokens = torch.randint(1, 15, (3, 37), generator=torch.Generator().manual_seed(1))
    overrides = ["train.start_from=attention", "model.pattern=AgAG", "train.insert=[1,3]"]
    expected = logits_of(folder, overrides, topology, tokens, 1)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    assert not torch.allclose(logits_of(folder, overrides, topology, tokens, 1), expected)


def test_a_model_in_hugging_faces_format_takes_them_too(folder, topology, tmp_path):
    hugging_face.make("qwen3", tmp_path)
    section = hugging_face.HuggingFaceFolder.read(tmp_path).section
    sizes = {"heads": 2, "key_dim": 8, "value_dim": 8}
    tokens = torch.randint(1, 64, (2, 49), generator=torch.Generator().manual_seed(1))

    def logits(pattern, *overrides):
        model = json.dumps({**section, "pattern": pattern, "gdn": sizes, "window": 24})
        fields = [
            f"model={model}",
            "model.pad_token_id=null",
            f"train.start_from={tmp_path}",
            "sleep.passes=1",
            *overrides,
        ]
        return logits_of(folder, fields, topology, tokens, 1)

    assert torch.equal(logits("AAgAAG", "train.insert=[2,5]"), logits("AAAA"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pattern=AgA", "train.insert=[1]"], "insert=[1]: write train.start_from"),
        (["model.pattern=AgA", "train.insert=[3]", "train.start_from=attention"], "write each block once, from 0 to 2"),
        (["model.pattern=AgA", "train.insert=[1,1]", "train.start_from=attention"], "write each block once"),
        (["model.pattern=Ag", "train.insert=[0,1]", "train.start_from=attention"], "no block is left"),
        (
            ["model.pattern=AgA", "train.insert=[0]", "train.start_from=attention"],
            "train.insert=[0]: model.pattern=AgA without them is gA, attention has AA",
        ),
        (["model.pattern=AgA", "train.start_from=attention"], "train.start_from=attention"),
        (
            ["model.pattern=AgA", "train.insert=[1]", "train.start_from=attention", "train.start_optimizer=true"],
            "step_00000004 has no decoder.layers.1.self_attention",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_insertion_that_does_not_fit_is_refused_before_any_process_starts(
    folder, trained, capfd, monkeypatch, overrides, words
):
    monkeypatch.chdir(folder)
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", "parallel.data=2", *overrides], capfd, words)
