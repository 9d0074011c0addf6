"""The checks that must always hold (method: arXiv 2605.26099), in float64."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from powernap.model.config import SleepConfig
from powernap.model.fast_weights import detach
from powernap.model.health import FastWeightHealth
from tests.helpers import plain, tiny


@pytest.mark.parametrize(
    ("recompute", "changes"),
    [
        ("segment", {}),
        ("none", {}),
        ("segment", {"tie_embeddings": True}),
        ("none", {"gdn": {"allow_neg_eigval": True}}),
    ],
)
def test_one_pass_equals_the_plain_hybrid(topology, recompute, changes):
    stage = tiny.build_stage(topology, model=tiny.model_config(**changes))
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch())
    with topology.device:
        logits = plain.hybrid(stage, tokens)
    expected = plain.loss(logits, tokens, loss_mask)
    output = tiny.run(stage, tokens, loss_mask, passes=1, recompute=recompute, predict=True)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, expected)) < 1e-12
    last = slice(2 * tiny.WINDOW, None)
    assert torch.equal(output.predictions[:, 1:][:, last], logits.argmax(-1)[:, last])
    assert (output.predictions[:, : 2 * tiny.WINDOW + 1] == -1).all()


def test_passes_are_the_recurrence_of_the_paper(topology):
    """N passes of the whole block stack written out by hand: hidden states fed back, fast weights carried."""
    stage = tiny.build_stage(topology)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=(1,)))
    first, second = tokens[:, : tiny.WINDOW], tokens[:, tiny.WINDOW : -1]
    window = stage._window(tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)[0], first)
    every = range(4)
    fast_weights = stage.empty_layer_states(len(tokens))
    hidden = stage._embed(first)
    for _ in range(3):
        hidden, fast_weights = stage.decoder(hidden, fast_weights, window, every)
    hidden, _ = stage.decoder(stage._embed(second), fast_weights, window, every)
    by_hand = stage.token_losses(hidden, tokens[:, tiny.WINDOW + 1 :], loss_mask[:, tiny.WINDOW + 1 :]).sum()
    output = tiny.run(stage, tokens, loss_mask, passes=3)
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-14)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, by_hand)) < 1e-13


def test_a_window_of_text_is_read_with_the_loss_and_then_slept_on(topology):
    """Written out by hand: reading writes too, each pass of sleep goes on from there, the first from the embeddings."""
    sleep = SleepConfig(every_window=True)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=(0, 1)))
    first, second = tokens[:, : tiny.WINDOW], tokens[:, tiny.WINDOW : -1]
    window = stage._window(tiny.plan_segments(tokens, loss_mask, stage.model, sleep, 1)[0], first)
    targets = tokens[:, 1:].split(tiny.WINDOW, dim=1)
    masks = loss_mask[:, 1:].split(tiny.WINDOW, dim=1)
    hidden, fast_weights = stage.decoder(stage._embed(first), stage.empty_layer_states(len(tokens)), window, range(4))
    by_hand = stage.token_losses(hidden, targets[0], masks[0]).sum()
    hidden = stage._embed(first)
    for _ in range(3):
        hidden, fast_weights = stage.decoder(hidden, fast_weights, window, range(4))
    hidden, _ = stage.decoder(stage._embed(second), fast_weights, window, range(4))
    by_hand = by_hand + stage.token_losses(hidden, targets[1], masks[1]).sum()
    output = tiny.run(stage, tokens, loss_mask, 3, sleep)
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-14)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, by_hand)) < 1e-13


@pytest.mark.parametrize("sleep", [SleepConfig(), SleepConfig(pass_norm=True, reinject_embeddings=True)])
@pytest.mark.parametrize("predicting", [(2,), (1, 2)])
def test_recomputation_changes_nothing(topology, sleep, predicting):
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = tiny.batch(predicting=predicting)
    results = [tiny.run(stage, tokens, loss_mask, 3, sleep, recompute=kind) for kind in ("segment", "none")]
    assert results[0].loss == results[1].loss
    assert tiny.largest_difference(*(tiny.gradients(stage, output.loss) for output in results)) < 1e-14


def by_hand(stage, tokens, loss_mask, passes, *, embeddings_again=False, last_write_alone=False):
    """One window slept on with `passes` of the whole stack, one answered from it, written out."""
    first, second = tokens[:, : tiny.WINDOW], tokens[:, tiny.WINDOW : -1]
    window = stage._window(tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)[0], first)
    every_block = replace(window, final_blocks=range(stage.model.num_layers))  # nothing is held back in here
    layer_states = stage.empty_layer_states(len(tokens))
    hidden = stage._embed(first)
    for number in range(passes):
        hidden, written = stage.decoder(hidden, layer_states, every_block, range(stage.model.num_layers))
        if embeddings_again:
            hidden = stage._embed(first)
        if not last_write_alone or number == passes - 1:
            layer_states = written
    hidden, _ = stage.decoder(stage._embed(second), layer_states, every_block, range(stage.model.num_layers))
    return stage.token_losses(hidden, tokens[:, tiny.WINDOW + 1 :], loss_mask[:, tiny.WINDOW + 1 :]).sum()


ABLATIONS = {
    "embeddings again": (SleepConfig(pass_input="embeddings"), {"embeddings_again": True}),
    "last write alone": (SleepConfig(write="last"), {"last_write_alone": True}),
}


@pytest.mark.parametrize("recompute", ["segment", "none"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_what_a_loop_by_hand_computes(topology, name, recompute):
    sleep, changes = ABLATIONS[name]
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=(1,)))
    loss = tiny.run(stage, tokens, loss_mask, 3, sleep, recompute=recompute).loss
    expected = by_hand(stage, tokens, loss_mask, 3, **changes)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert tiny.largest_difference(tiny.gradients(stage, loss), tiny.gradients(stage, expected)) < 1e-13
    for others in ({}, *(c for _, c in ABLATIONS.values() if c != changes)):  # each is told from the others
        assert abs(loss.item() - by_hand(stage, tokens, loss_mask, 3, **others).item()) > 1e-4
    assert tiny.run(stage, tokens, loss_mask, 1, sleep).loss == tiny.run(stage, tokens, loss_mask, 1).loss


def test_with_the_last_write_alone_reading_leaves_no_trace(topology):
    sleep = SleepConfig(every_window=True, write="last")
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=(0, 1)))
    layer_states = []
    tiny.run(stage, tokens, loss_mask, 2, sleep, health=Recorder(layer_states))
    assert all(
        (state == 0).all() for after_read_and_first_pass in layer_states[:2] for state in after_read_and_first_pass
    )
    assert all(state.abs().max() > 0 for state in layer_states[2])


class Recorder:
    """In place of FastWeightHealth: every segment's fast weights as they cross to the next."""

    def __init__(self, layer_states: list):
        self.layer_states = layer_states

    def watch(self, segment):
        return nullcontext()

    def record(self, segment, layer_states):
        self.layer_states.append(layer_states)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"pass_norm": True}, "sleep.pass_norm=false"),
        ({"reinject_embeddings": True}, "sleep.reinject_embeddings=false"),
        ({"loop_range": (1, 3)}, "sleep.loop_range=null"),
        ({"write": "last"}, "sleep.write=every"),
    ],
)
def test_embeddings_again_are_refused_where_they_mean_nothing(changes, word):
    with pytest.raises(ValueError, match=word):
        SleepConfig(pass_input="embeddings", **changes)


