"""The output head: on loss tokens alone, in chunks, outside the recomputed segment. In float64."""

import pytest
import torch
import torch.nn.functional as F

from powernap.model import stage as stage_module
from tests.helpers import mixers, plain, tiny

MODELS = {"untied": {}, "tied": {"tie_embeddings": True}}


@pytest.fixture
def window(topology):
    """-> (stage, hidden states that get a gradient, targets, loss mask with some tokens of each sequence)"""

    def make(**changes):
        stage = tiny.build_stage(topology, tiny.model_config(**changes))
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(tiny.WINDOW, 3, 16, dtype=torch.float64, generator=generator).requires_grad_()
        targets = torch.randint(1, 17, (3, tiny.WINDOW), generator=generator)
        return stage, hidden, targets, torch.rand(3, tiny.WINDOW, generator=generator) < 0.4

    return make


def by_hand(stage, hidden, targets, loss_mask):
    """Every token's logits."""
    losses = F.cross_entropy(plain.logits(stage, hidden.transpose(0, 1)).transpose(1, 2), targets, reduction="none")
    return losses * loss_mask


def head_weights(stage):
    head = stage.embedding if stage.model.tie_embeddings else stage.output_layer
    return [head.weight, stage.decoder.final_layernorm.weight]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("numbers", [2**26, 100, 17])
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_in_chunks(window, monkeypatch, model, numbers, recompute):
    monkeypatch.setattr(stage_module, "HEAD_NUMBERS", numbers)
    stage, hidden, targets, loss_mask = window(**MODELS[model])
    found = stage.token_losses(hidden, targets, loss_mask, recompute=recompute)
    expected = by_hand(stage, hidden, targets, loss_mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    mixers.assert_same_gradients(found.square().sum(), expected.square().sum(), [hidden, *head_weights(stage)], 1e-12)


@pytest.mark.parametrize("numbers", [2**26, 100])
def test_it_runs_on_loss_tokens_alone(window, monkeypatch, numbers):
    """Twice where it comes in chunks, and not once more with the segment."""
    monkeypatch.setattr(stage_module, "HEAD_NUMBERS", numbers)
    stage, *_ = window()
    seen = []
    stage.output_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    tokens, loss_mask = tiny.batch()
    loss_mask = tiny.thin_out(loss_mask, 1)
    count = int(loss_mask[:, 1:].sum())
    assert count < 0.8 * 3 * tiny.WINDOW
    for recompute in ("segment", "none"):
        seen.clear()
        tiny.run(stage, tokens, loss_mask, recompute=recompute).loss.backward()
        assert sum(seen) == (count if numbers > 100 else 2 * count) and (len(seen) == 1) == (numbers > 100)


def test_no_token_bears_loss(window):
    stage, hidden, targets, loss_mask = window()
    loss = stage.token_losses(hidden, targets, torch.zeros_like(loss_mask)).sum()
    gradients = torch.autograd.grad(loss, [hidden, *head_weights(stage)])
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_no_logits_are_kept(window):
    """What autograd saves does not grow with the vocabulary when they are recomputed, or come in chunks."""

    def saved(vocabulary, recompute):
        stage, hidden, targets, _ = window(vocab_size=vocabulary)
        sizes = []
        weights = {weight.data_ptr() for weight in stage.parameters()}

        def note(tensor):
            sizes.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            stage.token_losses(hidden, targets, torch.ones_like(targets, dtype=torch.bool), recompute=recompute).sum()
        return sum(sizes)

    assert saved(1000, True) == saved(17, True) < saved(17, False) < saved(1000, False) / 5
