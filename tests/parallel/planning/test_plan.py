"""The plan against the model, the segments and DeepSpeed themselves, and what it suggests."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.utils import align_dense_tensors

from powernap.model.batch import pad_end, plan_segments
from powernap.model.config import SleepConfig
from powernap.model.mixers import MIXERS
from powernap.model.parameters import parameters
from powernap.model.stage import HybridStage
from powernap.parallel.planning import memory
from powernap.parallel.planning.groups import stage_groups
from powernap.parallel.planning.layout import head_flops, split_layers
from powernap.parallel.planning.plan import plan
from powernap.parallel.planning.suggest import suggest, suggestions_text
from powernap.parallel.planning.timeline import bubble, peak_live
from powernap.parallel.planning.work import PlanError, segment_flops, segments_of
from powernap.parallel.zero.optimizer import ZeroOptimizer
from powernap.train.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RunSection,
    TrainConfig,
    ZeroConfig,
)
from powernap.train.optimizer import build_optimizer
from tests.helpers import mixers, tiny
from tests.helpers.cases import names

GB = 10**9


def recipe(model=None, *, sleep=None, tokens=None, optimizer="adamw", zero=1, offload=False, train=None, **parallel):
    """A recipe of four windows."""
    model = model or tiny.model_config()
    return Recipe(
        run=RunSection(name="planned"),
        model=model,
        sleep=sleep or SleepConfig(passes=2),
        data=DataConfig(train="nowhere", sequence_length=1 + (tokens or 4 * model.window)),
        train=TrainConfig(**{"steps": 1, "global_batch_size": 8, **(train or {})}),
        optimizer=OptimizerConfig(name=optimizer, warmup_steps=0),
        parallel=ParallelConfig(**parallel),
        zero=ZeroConfig(stage=zero, offload=offload),
    )


def whole(planned):
    return parameters(planned.model, planned.sleep, range(planned.model.num_layers))


def large_model(**changes):
    sizes = dict(
        pattern="AGGG" * 6, window=2048, vocab_size=50304, pad_token_id=None, hidden_size=2048,
        mlp=dict(ffn_hidden_size=5632), attention=dict(heads=16), gdn=dict(heads=16, key_dim=128, value_dim=128),
    )  # fmt: skip
    return tiny.model_config(**{**sizes, **changes})


MODELS = {
    "untied": (tiny.model_config(pattern="AGGA", vocab_size=19), SleepConfig()),
    "tied, pass norm": (tiny.model_config(tie_embeddings=True, vocab_size=19), SleepConfig(pass_norm=True)),
    **{
        f"one {mixer.title} block": (tiny.model_config(pattern=letter, vocab_size=18), SleepConfig())
        for letter, mixer in MIXERS.items()
    },
}


def every_stage():
    """(name, model, sleep, blocks) of each stage of MODELS, whole and in two."""
    for name, (model, sleep) in MODELS.items():
        for stages in {1, min(2, model.num_layers)}:
            for number, blocks in enumerate(split_layers(model.pattern, stages)):
                yield f"{name}, stage {number} of {stages}", model, sleep, blocks


def stage_sizes(groups) -> dict[str, dict[str, int]]:
    """What the parameters of every stage of MODELS hold on this rank, by name."""
    stages = {name: HybridStage(model, sleep, groups, blocks=blocks) for name, model, sleep, blocks in every_stage()}
    return {
        name: {stage.global_name(n): p.numel() for n, p in stage.named_parameters()} for name, stage in stages.items()
    }


def sizes_of_two_shards() -> dict[str, dict[str, int]]:
    """`stage_sizes` on the first of two tensor-parallel ranks; this process is told that there is a second one."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from powernap.model.megatron import ProcessGroupCollection, parallel_state
    from powernap.parallel import cpu

    cpu.prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    return stage_sizes(
        ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "pp", "mp", "cp", "dp", "embd"])
    )


@pytest.mark.parametrize("tensor", names([1], [2]))
def test_parameters_are_the_models(topology, tensor):
    """Names and sizes of every stage, whole and per tensor-parallel shard."""
    if tensor == 1:
        theirs = stage_sizes(topology.groups)
    else:
        code = "import test_plan, json; print('RESULT', json.dumps(test_plan.sizes_of_two_shards()))"
        path = os.pathsep.join([os.path.dirname(__file__), str(Path(tiny.__file__).parents[2])])
        environment = {**os.environ, "PYTHONPATH": path}
        output = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True, env=environment)
        theirs = json.loads(output.split("RESULT ")[-1])
    ours = {
        name: {w.name: w.size(tensor) for w in parameters(model, sleep, blocks)}
        for name, model, sleep, blocks in every_stage()
    }
    assert ours == theirs and len(ours) >= 8


