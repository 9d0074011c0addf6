"""ZeRO through DeepSpeed against a plain torch optimizer, on the same gradients. More processes: test_zero_layouts.py."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from powernap.model.batch import plan_segments
from powernap.parallel.schedule import MicroBatch, forward_backward
from powernap.parallel.zero import optimizer as zero_module
from powernap.parallel.zero.gradients import matrices_of_blocks, sum_of_squares
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.config import OptimizerConfig
from powernap.train.lr_schedule import lr_factor
from powernap.train.optimizer import build_optimizer, set_lr
from tests.helpers import tiny
from tests.helpers.plain_muon import PlainMuon
from tests.helpers.training_step import peak_bytes, training_step

CLIP = 0.5


def zero_for(topology, config, precision="fp32", **options):
    stage = tiny.build_stage(topology, dtype=torch.float32)
    optimizer = build_optimizer(stage, config)
    return stage, ZeroOptimizer(
        stage, optimizer, topology, precision=precision, clip=CLIP, micro_batch_size=3, **options
    )


def step_plainly(stage, optimizers, tokens, loss_mask, factor):
    tiny.run(stage, tokens, loss_mask, 2).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), CLIP)
    for optimizer in optimizers:
        set_lr(optimizer.param_groups, factor)
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


def plain_optimizers(stage, config):
    """Written down anew: who gets weight decay, who gets Muon."""

    def of(wanted):
        return [p for name, p in stage.named_parameters() if kind(name, p) in wanted]

    def kind(name, p):
        if p.ndim != 2 or name == "embedding.weight":
            return "other"
        return "head" if name == "output_layer.weight" else "inside"

    adamw = {"betas": config.betas, "eps": config.eps, "lr": config.lr}
    decay = config.weight_decay
    optimizers = []
    decaying = of(set() if config.name == "muon" else {"head", "inside"})
    groups = [
        {"params": decaying, "weight_decay": decay},
        {"params": of({"other", "head"} if config.name == "muon" else {"other"}), "weight_decay": 0.0},
    ]
    optimizers.append(torch.optim.AdamW(groups, **adamw))
    if config.name == "muon":
        optimizers.append(PlainMuon(of({"inside"}), config.muon_lr, config.muon_momentum, decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@pytest.mark.parametrize(("name", "bound"), [("adamw", 1e-5), pytest.param("muon", 1e-4, marks=pytest.mark.wide)])
def test_ten_steps_equal_a_plain_optimizer(topology, monkeypatch, name, bound):
    # In bfloat16, as it runs, Muon's orthogonalisation multiplies rounding errors by hundreds: nothing could be compared.
    monkeypatch.setattr("deepspeed.runtime.zero.muon.original_muon.ns_compute_dtype", lambda *_: torch.float32)
    # No field at its default, which may be the library's too.
    config = OptimizerConfig(
        name=name,
        lr=1e-2,
        betas=(0.8, 0.97),
        eps=1e-4,
        muon_lr=2e-2,
        muon_momentum=0.9,
        weight_decay=0.1,
        warmup_steps=3,
    )
    stage, zero = zero_for(topology, config)
    plain = tiny.build_stage(topology, dtype=torch.float32)
    optimizers = plain_optimizers(plain, config)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for step in range(1, 11):
        tokens, loss_mask = tiny.batch(seed=step)
        factor = lr_factor(step, 10, config)
        with zero.accumulation():
            tiny.run(stage, tokens, loss_mask, 2).loss.backward()
        set_lr(zero.param_groups, factor)
        norm = zero.step()
        expected = step_plainly(plain, optimizers, tokens, loss_mask, factor)
        assert norm == pytest.approx(expected, rel=10 * bound)
        assert norm > CLIP
    moved = {n: p.detach() for n, p in plain.named_parameters()}
    assert tiny.largest_difference({n: p.detach() for n, p in stage.named_parameters()}, moved) < bound
    assert min((moved[n] - start[n]).abs().max() for n in moved) > 2 * bound  # every parameter moved, by more than that


def test_micro_batches_add_up_and_nothing_is_left_for_the_next_step(topology):
    config = OptimizerConfig(lr=1e-3, warmup_steps=0)  # AdamW's first steps make large moves of small rounding errors
    once, zero_once = zero_for(topology, config)
    twice, zero_twice = zero_for(topology, config)
    for step in range(1, 4):
        tokens, loss_mask = tiny.batch(sequences=4, seed=step)
        with zero_once.accumulation():
            tiny.run(once, tokens, loss_mask, 2).loss.backward()
        with zero_twice.accumulation():
            for part in (slice(0, 2), slice(2, 4)):
                tiny.run(twice, tokens[part], loss_mask[part], 2).loss.backward()
        assert zero_once.step() == pytest.approx(zero_twice.step(), rel=1e-4)
    a, b = ({n: p.detach() for n, p in stage.named_parameters()} for stage in (once, twice))
    assert tiny.largest_difference(a, b) < 1e-5


def three_steps(stage, zero) -> list[float]:
    """Gradient norms."""
    norms = []
    for step in range(3):
        tokens, loss_mask = tiny.batch(seed=step)
        with zero.accumulation():
            tiny.run(stage, tokens, loss_mask, 2).loss.backward()
        norms.append(zero.step())
    return norms


def test_alone_in_float32_a_step_is_deepspeeds_to_the_bit(topology):
    config, found = OptimizerConfig(warmup_steps=0), []
    for alone in (True, False):
        stage, zero = zero_for(topology, config)
        assert zero._alone
        zero._alone = alone
        norms = three_steps(stage, zero)
        assert min(norms) > CLIP and all(p.grad is None for p in stage.parameters())
        found.append((norms, [p.detach().clone() for p in stage.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_offloaded_steps_are_the_others_in_float32(topology, name):
    config, found = OptimizerConfig(name=name, warmup_steps=0), []
    for offload in (False, True):
        stage, zero = zero_for(topology, config, offload=offload)
        found.append(three_steps(stage, zero))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_steps_memory_grows_with_passes_by_saved_inputs_alone(topology, precision):
    """N=1 has no whole pass to recompute after the answer's: without gradients from the start its peak would be lower."""
    model = tiny.model_config()
    tokens, loss_mask = tiny.batch()
    windows = (tokens.shape[1] - 1) // model.window - 1  # that sleep
    one, two = (training_step(topology, model, tokens, loss_mask, passes, precision) for passes in (1, 2))
    grown = peak_bytes(two.run, two.weights_and_states) - peak_bytes(one.run, one.weights_and_states)
    assert 0 <= grown - windows * two.input_bytes <= 8 * windows  # each also keeps scalars