def test_evicted_tokens_reach_the_answers_through_the_fast_weights_only(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    changed = tokens.clone()
    changed[:, : tiny.WINDOW] = tokens[:, : tiny.WINDOW].flip(1)

    def loss(tokens, **options):
        return tiny.run(stage, tokens, loss_mask, passes=2, **options).loss.item()

    def cut(fast_weights):
        return tuple(torch.zeros_like(state) for state in fast_weights)

    assert abs(loss(tokens) - loss(changed)) > 1e-6
    assert loss(tokens, between_windows=cut) == loss(changed, between_windows=cut)


def test_gradient_reaches_the_first_window_through_the_fast_weights(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    tokens[:, : tiny.WINDOW] = 16  # a token no other window holds: its embedding's gradient comes through S alone
    tokens[:, tiny.WINDOW :].clamp_(max=15)
    linked = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3).loss)["embedding.weight"][16]
    cut = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3, between_windows=detach).loss)
    assert linked.abs().max() > 1e-6
    assert cut["embedding.weight"][16].abs().max() == 0


def test_gradients_against_finite_differences(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    tiny.assert_finite_differences_agree(stage, lambda: tiny.run(stage, tokens, loss_mask, 3).loss)


@pytest.mark.parametrize("passes", [1, 3])
def test_pads_leave_no_trace(topology, passes):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=(1,)))
    short = tokens[:, 2:]  # the first window holds four tokens
    padded = tokens.clone()
    padded[:, :2] = 0
    model = stage.model
    one = tiny.run(stage, padded, loss_mask, passes)
    # The same four tokens as a window of their own, then the prediction window.
    segments = tiny.plan_segments(padded, loss_mask, model, SleepConfig(), passes)
    moved = [replace(s, tokens=range(max(0, s.tokens.start - 2), s.tokens.stop - 2), padded=False) for s in segments]
    other = tiny.sleep_and_predict(stage, moved, short, loss_mask[:, 2:])
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-13)
    for padded_state, state in zip(one.layer_states, other.layer_states, strict=True):
        torch.testing.assert_close(padded_state, state, rtol=0, atol=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, one.loss), tiny.gradients(stage, other.loss)) < 1e-12


