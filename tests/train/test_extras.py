"""z-loss, running mean of the weights, gradient noise scale: each against its formula, in several layouts."""

import pytest
import torch

from powernap.launch import cli
from powernap.model.batch import plan_segments
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.shards import Split
from powernap.parallel.planning.memory import state_bytes
from powernap.train.data.loader import training_batches
from powernap.train.generation.export import ExportedWeights
from powernap.train.numerics.gradient_noise import GradientNoise
from powernap.train.recipe_file import load_recipe
from powernap.train.tracking.metrics import read_metrics
from tests.helpers import runs, tiny
from tests.helpers.cases import asked_for, names
from tests.parallel.planning import test_plan

STEPS, DECAY = 4, 0.75
EMA = [f"train.ema={DECAY}"]
EVEN = "model.vocab_size=16"  # its signal is a small difference: with other weights bf16 loses more of it
NOISE = ["train.gradient_noise=true", "train.steps=2", EVEN]
# name: processes, overrides
RUNS = {
    "ema": (1, EMA),
    "ema_muon": (1, [*EMA, "optimizer.name=muon", "train.freeze=[embedding]"]),
    "ema_zero2": (2, [*EMA, "parallel.data=2", "zero.stage=2"]),
    "ema_zero3": (2, [*EMA, "parallel.data=2", "zero.stage=3"]),
    "ema_offload": (2, [*EMA, "parallel.data=2", "zero.offload=true"]),
    "ema_bf16": (2, [*EMA, "parallel.pipeline=2", "train.precision=bf16"]),
    "z": (1, ["train.z_loss=0.1"]),
    "z_tensor": (2, ["train.z_loss=0.1", "parallel.tensor=2"]),
    "z_zero": (2, ["train.z_loss=0.1", "parallel.data=2", "zero.stage=2"]),
    "no_z": (1, []),
    "noise": (2, [*NOISE, "parallel.data=2"]),
    "noise_zero3": (2, [*NOISE, "parallel.data=2", "zero.stage=3"]),
    "noise_tensor": (4, [*NOISE, "parallel.data=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "noise_pipeline": (4, [*NOISE, "parallel.data=2", "parallel.pipeline=2", "train.precision=bf16"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extras")
    train = {"steps": STEPS, "global_batch_size": 8, "log_every": 1}
    sections = {"train": train, "checkpoint": {"every": 1, "keep_last": STEPS}, "model": {"vocab_size": 17}}
    runs.prepare(folder, evaluation={"every": None}, optimizer={"hold": 1.0}, **sections)
    return folder


@pytest.fixture(scope="module")
def trained(request, folder):
    found, asked = {}, asked_for(request, RUNS, "ema_muon", "ema_zero3", "z", "z_tensor", "no_z")
    for processes in (1, 2, 4):
        found |= runs.train_in_turn(folder, processes, {n: o for n, (p, o) in asked.items() if p == processes})
    return found


def checkpoint(run, step=STEPS):
    return Checkpoint.open(run / "checkpoints" / f"step_{step:08}")


@pytest.mark.parametrize("name", names(["ema_zero3"], ["ema_muon", "ema_bf16", "ema", "ema_zero2", "ema_offload"]))
def test_the_running_mean_is_that_of_the_weights_after_every_step(trained, name):
    steps = [checkpoint(trained[name], step) for step in range(1, STEPS + 1)]
    trained_names = [n for n, entry in steps[0].manifest["parameters"].items() if entry["group"] is not None]
    assert len(trained_names) >= len(steps[0].parameters) - 1
    for parameter in trained_names:
        mean = steps[0].whole(parameter)
        for step in steps[1:]:
            mean = DECAY * mean + (1 - DECAY) * step.whole(parameter)
        torch.testing.assert_close(steps[-1].whole(parameter, "ema"), mean, rtol=0, atol=1e-6)
        assert not torch.equal(mean, steps[-1].whole(parameter))


def test_the_running_mean_goes_on_in_another_layout(folder, trained):
    runs.train_in_turn(folder, 1, {"ema_zero3": ["train.steps=6", *EMA, "--resume"]})
    mean, weights = checkpoint(trained["ema_zero3"]), checkpoint(trained["ema_zero3"], 5)
    for name in weights.parameters:
        expected = DECAY * mean.whole(name, "ema") + (1 - DECAY) * weights.whole(name)
        torch.testing.assert_close(weights.whole(name, "ema"), expected, rtol=0, atol=1e-6)


def test_an_export_has_the_running_mean_when_asked_for(folder, trained, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["checkpoint", "export", "ema_muon", "averaged", "--ema"]) == 0
    exported, source = ExportedWeights(folder / "averaged"), checkpoint(trained["ema_muon"])
    for name in exported.shapes:
        kind = "master" if name == "embedding.weight" else "ema"
        assert torch.equal(exported.shard(name, None, 0, 1), source.whole(name, kind))
    capfd.readouterr()
    runs.assert_refused(["checkpoint", "export", "z", "none", "--ema"], capfd, "was trained without train.ema")


def test_plan_counts_the_running_mean():
    plain, averaged = test_plan.recipe(), test_plan.recipe(train={"ema": 0.9})
    count = sum(weight.size() for weight in test_plan.whole(plain))
    more = (
        state_bytes(averaged, test_plan.whole(plain)).optimizer - state_bytes(plain, test_plan.whole(plain)).optimizer
    )
    assert 4 * count <= more <= 4 * (count + 4)


def test_the_gradient_is_that_of_loss_and_squared_log_of_the_sum(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    (segment,) = [s for s in plan_segments(tokens, loss_mask, stage.model, stage.sleep, 1) if s.predicts]
    hidden_states, _ = stage(segment, tokens[:, :-1], None, stage.empty_layer_states(3))
    hidden_states = hidden_states.detach()
    targets, loss_mask = tokens[:, 1:][:, segment.where], loss_mask[:, 1:][:, segment.where]
    head = stage.output_layer.weight
    plain = stage.token_losses(hidden_states, targets, loss_mask)
    logits = stage.logits(hidden_states).transpose(0, 1)
    formula = torch.nn.functional.cross_entropy(logits[loss_mask], targets[loss_mask], reduction="sum")
    formula = formula + 0.3 * logits[loss_mask].logsumexp(-1).square().sum()
    (expected,) = torch.autograd.grad(formula, head)
    stage.z_loss = 0.3
    for recompute in (False, True):
        losses = stage.token_losses(hidden_states, targets, loss_mask, recompute=recompute)
        assert torch.equal(losses, plain)  # what is logged is the cross-entropy alone
        (found,) = torch.autograd.grad(losses.sum(), head)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    stage.z_loss = 0.0
    (without,) = torch.autograd.grad(stage.token_losses(hidden_states, targets, loss_mask).sum(), head)
    assert (without - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", names(["z_tensor"], ["z_zero"]))
def test_z_loss_is_the_same_in_other_layouts(trained, name):
    found, expected, without = (
        [r["loss"] for r in read_metrics(trained[n] / "metrics.jsonl")] for n in (name, "z", "no_z")
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] == pytest.approx(without[0], rel=1e-5) and found[-1] != pytest.approx(without[-1], rel=1e-4)


def test_a_padded_vocabulary_is_saved_without_pads(trained):
    """Two tensor ranks do not divide the 17 tokens."""
    padded, plain = checkpoint(trained["z_tensor"]), checkpoint(trained["z"])
    for name in ("embedding.weight", "output_layer.weight"):
        assert padded.manifest["parameters"][name] == plain.manifest["parameters"][name]
        torch.testing.assert_close(padded.whole(name), plain.whole(name), rtol=0, atol=1e-4)
        last = padded.shard(name, Split(0, 1), 1, 2)
        assert len(last) == 9 and last[-1].abs().max() == 0 and torch.equal(last[:-1], padded.whole(name)[9:])


@pytest.mark.parametrize("name", names([], ["noise_zero3", "noise_tensor", "noise", "noise_pipeline"]))
def test_noise_is_that_of_the_ranks_gradients(folder, trained, topology, monkeypatch, name):
    monkeypatch.chdir(folder)
    recipe = load_recipe("tiny.yaml", [EVEN])
    torch.manual_seed(0)
    stage = HybridStage(recipe.model, recipe.sleep, topology.groups)
    gradients, tokens = [], 0
    for rank in range(2):
        batch, _ = next(training_batches(recipe.data, batch_size=4, vocab_size=16, rank=rank, world_size=2, seed=0))
        segments = plan_segments(batch.tokens, batch.loss_mask, recipe.model, recipe.sleep, 2)
        loss = sleep_and_predict(stage, segments, batch.tokens, batch.loss_mask, recompute="none").loss
        tokens += int(batch.loss_mask[:, 1:].sum())
        gradients.append(torch.cat([g.flatten() for g in tiny.gradients(stage, loss).values()]))
    first, second = (2 * gradient / tokens for gradient in gradients)
    mean = (first + second).square().sum() / 4
    square = (first.square().sum() + second.square().sum()) / 2
    record = read_metrics(trained[name] / "metrics.jsonl")[0]
    bound = 0.05 if name == "noise_pipeline" else 1e-3  # bf16
    assert record["gradient_noise/signal"] == pytest.approx(float(2 * mean - square), rel=bound)
    assert record["gradient_noise/variance"] == pytest.approx(float(8 * (square - mean)), rel=bound)


def test_signal_and_variance_are_those_that_gradients_were_drawn_with():
    generator = torch.Generator().manual_seed(1)
    noise, true = GradientNoise(sequences=4, ranks=3), torch.linspace(-0.2, 0.2, 100)
    deviation, found = 0.5, {}
    for _ in range(50):
        drawn = true + deviation * torch.randn(3, 4, 100, generator=generator)
        ranks = drawn.mean(1)
        found = noise.add(float(ranks.square().sum(1).mean()), float(ranks.mean(0).norm()))
    expected = 100 * deviation**2 / float(true.square().sum())
    assert found["gradient_noise/scale"] == pytest.approx(expected, rel=0.1)
    assert noise.add(float("nan"), 1.0) == {}


def test_noise_needs_two_data_ranks(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    words = "train.gradient_noise=true compares the gradients of data ranks: write parallel.data=2 or more"
    runs.assert_refused(["train", "tiny.yaml", "run.name=refused", "train.gradient_noise=true"], capfd, words)