@pytest.mark.parametrize("loop_range", [None, (1, 3)])
@pytest.mark.parametrize("backprop_passes", [None, 1])
@pytest.mark.parametrize("every_window", [False, True])
@pytest.mark.parametrize("pass_input", ["hidden", "embeddings"])
def test_segments_are_the_models(loop_range, backprop_passes, every_window, pass_input):
    model = tiny.model_config()
    sleep = SleepConfig(
        passes=3, loop_range=loop_range if pass_input == "hidden" else None, backprop_passes=backprop_passes,
        every_window=every_window, pass_input=pass_input,
    )  # fmt: skip
    tokens, loss_mask = tiny.batch(windows=4, predicting=(1, 3))
    tokens, loss_mask = tokens[:, :-2], loss_mask[:, :-2]  # a short last window
    planned = recipe(model, sleep=sleep, tokens=tokens.shape[1] - 1)
    ours = segments_of(planned, [False, True, False, True])
    assert ours == [replace(s, padded=False) for s in plan_segments(tokens, loss_mask, model, sleep, 3)]
    run = [[block for block, flops in enumerate(blocks) if flops] for blocks in segment_flops(planned, ours)]
    assert run == [list(s.blocks) for s in ours]
    assert [s.label for s in ours][:5] == ["a1", "a2", "a3", "b?", "b1" if every_window else "c1"]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("sequence", [False, True])
def test_segments_with_probes_are_the_models(eviction, sequence):
    model, sleep = tiny.model_config(vocab_size=18), SleepConfig(passes=2, eviction=eviction)
    tokens, loss_mask, probes = tiny.batch_with_probes()
    planned = recipe(
        model, sleep=sleep, tokens=tokens.shape[1] - 1, **({"tensor": 2} if sequence else {}), sequence=sequence
    )
    padded = pad_end(tokens, loss_mask, 1 + sequence, 0)
    theirs = plan_segments(*padded, model, sleep, 2, probes, 1 + sequence)
    ours = segments_of(planned, [False, True] * 3 + [True], probes)
    assert ours == [replace(s, padded=False) for s in theirs]
    result = plan(planned, [False, True] * 3 + [True], probes=probes)
    assert (result.windows, result.windows_slept, result.windows_read, result.probes) == (7, 3, 4, 4)
    assert "3 slept on (N=2), 4 read once, 4 of them forgotten" in " ".join(result.text().split())


def test_a_window_lengthened_for_sequence_parallelism():
    model = tiny.model_config(vocab_size=18)
    assert [len(s.tokens) for s in segments_of(recipe(model, tokens=9, tensor=2, sequence=True))] == [6, 6, 4]
    assert [len(s.tokens) for s in segments_of(recipe(model, tokens=9, tensor=2))] == [6, 6, 3]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_are_what_zero_allocates(topology, optimizer):
    """With one rank; test_plan_measured.py has AdamW in every layout."""
    planned = recipe(optimizer=optimizer)
    stage = tiny.build_stage(topology, planned.model, dtype=torch.float32)
    zero = ZeroOptimizer(
        stage, build_optimizer(stage, planned.optimizer), topology, precision="fp32", clip=1.0, micro_batch_size=3
    )
    with zero.accumulation():
        sum(p.square().sum() for p in stage.parameters()).backward()
    zero.step()
    moments = [x for p in zero._partitions() for x in zero._state(p).values() if torch.is_tensor(x) and x.ndim]
    states = memory.state_bytes(planned, whole(planned))
    assert states.optimizer == sum(x.nbytes for x in moments)
    assert states.weights == sum(x.nbytes for x in zero.zero.bit16_groups_flat)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_padding_is_deepspeeds(ranks):
    planned = recipe(data=ranks, train={"global_batch_size": 24})
    padded = 0
    for group in stage_groups(planned, whole(planned)):
        tensors = [torch.empty(w.size()) for w in group.weights]
        padded += sum(x.numel() for x in align_dense_tensors(tensors, 2 * ranks))  # what stages 1 and 2 call
    states = memory.state_bytes(planned, whole(planned))
    assert states.weights == 4 * padded
    assert states.optimizer == 4 * 2 * padded // ranks  # two moments


