"""Sliding eviction: the newest keys and values outlive their window. In float64, against tests/helpers/plain.py."""

from dataclasses import replace

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.health import FastWeightHealth
from powernap.model.mixers.rotary import rotary_tables
from powernap.model.window import mask_padding, sliding_mask
from tests.helpers import plain, tiny
from tests.helpers.cases import names


def sliding(**changes) -> SleepConfig:
    return SleepConfig(eviction="sliding", **changes)


def answers(stage, tokens, loss_mask, predicting, passes, **options):
    """The loss by the oracle."""
    with stage.device:
        logits = plain.sleep(stage, tokens, predicting, passes, **options)
    windows = [slice(window * stage.model.window, (window + 1) * stage.model.window + 1) for window in predicting]
    return sum(plain.loss(x, tokens[:, w], loss_mask[:, w]) for x, w in zip(logits, windows, strict=True))


def assert_same(stage, loss, expected):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, loss), tiny.gradients(stage, expected)) < 1e-12


def without_cache(layer_states):
    """The same states whose keys and values pass no gradient on."""
    return tuple(state.detach() if state.ndim == 5 else state for state in layer_states)


@pytest.mark.parametrize("cut", [0, 3])  # tokens missing in the last window
@pytest.mark.parametrize("recompute", ["segment", "none"])
def test_one_pass_equals_the_plain_sliding_window_hybrid(topology, recompute, cut):
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = (x[:, : x.shape[1] - cut].to(topology.device) for x in tiny.batch(windows=5, predicting=(2, 4)))
    with topology.device:
        logits = plain.hybrid(stage, tokens, sliding=True)
    output = tiny.run(stage, tokens, loss_mask, 1, sliding(), recompute=recompute, predict=True)
    assert_same(stage, output.loss, plain.loss(logits, tokens, loss_mask))
    last = slice(4 * tiny.WINDOW, None)
    assert torch.equal(output.predictions[:, 1:][:, last], logits.argmax(-1)[:, last])
    assert abs(output.loss.item() - tiny.run(tiny.build_stage(topology), tokens, loss_mask, 1).loss.item()) > 1e-3


@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_of_other_lengths(topology, window):
    stage = tiny.build_stage(topology, tiny.model_config(window=window), sliding())
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=2, predicting=()))
    loss_mask[:, 1:] = True
    with topology.device:
        logits = plain.hybrid(stage, tokens, sliding=True)
    output = tiny.run(stage, tokens, loss_mask, 1, sliding())
    assert_same(stage, output.loss, plain.loss(logits, tokens, loss_mask))


@pytest.mark.parametrize("recompute", ["segment", "none"])
@pytest.mark.parametrize("pattern", ["AGAG", "GAGA", "GAA"])  # all blocks run to their end in the oracle
def test_passes_are_the_recurrence_by_hand(topology, pattern, recompute):
    stage = tiny.build_stage(topology, tiny.model_config(pattern=pattern), sliding())
    tokens, loss_mask = (x[:, :-2].to(topology.device) for x in tiny.batch(windows=5, predicting=(2, 4)))
    output = tiny.run(stage, tokens, loss_mask, 3, sliding(), recompute=recompute)
    assert_same(stage, output.loss, answers(stage, tokens, loss_mask, (2, 4), 3))


@pytest.mark.parametrize("loop", names([(1, 3), (1, 2)], [(2, 4), (0, 2), (2, 3)]))
@pytest.mark.parametrize("pattern", ["AGAG", "GAGA"])
def test_looped_blocks_repeat_and_each_cache_is_of_its_blocks_last_run(topology, pattern, loop):
    sleep = sliding(loop_range=loop)
    stage = tiny.build_stage(topology, tiny.model_config(pattern=pattern), sleep)
    sleep.check_against(stage.model)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=4, predicting=(1, 3)))
    output = tiny.run(stage, tokens, loss_mask, 3, sleep)
    assert_same(stage, output.loss, answers(stage, tokens, loss_mask, (1, 3), 3, loop=loop))


@pytest.mark.parametrize("backprop", [1, 2, 3])
@pytest.mark.parametrize("loop", [None, (1, 3)])
def test_what_passes_without_gradient_compute_is_constant(topology, backprop, loop):
    """A cache that such a pass only hands on keeps its gradient to the pass of the window before that computed it."""
    sleep = sliding(backprop_passes=backprop, loop_range=loop)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=4, predicting=(1, 3)))
    output = tiny.run(stage, tokens, loss_mask, 3, sleep)
    assert_same(stage, output.loss, answers(stage, tokens, loss_mask, (1, 3), 3, loop=loop, backprop=backprop))


