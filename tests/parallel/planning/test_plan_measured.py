"""The plan against real ranks: every live tensor of a training step in each layout is counted.

On CPUs with gloo; what CUDA's kernels keep is not measured here.
"""

import pytest

from powernap.parallel.planning.memory import stage_memory
from powernap.parallel.planning.work import segments_of
from powernap.train.config import Recipe
from tests.helpers import plan_measured
from tests.helpers.cases import asked_for, names
from tests.helpers.processes import run_cases

MODEL = dict(
    pattern="AGAG", window=32, vocab_size=128, hidden_size=64, mlp=dict(ffn_hidden_size=96), attention=dict(heads=2),
    gdn=dict(heads=2, key_dim=16, value_dim=24, conv_kernel=3),
)  # fmt: skip
AG = {"pattern": "AG"}
LAYOUTS = {
    "one process": {},
    "TP2+SP": dict(tensor=2, sequence=True, model=AG),
    "PP2": dict(pipeline=2),
    "DP2, ZeRO 1": dict(data=2, model=AG),
    "DP2, ZeRO 2": dict(data=2, zero=2, model=AG),
    "DP2, ZeRO 3": dict(data=2, zero=3, model=AG),
    "DP2xPP2": dict(data=2, pipeline=2),
    "TP2xPP2": dict(tensor=2, pipeline=2),
}
SLIDING = {"passes": 3, "eviction": "sliding", "loop_range": [1, 3]}
MANY_WEIGHTS = {
    "mlp": {"ffn_hidden_size": 1024},
    "window": 16,
}  # the optimizer's step is the peak, not the backward pass


FROZEN = ["embedding", "decoder.layers.[01]", "*.mlp"]  # all of the first of two stages


CARRY = {"passes": 2, "every_window": True, "carry": True}


def recipe(
    precision="fp32",
    recompute="segment",
    zero=1,
    sequences=4,
    sleep=None,
    model=None,
    tokens=97,
    freeze=None,
    optimizer=None,
    offload_inputs=False,
    **parallel,
) -> Recipe:
    """`sequences` on each data rank, in two micro-batches."""
    batch = sequences * parallel.get("data", 1)
    values = {
        "run": {"name": "measured"},
        "model": {**MODEL, **(model or {})},
        "sleep": sleep or {"passes": 2},
        "data": {"train": "nowhere", "sequence_length": tokens, "lanes": batch},
        "train": {
            "steps": 10,
            "global_batch_size": batch,
            "micro_batch_size": sequences // 2,
            "precision": precision,
            "recompute": recompute,
            "freeze": freeze,
            "offload_inputs": offload_inputs,
        },
        "optimizer": {"warmup_steps": 0, **(optimizer or {})},
        "parallel": parallel,
        "zero": {"stage": zero},
    }
    return Recipe.model_validate(values)


