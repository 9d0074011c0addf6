"""The checks that must always hold (method: arXiv 2605.26099), in float64."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from powernap.model.config import SleepConfig
from powernap.model.delta_rule import sequential_delta_rule
from powernap.model.fast_weights import detach
from powernap.model.health import FastWeightHealth


def plain_forward(stage, tokens):
    """The ordinary hybrid without sleep, written down a second time: plain torch, no Megatron module's forward, windowed
    attention, one state over the whole sequence, token-by-token delta rule. Returns logits [B, T-1, vocabulary]."""
    model, inputs = stage.model, tokens[:, :-1]
    x = F.embedding(inputs, stage.embedding.weight)
    batch, length, _ = x.shape
    for layer in stage.decoder.layers:
        mixer, eps = layer.self_attention, model.norm_eps
        y = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, eps)
        if layer.has_state:
            y = plain_gated_delta_net(mixer, y, model)
        else:
            y = torch.cat([plain_attention(mixer, part, model) for part in y.split(model.window, dim=1)], dim=1)
        x = x + y
        y = F.rms_norm(x, x.shape[-1:], layer.pre_mlp_layernorm.weight, eps)
        gate, up = F.linear(y, layer.mlp.linear_fc1.weight).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, layer.mlp.linear_fc2.weight)
    x = F.rms_norm(x, x.shape[-1:], stage.decoder.final_layernorm.weight, model.norm_eps)
    return F.linear(x, stage.output_layer.weight)


def plain_attention(mixer, x, model):
    batch, length, _ = x.shape
    head_dim = model.hidden_size // model.num_attention_heads
    q, k, v = F.linear(x, mixer.qkv_proj.weight).view(batch, length, -1, 3, head_dim).transpose(1, 2).unbind(3)
    position, pair = (torch.arange(n, dtype=torch.float64) for n in (length, head_dim // 2))
    angle = position[:, None] * model.rope_base ** (-2 * pair / head_dim)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def rotated(t):
        pairs = torch.complex(*t.chunk(2, dim=-1)) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    scores = rotated(q) @ rotated(k).transpose(-1, -2) / head_dim**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), mixer.out_proj.weight)


def plain_gated_delta_net(mixer, x, model):
    batch, length, _ = x.shape
    k_dim, v_dim = model.gdn_key_dim, model.gdn_value_dim
    y = F.linear(x, mixer.in_proj.weight).view(batch, length, model.gdn_heads, -1)
    qkv, z, beta, alpha = y.split([2 * k_dim + v_dim, v_dim, 1, 1], dim=-1)
    pieces = []  # the convolution starts from zero padding in each window
    for part in qkv.split(model.window, dim=1):
        channels = part.flatten(2).transpose(1, 2)
        taps = mixer.conv_weight.flatten(0, 1).unsqueeze(1)
        padded = F.pad(channels, (model.conv_kernel - 1, 0))
        pieces.append(F.conv1d(padded, taps, groups=taps.shape[0]).transpose(1, 2).unflatten(2, part.shape[2:]))
    q, k, v = F.silu(torch.cat(pieces, dim=1)).split([k_dim, k_dim, v_dim], dim=-1)
    g = -mixer.A_log.exp() * F.softplus(alpha.squeeze(-1) + mixer.dt_bias)
    state = x.new_zeros(batch, model.gdn_heads, k_dim, v_dim)
    output, _ = sequential_delta_rule(
        F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta.squeeze(-1).sigmoid(), state
    )
    output = F.rms_norm(output, (v_dim,), mixer.norm.weight, model.norm_eps) * F.silu(z)
    return F.linear(output.flatten(2), mixer.out_proj.weight)


@pytest.mark.parametrize("recompute", [True, False])
def test_one_pass_equals_the_plain_hybrid(here, recompute):
    stage = tiny.build_stage(here)
    tokens, loss_mask = (x.to(here.device) for x in tiny.batch())
    with here.device:
        logits = plain_forward(stage, tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    plain = (losses * loss_mask[:, 1:].flatten()).sum()
    output = tiny.run(stage, tokens, loss_mask, passes=1, recompute=recompute, predict=True)
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, plain)) < 1e-12
    last = slice(2 * tiny.WINDOW, None)
    assert torch.equal(output.predictions[:, 1:][:, last], logits.argmax(-1)[:, last])
    assert (output.predictions[:, : 2 * tiny.WINDOW + 1] == -1).all()


def test_passes_are_the_recurrence_of_the_paper(here):
    """N passes of the whole block stack written out by hand: hidden states fed back, fast weights carried."""
    stage = tiny.build_stage(here)
    tokens, loss_mask = (x.to(here.device) for x in tiny.batch(windows=2, predicting=(1,)))
    first, second = tokens[:, : tiny.WINDOW], tokens[:, tiny.WINDOW : -1]
    window = stage._window(tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)[0], first)
    every = range(4)
    fast_weights = stage.zero_fast_weights(len(tokens))
    hidden = stage._embed(first)
    for _ in range(3):
        hidden, fast_weights = stage.decoder(hidden, fast_weights, window, every)
    hidden, _ = stage.decoder(stage._embed(second), fast_weights, window, every)
    by_hand = stage.loss(hidden, tokens[:, tiny.WINDOW + 1 :], loss_mask[:, tiny.WINDOW + 1 :])
    output = tiny.run(stage, tokens, loss_mask, passes=3)
    assert output.loss.item() == pytest.approx(by_hand.item(), rel=1e-14)
    assert tiny.largest_difference(tiny.gradients(stage, output.loss), tiny.gradients(stage, by_hand)) < 1e-13


@pytest.mark.parametrize("sleep", [SleepConfig(), SleepConfig(pass_norm=True, reinject_embeddings=True)])
@pytest.mark.parametrize("predicting", [(2,), (1, 2)])
def test_recomputation_changes_nothing(here, sleep, predicting):
    stage = tiny.build_stage(here, sleep=sleep)
    tokens, loss_mask = tiny.batch(predicting=predicting)
    results = [tiny.run(stage, tokens, loss_mask, 3, sleep, recompute=recompute) for recompute in (True, False)]
    assert results[0].loss == results[1].loss
    assert tiny.largest_difference(*(tiny.gradients(stage, output.loss) for output in results)) < 1e-14


def test_evicted_tokens_reach_the_answers_through_the_fast_weights_only(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    changed = tokens.clone()
    changed[:, : tiny.WINDOW] = tokens[:, : tiny.WINDOW].flip(1)

    def loss(tokens, **options):
        return tiny.run(stage, tokens, loss_mask, passes=2, **options).loss.item()

    def cut(fast_weights):
        return tuple(torch.zeros_like(state) for state in fast_weights)

    assert abs(loss(tokens) - loss(changed)) > 1e-6
    assert loss(tokens, between_windows=cut) == loss(changed, between_windows=cut)


def test_gradient_reaches_the_first_window_through_the_fast_weights(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    tokens[:, : tiny.WINDOW] = 16  # a token no other window holds: its embedding's gradient comes through S alone
    tokens[:, tiny.WINDOW :].clamp_(max=15)
    linked = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3).loss)["embedding.weight"][16]
    cut = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3, between_windows=detach).loss)
    assert linked.abs().max() > 1e-6
    assert cut["embedding.weight"][16].abs().max() == 0


def test_gradients_against_finite_differences(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    found = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 3).loss)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stage.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(here.device)
        sides = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter += step * direction
                sides.append(tiny.run(stage, tokens, loss_mask, 3).loss.item())
        with torch.no_grad():
            parameter += 1e-5 * direction
        expected = (sides[0] - sides[1]) / 2e-5
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("passes", [1, 3])
def test_pads_leave_no_trace(here, passes):
    stage = tiny.build_stage(here)
    tokens, loss_mask = (x.to(here.device) for x in tiny.batch(windows=2, predicting=(1,)))
    short = tokens[:, 2:]  # the first window holds four tokens
    padded = tokens.clone()
    padded[:, :2] = 0
    model = stage.model
    one = tiny.run(stage, padded, loss_mask, passes)
    # The same four tokens as a window of their own, then the prediction window.
    segments = tiny.plan_segments(padded, loss_mask, model, SleepConfig(), passes)
    moved = [replace(s, tokens=(max(0, s.tokens[0] - 2), s.tokens[1] - 2), padded=False) for s in segments]
    other = tiny.sleep_and_predict(stage, moved, short, loss_mask[:, 2:])
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-13)
    for padded_state, state in zip(one.fast_weights, other.fast_weights, strict=True):
        torch.testing.assert_close(padded_state, state, rtol=0, atol=1e-13)
    assert tiny.largest_difference(tiny.gradients(stage, one.loss), tiny.gradients(stage, other.loss)) < 1e-12


def test_a_sequence_does_not_depend_on_its_neighbours_pads(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    tokens[1, :3] = 0
    together = tiny.run(stage, tokens, loss_mask, 2).fast_weights
    alone = tiny.run(stage, tokens[:1], loss_mask[:1], 2).fast_weights
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-13)


def test_more_passes_at_evaluation_than_in_training(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    losses = {n: tiny.run(stage, tokens, loss_mask, n).loss.item() for n in (1, 2, 4, 8)}
    assert len(set(losses.values())) == 4


def test_truncated_back_propagation_equals_cutting_by_hand(here):
    """With k >= N nothing changes; with k = 1 the last pass starts from constants, so earlier windows get no gradient."""
    stage = tiny.build_stage(here)
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


def test_loop_range_over_all_blocks_is_the_default_and_a_part_differs(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    default = tiny.run(stage, tokens, loss_mask, 3).loss
    assert tiny.run(stage, tokens, loss_mask, 3, SleepConfig(loop_range=(0, 4))).loss == default
    part = tiny.run(stage, tokens, loss_mask, 3, SleepConfig(loop_range=(1, 3))).loss
    assert part != default
    assert (
        tiny.run(stage, tokens, loss_mask, 1, SleepConfig(loop_range=(1, 3))).loss
        == tiny.run(stage, tokens, loss_mask, 1).loss
    )


def test_norm_and_reinjection_change_what_later_passes_see(here):
    tokens, loss_mask = tiny.batch()
    losses = set()
    for norm in (False, True):
        for reinject in (False, True):
            sleep = SleepConfig(pass_norm=norm, reinject_embeddings=reinject)
            stage = tiny.build_stage(here, sleep=sleep)
            losses.add(tiny.run(stage, tokens, loss_mask, 3, sleep).loss.item())
            assert ("pass_norm.weight" in dict(stage.named_parameters())) == norm
    assert len(losses) == 4


def test_dead_compute_is_skipped(here):
    """The blocks after the last write of the last pass do not run, and their MLPs get gradient from elsewhere only."""
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    calls = []
    for index, layer in enumerate(stage.decoder.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    tiny.run(stage, tokens, loss_mask, 2, recompute=False)
    assert calls == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]  # pass 1, pass 2 without its last MLP, prediction


def test_health_names_every_block_and_pass(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch()
    health = FastWeightHealth(stage)
    tiny.run(stage, tokens, loss_mask, 2, health=health).loss.backward()  # the recomputation must not count
    summary = health.summary()
    assert set(summary) == {
        f"fast_weights/block_{b}/pass_{n}/{what}" for b in (1, 3) for n in (1, 2) for what in ("norm", "alpha", "beta")
    }
    assert all(len(values) == 2 for values in health._values.values())  # two consolidation windows
    assert all(0 < value < 1 for name, value in summary.items() if "norm" not in name)


def test_pads_do_not_count_in_the_means_of_the_gates(here):
    stage = tiny.build_stage(here)
    tokens, loss_mask = tiny.batch(sequences=1, windows=2, predicting=(1,))
    tokens[:, :4] = 0
    padded, plain = FastWeightHealth(stage), FastWeightHealth(stage)
    tiny.run(stage, tokens, loss_mask, health=padded)
    segments = tiny.plan_segments(tokens, loss_mask, stage.model, SleepConfig(), 1)
    two_tokens = [replace(s, tokens=(max(0, s.tokens[0] - 4), s.tokens[1] - 4), padded=False) for s in segments]
    short, short_mask = (x[:, 4:].to(here.device) for x in (tokens, loss_mask))
    tiny.sleep_and_predict(stage, two_tokens, short, short_mask, health=plain)
    assert padded.summary() == pytest.approx(plain.summary(), rel=1e-12)


def test_tied_embeddings_share_one_matrix(here):
    stage = tiny.build_stage(here, model=tiny.model_config(tie_embeddings=True))
    tokens, loss_mask = tiny.batch()
    gradient = tiny.gradients(stage, tiny.run(stage, tokens, loss_mask, 2).loss)
    assert not any(name.startswith("output_layer") for name in gradient)
    assert gradient["embedding.weight"][0].abs().max() > 0  # never read as input, still a class of the softmax