def test_gradient_reaches_the_window_before_through_keys_and_values(topology):
    """The control: a cache that passes no gradient on has the same loss and other gradients."""
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch())
    linked = tiny.run(stage, tokens, loss_mask, 2, sliding()).loss
    cut = tiny.run(stage, tokens, loss_mask, 2, sliding(), between_windows=without_cache).loss
    expected = answers(stage, tokens, loss_mask, (2,), 2, linked=torch.Tensor.detach)
    assert cut == linked and cut.item() == pytest.approx(expected.item(), rel=1e-13)
    linked, cut, expected = (tiny.gradients(stage, loss) for loss in (linked, cut, expected))
    assert tiny.largest_difference(cut, expected) < 1e-12
    assert tiny.largest_difference(cut, linked) > 1e-3


def test_without_fast_weights_gradient_reaches_the_first_window_from_cache_to_cache(topology):
    stage = tiny.build_stage(topology, tiny.model_config(pattern="AA"), sliding())
    tokens, loss_mask = tiny.batch()  # the answers are two windows behind the first: two blocks reach that far
    tokens[:, : tiny.WINDOW] = 16  # a token no other window holds
    tokens[:, tiny.WINDOW :].clamp_(max=15)
    loss_mask[:, 2 * tiny.WINDOW + 1] = True  # the target of the window's first token, which sees furthest back
    for options, reached in (({}, True), ({"between_windows": without_cache}, False)):
        loss = tiny.run(stage, tokens, loss_mask, 2, sliding(), **options).loss
        assert (tiny.gradients(stage, loss)["embedding.weight"][16].abs().max() > 1e-8) == reached


def test_gradients_against_finite_differences(topology):
    stage = tiny.build_stage(topology, tiny.model_config(pattern="GA"), sliding())
    tokens, loss_mask = tiny.batch()
    tokens[0, :2] = 0
    tiny.assert_finite_differences_agree(stage, lambda: tiny.run(stage, tokens, loss_mask, 2, sliding()).loss)


@pytest.mark.parametrize("passes", [1, 3])
def test_pads_leave_no_trace(topology, passes):
    """The first window's pads are still among the cached tokens of the second."""
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=3, predicting=(1, 2)))
    padded = tokens.clone()
    padded[:, :4] = 0
    segments = plan_segments(padded, loss_mask, stage.model, sliding(), passes)
    assert [s.padded for s in segments] == [True] * (passes + 1) + [False]
    # The same two tokens as a window of their own, then the others.
    earlier = lambda tokens: range(max(0, tokens.start - 4), tokens.stop - 4)  # noqa: E731
    moved = [
        replace(
            s,
            tokens=earlier(s.tokens),
            cached=tuple(map(earlier, s.cached)),
            position=max(0, s.position - 4),
            padded=False,
        )
        for s in segments
    ]
    one = tiny.run(stage, padded, loss_mask, passes, sliding())
    other = tiny.sleep_and_predict(stage, moved, tokens[:, 4:], loss_mask[:, 4:])
    assert_same(stage, one.loss, other.loss)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("places", names([[0, 1], [3, 10, 11, 12]], [[4, 5], list(range(6)), list(range(5, 12))]))
def test_what_a_pad_is_made_of_does_not_matter(topology, places, passes):
    """Anywhere: in front, at a window's end, a whole window, across a boundary."""
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = (x.to(topology.device) for x in tiny.batch(windows=4, predicting=(2, 3)))
    tokens[1, places] = 0
    loss_mask[1, places] = False
    loss = tiny.run(stage, tokens, loss_mask, passes, sliding()).loss
    gradients = tiny.gradients(stage, loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["embedding.weight"][0].abs().max() == 0
    with torch.no_grad():
        stage.embedding.weight[0] += 3.0
    assert tiny.run(stage, tokens, loss_mask, passes, sliding()).loss == loss


def test_a_row_of_the_mask_is_never_empty(topology):
    """Whatever is padded; some of torch's kernels make NaN of an empty row."""
    padding_mask = torch.rand(50, tiny.WINDOW * 2 - 1, device=topology.device) < 0.3
    padding_mask[0] = False
    mask = mask_padding(sliding_mask(tiny.WINDOW, tiny.WINDOW - 1, tiny.WINDOW, topology.device), padding_mask)
    assert mask.shape == (50, 1, tiny.WINDOW, 2 * tiny.WINDOW - 1) and mask.any(-1).all()
    assert (mask[0].sum(-1) == 1).all()  # every pad sees itself and no other


def test_a_sequence_does_not_depend_on_its_neighbours_pads(topology):
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = tiny.batch(windows=3, predicting=(2,))
    tokens[1, 3:9] = 0
    together = tiny.run(stage, tokens, loss_mask, 2, sliding(), predict=True)
    alone = tiny.run(stage, tokens[:1], loss_mask[:1], 2, sliding(), predict=True)
    assert torch.equal(together.predictions[:1], alone.predictions)
    for both, one in zip(together.layer_states, alone.layer_states, strict=True):
        mine = both[:, :1] if both.ndim == 5 else both[:1]
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-13)