def test_zero_stages_split_what_they_say():
    def states(stage):
        planned = recipe(data=8, zero=stage, train={"precision": "bf16"})
        return memory.state_bytes(planned, whole(planned))

    one, two, three = map(states, (1, 2, 3))
    count = sum(w.size() for w in whole(recipe()))
    assert one.optimizer == pytest.approx(12 * count / 8, rel=0.02)
    assert two[:3] == pytest.approx(one[:3], rel=0.02)  # gradients are whole until they are reduced
    assert three.weights == pytest.approx(2 * count / 8, rel=0.02)
    assert three.buffers == pytest.approx(4 * count / 8 + 4 * count + 2 * count, rel=0.02)  # the last: gathered


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("predicts", [True, False])
def test_activations_of_several_blocks_are_about_what_autograd_keeps(topology, precision, predicts):
    mixers.check_activations(
        topology, "AGGA", precision, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], predicts
    )


def test_live_segments_hold_hidden_states_and_fast_weights(topology):
    model = tiny.model_config()
    stage = tiny.build_stage(topology, model, dtype=torch.float32)
    planned = recipe(model, train={"micro_batch_size": 2})
    fast_weights = sum(s.nbytes for s in stage.empty_layer_states(2))
    hidden_states = 4 * model.window * 2 * model.hidden_size
    # three windows: the second pass gets hidden states from the first; seven segments write, the first starts from zeros
    assert plan(planned).stages[0].memory.segments == 3 * hidden_states + (7 + 1) * fast_weights


def test_a_stage_keeps_what_it_was_sent_and_not_what_it_sends():
    planned = recipe(pipeline=2, train={"global_batch_size": 2})
    saved, _, _ = memory.replay(planned, segments_of(planned), 0, "cpu")
    states = memory.fast_weight_bytes(planned, planned.stage_blocks[0])
    hidden_states, live, zeros = 4 * tiny.WINDOW * 16, 14, 2  # two micro-batches of seven segments, each from zeros
    assert saved == live * (hidden_states + states) + zeros * (states - hidden_states)


def test_sliding_windows_leave_keys_and_values_once():
    saved = [
        plan(recipe(sleep=SleepConfig(passes=2, eviction=e))).stages[0].memory.segments for e in ("hard", "sliding")
    ]
    keys_values = 2 * 2 * 8 * (tiny.WINDOW - 1) * 16 * 4  # blocks, keys and values, sequences, tokens, width, bytes
    assert saved[1] - saved[0] == 4 * keys_values  # after each of four windows


def test_a_pipeline_of_a_large_model():
    settings = {"global_batch_size": 256, "precision": "bf16", "micro_batch_size": 2}
    sections = dict(sleep=SleepConfig(passes=4), data=8, tensor=2, pipeline=4, sequence=True, train=settings)
    result = plan(recipe(large_model(), **sections), memory_limit=80 * GB)
    assert (result.ranks, result.segments, result.micro_batches) == (64, 13, 16)
    assert result.tokens_per_step == 256 * 8192
    assert result.pipeline_layout == "AGGGAG|GGAGGG|AGGGAG|GGAGGG"
    assert [s.live_segments for s in result.stages] == [peak_live(4, stage, 16, 13) for stage in range(4)]
    assert sum(s.parameters for s in result.stages) == result.parameters
    assert sum(s.share_of_work for s in result.stages) == pytest.approx(1)
    assert result.bubble_formula == bubble(4, 16, 13) < result.bubble < 0.05
    assert result.flops_per_token_asleep < 4 * result.flops_per_token_awake
    assert result.fits and max(s.memory.total for s in result.stages) < 10 * GB
    assert not plan(recipe(large_model(), **sections), memory_limit=3 * GB).fits
    without = plan(recipe(large_model(), **{**sections, "train": {**settings, "recompute": "none"}}))
    for kept, recomputed in zip(without.stages, result.stages, strict=True):
        assert kept.memory.activations > 10 * recomputed.memory.activations
    # A little more: the head runs in chunks, which are recomputed all the same.
    assert without.flops_per_step / result.flops_per_step == pytest.approx(3 / 4, rel=0.003)