def test_a_cpus_norm_is_that_of_small_pieces():
    """Each in a call of its own to the bit, and right where a norm of all at once in float32 is not."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(size, generator=generator) for size in ((700, 100), (16384,), (3, 16384), (5,))]
    pieces = [piece for g in gradients for piece in g.view(-1).split(2**14)]
    squares = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]).double().square().sum()
    found = sum_of_squares(gradients, torch.device("cpu"))
    assert found == squares.float()
    assert float(found) == pytest.approx(sum(float(g.double().square().sum()) for g in gradients), rel=1e-6)


def test_float32_gradients_lie_in_one_place_and_begin_at_zero(topology):
    stage, zero = zero_for(topology, OptimizerConfig())
    places = []
    for step in range(2):
        tokens, loss_mask = tiny.batch(seed=step)
        with zero.accumulation():
            assert not any(p.grad.any() for p in stage.parameters())
            tiny.run(stage, tokens, loss_mask, 2).loss.backward()
            places.append({p.grad.untyped_storage().data_ptr() for p in stage.parameters()})
        zero.step()
    assert places[0] == places[1] and len(places[0]) == 2  # matrices, and the rest


@pytest.mark.parametrize("name", ["output_layer.weight", "decoder.layers.0.mlp.linear_fc1.weight"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_accumulates_in_float32(topology, zero_stage, offload, name):
    """Many small gradients on a large one: bfloat16 would lose every one of them."""
    config = OptimizerConfig(lr=1e-2, warmup_steps=0)
    stage, zero = zero_for(topology, config, precision="bf16", zero_stage=zero_stage, offload=offload)
    weight = dict(stage.named_parameters())[name]
    assert weight.dtype == torch.bfloat16
    with zero.accumulation(), zero.gathered_parameters():
        (weight.float().sum() * 1.0).backward()
        for _ in range(257):
            (weight.float().sum() * 2**-9).backward()
        elements = weight.numel()
    # Each entry gets 1 + 257 / 512. bfloat16 keeps 8 bits, so 1 + 2^-9 rounds to 1 each time. What stage 2 offloads is
    # rounded once, at the end.
    bound = 2**-8 if zero_stage == 2 and offload else 1e-6
    assert zero.step() == pytest.approx((1 + 257 / 512) * elements**0.5, rel=bound)


class Float32Copies(TorchDispatchMode):
    """Inside, counts the float32 copies of bfloat16 matrices, by shape."""

    def __init__(self):
        super().__init__()
        self.made: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16 and result.ndim == 2:
            self.made[result.shape] += result.dtype == torch.float32
        return result


def test_bf16_gradients_are_added_without_a_float32_copy_to_the_same_bits(topology, monkeypatch):
    """Against DeepSpeed's own way, in which every segment makes one of every weight's gradient."""

    def accumulated():
        torch.manual_seed(0)
        stage, zero = zero_for(topology, OptimizerConfig(), precision="bf16")
        tokens, loss_mask = tiny.batch()
        segments = plan_segments(tokens, loss_mask, stage.model, stage.sleep, passes=2)
        batches = [MicroBatch(segments, tokens, loss_mask)] * 2
        with zero.accumulation(), Float32Copies() as copies:
            forward_backward(stage, batches, 0.01, topology, recompute="segment")
        weights = matrices_of_blocks(stage)
        assert len(weights) > 10
        return [zero._accumulated(p).clone() for p in stage.parameters()], copies.made, {p.shape for p in weights}

    totals, copies, shapes = accumulated()
    assert not any(copies[shape] for shape in shapes)
    with monkeypatch.context() as patch:
        patch.setattr(zero_module, "matrices_of_blocks", lambda stage: set())
        patch.setattr(
            ZeroOptimizer, "_add_gradient", property(lambda zero: type(zero.zero)._update_hp_grad.__get__(zero.zero))
        )
        theirs, copies, _ = accumulated()
    assert min(copies[shape] for shape in shapes) >= 8
    assert all(torch.equal(total, their) for total, their in zip(totals, theirs, strict=True))
    assert any(total.bfloat16().float().ne(total).any() for total in totals)  # not a sum in bfloat16


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_reads_gates_in_float32(topology, zero_stage, offload):
    """dt_bias is about -8, where bfloat16 has steps of 0.03: one of 0.001 would be lost."""
    config = OptimizerConfig(lr=1e-3, warmup_steps=0)
    stage, zero = zero_for(topology, config, precision="bf16", zero_stage=zero_stage, offload=offload)
    drawn = tiny.build_stage(topology, dtype=torch.float32).fast_weight_mixers
    with zero.accumulation(), zero.gathered_parameters():
        for block, mixer in stage.fast_weight_mixers.items():
            for name in ("A_log", "dt_bias"):
                value = mixer.in_float32(name)
                assert torch.equal(value, getattr(drawn[block], name))  # unrounded from the start
                assert getattr(mixer, name).dtype == torch.bfloat16
                value.sum().backward()
    zero.step()
    for block, mixer in stage.fast_weight_mixers.items():
        for name, value in mixer.unrounded.items():
            moved = value - getattr(drawn[block], name).detach()
            torch.testing.assert_close(moved, torch.full_like(moved, -1e-3), rtol=1e-2, atol=0)


def test_learning_rate_warms_up_holds_and_decays():
    config = OptimizerConfig(warmup_steps=10, hold=0.6, final_lr=0.02)
    factors = [lr_factor(step, 100, config) for step in range(1, 101)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:60] == [1.0] * 51
    assert all(a > b for a, b in zip(factors[60:], factors[61:], strict=False))
    assert factors[99] == pytest.approx(max(0.02, 0.01 / 0.4))
    assert lr_factor(1, 100, OptimizerConfig(warmup_steps=0, hold=1.0)) == 1.0