def test_a_sequence_does_not_depend_on_its_neighbours_pads(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    tokens[1, :3] = 0
    together = tiny.run(stage, tokens, loss_mask, 2).layer_states
    alone = tiny.run(stage, tokens[:1], loss_mask[:1], 2).layer_states
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-13)


def test_more_passes_at_evaluation_than_in_training(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    losses = {n: tiny.run(stage, tokens, loss_mask, n).loss.item() for n in (1, 2, 4, 8)}
    assert len(set(losses.values())) == 4


def test_truncated_back_propagation_equals_cutting_by_hand(topology):
    """With k >= N nothing changes; with k = 1 the last pass starts from constants, so earlier windows get no gradient."""
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    full = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3).loss)
    all_passes = tiny.run(stage, tokens, loss_mask, 3, SleepConfig(backprop_passes=3))
    assert tiny.largest_difference(full, tiny.gradients(stage, all_passes.loss)) == 0
    one = tiny.run(stage, tokens, loss_mask, 3, SleepConfig(backprop_passes=1))
    assert one.loss.item() == pytest.approx(all_passes.loss.item(), rel=1e-14)
    gradients = tiny.gradients(stage, one.loss)
    assert tiny.largest_difference(full, gradients) > 1e-6
    only_first = set(tokens[:, :12].flatten().tolist()) - set(tokens[:, 12:-1].flatten().tolist())
    assert only_first and all(gradients["embedding.weight"][token].abs().max() == 0 for token in only_first)


def test_loop_range_over_all_blocks_is_the_default_and_a_part_differs(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    default = tiny.run(stage, tokens, loss_mask, 3).loss
    assert tiny.run(stage, tokens, loss_mask, 3, SleepConfig(loop_range=(0, 4))).loss == default
    part = tiny.run(stage, tokens, loss_mask, 3, SleepConfig(loop_range=(1, 3))).loss
    assert part != default
    assert (
        tiny.run(stage, tokens, loss_mask, 1, SleepConfig(loop_range=(1, 3))).loss
        == tiny.run(stage, tokens, loss_mask, 1).loss
    )


def test_norm_and_reinjection_change_what_later_passes_see(topology):
    tokens, loss_mask = tiny.batch()
    losses = set()
    for norm in (False, True):
        for reinject in (False, True):
            sleep = SleepConfig(pass_norm=norm, reinject_embeddings=reinject)
            stage = tiny.build_stage(topology, sleep=sleep)
            losses.add(tiny.run(stage, tokens, loss_mask, 3, sleep).loss.item())
            assert ("pass_norm.weight" in dict(stage.named_parameters())) == norm
    assert len(losses) == 4


def test_dead_compute_is_skipped(topology):
    """The blocks after the last write of the last pass do not run, and their MLPs get gradient from elsewhere only."""
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    calls = []
    for index, layer in enumerate(stage.decoder.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    tiny.run(stage, tokens, loss_mask, 2, recompute="none")
    assert calls == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]  # pass 1, pass 2 without its last MLP, prediction
    calls.clear()
    tiny.run(stage, tokens, loss_mask, 2, SleepConfig(pass_input="embeddings"), recompute="none")
    assert calls == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]  # nobody reads the hidden states of pass 1 either