def test_a_7b_model_with_128_windows_in_a_pipeline_fits_with_its_inputs_on_the_host():
    model = large_model(
        pattern="AGGG" * 8, hidden_size=4096, mlp=dict(ffn_hidden_size=11008),
        attention=dict(heads=32), gdn=dict(heads=32, key_dim=128, value_dim=128),
    )  # fmt: skip
    train = {"precision": "bf16", "micro_batch_size": 1}
    sections = dict(sleep=SleepConfig(passes=4), tokens=128 * 2048, pipeline=8)

    def second_stage(**changes):
        planned = recipe(model, **sections, train={**train, **changes})
        return memory.stage_memory(planned, segments_of(planned), 1)

    kept, offloaded = second_stage(), second_stage(offload_inputs=True)
    assert not memory.fits(kept, 80 * GB) and memory.fits(offloaded, 80 * GB)
    assert kept.segments > 90 * GB and offloaded.segments < 1 * GB and kept.host_inputs == 0
    assert offloaded.host_inputs == pytest.approx(kept.segments, rel=0.01)  # powers of two, each
    assert kept.activations == pytest.approx(offloaded.activations, rel=0.1)


def test_choices_of_recomputation_by_flops():
    result = plan(recipe(large_model(), pipeline=2, train={"precision": "bf16"}))
    by_name = {(c.recompute, c.offload_inputs): c for c in result.choices}
    assert len(by_name) == 8 and result.choices == sorted(
        result.choices, key=lambda c: (c.flops_per_step, c.offload_inputs)
    )
    own = by_name["segment", False]
    assert (own.flops_per_step, own.bytes) == (result.flops_per_step, max(s.memory.total for s in result.stages))
    memory_of = {kind: by_name[kind, False].bytes for kind in ("none", "selective", "blocks", "segment", "nested")}
    assert memory_of["none"] > memory_of["selective"] > memory_of["segment"] > memory_of["blocks"] > memory_of["nested"]
    for kind in ("blocks", "segment", "nested"):
        assert by_name[kind, True].bytes < by_name[kind, False].bytes and by_name[kind, True].host > 0
    assert by_name["blocks", True].host > by_name["segment", True].host == by_name["nested", True].host
    zero_3 = plan(recipe(large_model(), data=2, zero=3))
    assert "selective" not in {choice.recompute for choice in zero_3.choices}


def test_a_cheaper_choice_is_suggested_only_where_memory_asks_for_it():
    sections = recipe(large_model(window=8192), tokens=8 * 8192, train={"global_batch_size": 8, "precision": "bf16"})
    ample, tight = (suggest(sections, 8, memory_limit=limit) for limit in (400 * GB, 16 * GB))
    assert all(s.flops is None and s.recompute == "segment" and not s.offload_inputs for s in ample if s.fits)
    changed = [s for s in tight if s.flops is not None]
    assert changed and all(s.fits and s.flops >= 1 for s in changed)
    text = suggestions_text(tight, 8)
    assert max(map(len, text.splitlines())) <= 80
    one = next(s for s in tight[:10] if s.flops is not None)
    assert f"recompute {one.recompute}" in text and f"{one.flops:.2f} x FLOPs" in text
    assert f"train.recompute={one.recompute}" in one.overrides()


@pytest.mark.parametrize(
    ("before", "now"), [(True, "segment"), (False, "none"), ("true", "segment"), ("blocks", "blocks")]
)
def test_switches_of_older_recipes(before, now):
    assert TrainConfig(steps=1, global_batch_size=1, recompute=before).recompute == now


def test_flops_of_a_step_count_what_runs():
    three = 3 * tiny.WINDOW
    result = plan(recipe(sleep=SleepConfig(passes=2), tokens=three), predicts=[False, True, True])
    tokens, sequences = tiny.WINDOW, 8
    forward = result.flops_per_token_asleep * tokens + 2 * result.flops_per_token_awake * tokens
    again = forward - head_flops(recipe().model) * tokens  # the last loss's head is not computed again
    assert result.flops_per_step == (3 * forward + again) * sequences
    assert (result.windows_slept, result.windows_read, result.segments, result.windows_assumed) == (1, 2, 4, False)
    # the blocks before the last pass's last write twice, that one short, its last pass without output and MLP
    once = plan(recipe(sleep=SleepConfig(passes=1), tokens=three))
    assert once.flops_per_token_asleep < result.flops_per_token_asleep < 2 * result.flops_per_token_awake


def test_truncated_backpropagation_keeps_fewer_activations():
    whole, truncated = (
        plan(recipe(sleep=SleepConfig(passes=4, backprop_passes=k), train={"recompute": "none"})).stages[0].memory
        for k in (None, 1)
    )
    assert truncated.activations < 0.5 * whole.activations