def test_a_window_leaves_its_newest_keys_and_values_only(topology):
    """With emptied states a token reaches no further than the keys of its window's newest tokens.

    One pass and one attention block: its keys then hold a token each, not what that token saw.
    """
    stage = tiny.build_stage(topology, tiny.model_config(pattern="AG"), sliding())
    tokens, loss_mask = tiny.batch()
    layer_states = tiny.run(stage, tokens[:, :-2], loss_mask[:, :-2], 2, sliding()).layer_states
    cache = layer_states[0]
    assert cache.shape == (2, 3, 2, tiny.WINDOW - 1, 8) and layer_states[1].shape == (3, 2, 4, 6)
    assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()

    def loss(tokens):
        def only_cache(layer_states):
            return tuple(state if state.ndim == 5 else torch.zeros_like(state) for state in layer_states)

        return tiny.run(stage, tokens, loss_mask, 1, sliding(), between_windows=only_cache).loss.item()

    changed = tokens.clone()
    changed[:, : tiny.WINDOW + 1] = tokens[:, : tiny.WINDOW + 1].flip(1)  # the token after them is the oldest kept
    assert loss(changed) == loss(tokens)
    changed[:, tiny.WINDOW + 1] = tokens[:, tiny.WINDOW + 1] % 16 + 1
    assert loss(changed) != loss(tokens)


def test_dead_compute_is_skipped(topology):
    """An attention block that ends the stack writes its cache in the last pass and does nothing more."""
    stage = tiny.build_stage(topology, tiny.model_config(pattern="GA"), sliding())
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    calls = []
    for index, layer in enumerate(stage.decoder.layers):
        layer.self_attention.out_proj.register_forward_hook(lambda *_, index=index: calls.append(f"mixer {index}"))
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(f"mlp {index}"))
    tiny.run(stage, tokens, loss_mask, 2, sliding(), recompute="none")
    whole, last = ["mixer 0", "mlp 0", "mixer 1", "mlp 1"], ["mixer 0", "mlp 0"]
    assert calls == whole + last + whole


def test_layer_states_begin_empty(topology):
    stage = tiny.build_stage(topology, sleep=sliding(), dtype=torch.bfloat16)
    cache, state = stage.empty_layer_states(3)[:2]
    assert cache.shape == (2, 3, 2, 0, 8) and cache.dtype == torch.bfloat16
    assert state.shape == (3, 2, 4, 6) and state.dtype == torch.float32


def test_bfloat16_stays_close(topology):
    tokens, loss_mask = tiny.batch()
    tokens[0, :2] = 0
    stages = [tiny.build_stage(topology, sleep=sliding(), dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    exact, low = (tiny.run(stage, tokens, loss_mask, 2, sliding()) for stage in stages)
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    assert [x.dtype for x in low.layer_states] == [torch.bfloat16, torch.float32] * 2
    assert all(gradient.isfinite().all() for gradient in tiny.gradients(stages[1], low.loss).values())


def test_more_passes_at_evaluation_than_in_training(topology):
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = tiny.batch()
    losses = {n: tiny.run(stage, tokens, loss_mask, n, sliding()).loss.item() for n in (1, 2, 4, 8)}
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize(
    ("norm", "reinject", "recompute"), [(True, True, "segment"), (True, False, "none"), (False, True, "none")]
)
def test_norm_and_reinjection_come_before_every_pass_but_the_first(topology, norm, reinject, recompute):
    def handed(x, embedded):
        x = plain.norm(x, stage.pass_norm, stage.model) if norm else x
        return x + embedded if reinject else x

    sleep = sliding(pass_norm=norm, reinject_embeddings=reinject)
    stage = tiny.build_stage(topology, sleep=sleep)
    tokens, loss_mask = (x[:, :-2].to(topology.device) for x in tiny.batch())
    output = tiny.run(stage, tokens, loss_mask, 3, sleep, recompute=recompute)
    assert_same(stage, output.loss, answers(stage, tokens, loss_mask, (2,), 3, handed=handed))


def test_health_looks_at_fast_weights_only(topology):
    stage = tiny.build_stage(topology, sleep=sliding())
    tokens, loss_mask = tiny.batch()
    health = FastWeightHealth(stage)
    output = tiny.run(stage, tokens[:, :-7], loss_mask[:, :-7], 2, sliding(), health=health)
    assert {name.split("/")[1] for name in health.summary()} == {"block_1", "block_3"}
    norm = output.layer_states[1].norm(dim=(-2, -1)).mean()
    assert health._values["fast_weights/block_1/pass_2/norm"][-1] == norm


def test_far_positions_keep_their_precision(topology):
    far, exact = (
        rotary_tables(4, 8, 10000.0, dtype, torch.device("cpu"), start=2**20)
        for dtype in (torch.float32, torch.float64)
    )
    for table, reference in zip(far, exact, strict=True):
        assert (table - reference).abs().max() < 1e-7