def test_health_names_every_block_and_pass(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    health = FastWeightHealth(stage)
    tiny.run(stage, tokens, loss_mask, 2, health=health).loss.backward()  # the recomputation must not count
    summary = health.summary()
    assert set(summary) == {
        f"fast_weights/block_{b}/pass_{n}/{what}" for b in (1, 3) for n in (1, 2) for what in ("norm", "alpha", "beta")
    }
    assert all(len(values) == 2 for values in health._values.values())  # two consolidation windows
    assert all(0 < value < 1 for name, value in summary.items() if "norm" not in name)


def test_a_norm_is_the_mean_over_sequences_and_heads(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch()
    first = tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)[:1]
    health = FastWeightHealth(stage)
    layer_states = tiny.sleep_and_predict(stage, first, tokens, loss_mask, health=health).layer_states
    for block, state in zip((1, 3), layer_states, strict=True):
        norms = [head.pow(2).sum().sqrt().item() for sequence in state for head in sequence]
        assert health.summary()[f"fast_weights/block_{block}/pass_1/norm"] == pytest.approx(sum(norms) / len(norms))


def test_pads_do_not_count_in_the_means_of_the_gates(topology):
    stage = tiny.build_stage(topology)
    tokens, loss_mask = tiny.batch(sequences=1, windows=2, predicting=(1,))
    tokens[:, :4] = 0
    padded, unpadded = FastWeightHealth(stage), FastWeightHealth(stage)
    tiny.run(stage, tokens, loss_mask, health=padded)
    segments = tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)
    two_tokens = [
        replace(s, tokens=range(max(0, s.tokens.start - 4), s.tokens.stop - 4), padded=False) for s in segments
    ]
    short, short_mask = (x[:, 4:].to(topology.device) for x in (tokens, loss_mask))
    tiny.sleep_and_predict(stage, two_tokens, short, short_mask, health=unpadded)
    assert padded.summary() == pytest.approx(unpadded.summary(), rel=1e-12)


def test_tied_embeddings_share_one_matrix(topology):
    stage = tiny.build_stage(topology, model=tiny.model_config(tie_embeddings=True))
    tokens, loss_mask = tiny.batch()
    gradient = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 2).loss)
    assert not any(name.startswith("output_layer") for name in gradient)
    assert gradient["embedding.weight"][0].abs().max() > 0  # never read as input, still a class of the softmax


@pytest.mark.parametrize("every_window", [True, False])
def test_two_halves_with_the_state_carried_equal_the_whole(topology, every_window):
    """In loss and fast weights; and a half that goes on sleeps on its last window too."""
    sleep = SleepConfig(every_window=every_window, carry=True)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = tiny.batch(windows=4, predicting=(0, 1, 2, 3))
    middle = 2 * tiny.WINDOW
    whole = tiny.run(stage, tokens, loss_mask, passes=3, sleep=sleep)
    halves, layer_states = [], None
    for part in (slice(0, middle + 1), slice(middle, None)):
        halves.append(
            tiny.run(stage, tokens[:, part], loss_mask[:, part], passes=3, sleep=sleep, layer_states=layer_states)
        )
        layer_states = detach(halves[-1].layer_states)
    assert sum(half.loss.item() for half in halves) == pytest.approx(whole.loss.item(), rel=1e-13)
    for left, expected in zip(layer_states, whole.layer_states, strict=True):
        assert (left - expected).abs().max() < 1e-12
    forgotten = tiny.run(stage, tokens[:, middle:], loss_mask[:, middle:], passes=3, sleep=sleep)
    assert abs(forgotten.loss.item() - halves[1].loss.item()) > 1e-3


def test_what_follows_the_last_loss_has_no_gradient_to_wait_for(topology):
    """The next sequence gets the fast weights detached: those segments keep nothing for a backward pass."""
    sleep = SleepConfig(every_window=True, carry=True)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(0, 1))
    segments = tiny.plan_segments(tokens, loss_mask, tiny.model_config(), sleep, 2)
    assert [(s.window, s.pass_number, s.with_grad) for s in segments] == [
        (0, 0, True), (0, 1, True), (0, 2, True), (1, 0, True), (1, 1, False), (1, 2, False)
    ]  # fmt: skip
    stage = tiny.build_stage(topology, sleep=sleep)
    output = tiny.run(stage, tokens, loss_mask, passes=2, sleep=sleep)
    last = tiny.run(stage, tokens, loss_mask, passes=2, sleep=SleepConfig(every_window=True))
    assert not any(state.requires_grad for state in output.layer_states)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, last.loss)) < 1e-13