def test_offloading_moves_the_states_to_the_host():
    topology, there = (plan(recipe(offload=offload)).stages[0].memory for offload in (False, True))
    assert there.host == topology.weights + topology.optimizer and there.optimizer == 0  # master weights and moments
    assert (topology.buffers, there.buffers) == (0, topology.gradients)  # a staging buffer comes with offloading
    assert topology.total - there.total == topology.optimizer - there.buffers


def test_text_is_plain_and_narrow():
    sections = recipe(
        large_model(), data=2, tensor=2, pipeline=8, train={"global_batch_size": 32, "micro_batch_size": 1}
    )
    for result in (plan(sections), plan(recipe(), memory_limit=1 * GB), plan(recipe(pipeline=2), memory_limit=1000)):
        text = result.text()
        assert text.isascii() and "\033" not in text
        assert max(map(len, text.splitlines())) <= 80, text
        coloured = result.text(colour=True)
        assert re.sub(r"\033\[[0-9;]*m", "", coloured) == text
    assert "fits       NO" in text and "\033[38;5;" in coloured


def test_picture_of_a_small_schedule():
    lines = plan(recipe(pipeline=2, tokens=tiny.WINDOW, train={"global_batch_size": 2})).text().splitlines()
    picture = [line.rstrip() for line in lines if line.startswith("stage ") and "blocks" not in line]
    assert [line[:17] for line in picture] == ["stage 0  a?a? . .", "stage 1   .a?A?--"]
    assert all(line.count("A?") == 2 for line in picture)


def test_json_holds_the_numbers():
    result = plan(recipe(pipeline=2, data=2), memory_limit=80 * GB)
    values = json.loads(result.as_json())
    assert values["stages"][1]["memory"]["total"] == result.stages[1].memory.total
    assert values["fits"] is True and values["pipeline_layout"] == "AG|AG" and "picture" not in values


@pytest.mark.wide  # test_a_cheaper_choice_is_suggested_only_where_memory_asks_for_it
def test_suggestions_can_run_and_the_best_come_first():
    sections = recipe(large_model(), sleep=SleepConfig(passes=4), train={"global_batch_size": 256, "precision": "bf16"})
    found = suggest(sections, 64, memory_limit=20 * GB)
    assert len(found) > 5
    assert len({(s.data, s.tensor, s.pipeline, s.zero_stage) for s in found}) == len(found)
    fitting = [s for s in found if s.fits]
    assert fitting and found[: len(fitting)] == fitting
    assert [round(s.efficiency, 3) for s in fitting] == sorted((round(s.efficiency, 3) for s in fitting), reverse=True)
    for s in found:
        assert s.data * s.tensor * s.pipeline == 64 and 0 < s.efficiency < 1
        again = recipe(
            large_model(), sleep=SleepConfig(passes=4), data=s.data, tensor=s.tensor, pipeline=s.pipeline,
            sequence=s.sequence_parallel, zero=s.zero_stage,
            train={
                "global_batch_size": 256, "precision": "bf16", "micro_batch_size": s.micro_batch_size,
                "recompute": s.recompute, "offload_inputs": s.offload_inputs,
            },
        )  # fmt: skip
        result = plan(again, memory_limit=20 * GB)
        assert max(stage.memory.total for stage in result.stages) == s.bytes and result.fits == s.fits
    text = suggestions_text(found, 64)
    assert max(map(len, text.splitlines())) <= 80
    assert all(part in text for part in found[0].overrides().split())


@pytest.mark.wide
def test_less_memory_asks_for_more_model_parallelism():
    def split(limit):
        sections = recipe(large_model(), train={"global_batch_size": 64, "precision": "bf16"})
        best = suggest(sections, 16, memory_limit=limit)[0]
        assert best.fits
        return best.tensor * best.pipeline

    assert split(80 * GB) < split(5 * GB)


def test_no_layout_is_said():
    with pytest.raises(PlanError, match="no layout of 7 devices"):
        suggest(recipe(), 7)
    assert not any(s.fits for s in suggest(recipe(), 2, memory_limit=1000))


def test_no_torch():
    code = "import sys; import powernap.parallel.planning.suggest; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_few_tokens_in_a_segment_are_noted_with_the_micro_batch_that_has_enough():
    def notes(micro_batch_size, precision="bf16"):
        train = {"precision": precision, "micro_batch_size": micro_batch_size}
        return plan(recipe(large_model(window=512), tokens=1025, train=train)).notes

    (note,) = notes(1)
    assert "512 tokens" in note and "39%" in note and "train.micro_batch_size=4 has 2,048" in note
    assert notes(4) == notes(1, "fp32") == []