# Activations are most of the memory.
LONGER = {"model": {"pattern": "AGAG", "window": 128}, "tokens": 3 * 128 + 1}
MOST = {name: layout for name, layout in LAYOUTS.items() if name not in ("DP2, ZeRO 1", "DP2xPP2")}
# Precision and recomputation in turn, and what only some layouts can get wrong.
CASES = {
    f"{name}, {precision}, recompute {kind}": recipe(precision, kind, **layout)
    for number, (name, layout) in enumerate(MOST.items())
    for precision, kind in [("fp32", "segment") if number % 2 else ("bf16", "none")]
} | {
    "one process, recompute selective": recipe("fp32", "selective", **LONGER),
    "one process, bf16, recompute blocks, inputs on the host": recipe("bf16", "blocks", **LONGER, offload_inputs=True),
    "PP2, recompute nested": recipe("fp32", "nested", pipeline=2, **LONGER),
    "one process, many weights, bf16": recipe("bf16", sequences=2, model=MANY_WEIGHTS),
    "PP2, carried": recipe(sleep=CARRY, pipeline=2),
    "one process, probes": recipe(tokens=108),
    "DP2xTP2, Muon": recipe(data=2, tensor=2, model=AG, optimizer={"name": "muon"}),
    "DP2xPP2, frozen": recipe(freeze=FROZEN, data=2, pipeline=2),
    "DP2, ZeRO 3, frozen": recipe("bf16", freeze=["embedding", "*.mlp"], data=2, zero=3, model=AG),
}
# One of each kind, for `make test`.
FAST = [
    "TP2+SP, fp32, recompute segment",
    "DP2, ZeRO 3, bf16, recompute none",
    "one process, probes",
    "DP2xPP2, frozen",
]
WIDE = {
    f"{name}, {precision}, recompute {kind}": recipe(precision, kind, **layout)
    for name, layout in LAYOUTS.items()
    for precision, kind in [("bf16", "none"), ("fp32", "segment")]
} | {
    "one process, bf16, recompute blocks": recipe("bf16", "blocks", **LONGER),
    "one process, recompute nested": recipe("fp32", "nested", **LONGER),
    "one process, recompute blocks, inputs on the host": recipe("fp32", "blocks", **LONGER, offload_inputs=True),
    "TP2, bf16, recompute selective": recipe("bf16", "selective", tensor=2, **LONGER),
    "PP2, recompute blocks": recipe("fp32", "blocks", pipeline=2, **LONGER),
    "PP2, recompute nested, inputs on the host": recipe("fp32", "nested", pipeline=2, **LONGER, offload_inputs=True),
    "PP2, sliding, recompute segment, inputs on the host": recipe(sleep=SLIDING, pipeline=2, offload_inputs=True),
    "one process, fp32, keep": recipe("fp32", "none"),
    "one process, bf16, recompute segment": recipe("bf16"),
    "one process, carried": recipe(sleep=CARRY),
    "one process, last write alone, truncated": recipe(sleep={"passes": 3, "write": "last", "backprop_passes": 1}),
    "DP2, ZeRO 1, many weights, bf16": recipe("bf16", sequences=2, model=MANY_WEIGHTS, data=2),
    "PP2, bf16, frozen": recipe("bf16", freeze=FROZEN, pipeline=2),
    "DP2, ZeRO 2, frozen": recipe(freeze=["embedding", "*.mlp"], data=2, zero=2, model=AG),
    "PP2, sliding": recipe(sleep=SLIDING, pipeline=2),
    "PP2, truncated back-propagation": recipe(sleep={"passes": 4, "backprop_passes": 1}, pipeline=2),
    "PP2, last write alone": recipe(sleep={"passes": 3, "write": "last"}, pipeline=2),
    "one process, embeddings again, keep": recipe(recompute="none", sleep={"passes": 3, "pass_input": "embeddings"}),
}
WIDE = {name: case for name, case in WIDE.items() if name not in CASES}


@pytest.fixture(scope="module")
def measured(request):
    asked = asked_for(request, CASES | WIDE)
    return run_cases(plan_measured.measure, asked, lambda recipe: recipe.parallel.world_size)


@pytest.mark.parametrize("name", names(FAST, CASES | WIDE))
def test_plan_is_what_ranks_hold(measured, name):
    assert_as_planned((CASES | WIDE)[name], measured[name])


def assert_as_planned(planned: Recipe, ranks: list[dict[str, int]]) -> None:
    assert len(ranks) == planned.parallel.world_size
    if planned.optimizer.name == "muon":
        assert (
            max(rank["optimizer"] for rank in ranks) == stage_memory(planned, segments_of(planned), 0, "cpu").optimizer
        )
    for rank in ranks:
        predicts, probes = [True] * 3 if planned.sleep.every_window else None, plan_measured.probes_of(planned)
        if probes:
            predicts = [False, True] * len(probes)
        memory = stage_memory(planned, segments_of(planned, predicts, probes), rank["stage"], "cpu")
        exact = ["weights", "gradients", "host_inputs"]
        if planned.optimizer.name != "muon":  # of which the plan has the fullest data rank
            exact.append("optimizer")
        if not planned.train.offload_inputs:
            exact.append("segments")
        for part in exact:
            assert rank[part] == getattr(memory, part), part
        # Here the host's memory is the device's.
        assert memory.total + memory.host_inputs == pytest.approx(rank["total"], rel=0.1)
