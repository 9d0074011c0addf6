"""Every parallel layout against one process: loss, predictions and every gradient on every rank.

Float64. With tensor parallelism Megatron-core's cross-entropy computes in float32, which sets the bound there.
"""

import itertools

import pytest

from powernap.model.mixers import MIXERS
from tests.helpers import layouts
from tests.helpers.cases import asked_for, names
from tests.helpers.layouts import FURTHER, GROUPED, Case
from tests.helpers.processes import run_cases

TIED = {"tie_embeddings": True}
ODD = {"vocab_size": 19}  # two tensor ranks do not divide it
FOUR = {"attention": {"heads": 4}, "gdn": {"heads": 4}}
LAYOUTS = {
    "TP2": dict(tensor=2),
    "TP2+SP": dict(tensor=2, sequence=True),
    "PP2": dict(pipeline=2, micro_batches=4),
    "PP3 uneven": dict(pipeline=3, layout="AG|G|AAG", model={"pattern": "AGGAAG"}, micro_batches=6),
    "PP4": dict(pipeline=4, micro_batches=4),
    "TP2xPP2+SP": dict(tensor=2, pipeline=2, sequence=True),
    "DP2xPP2": dict(data=2, pipeline=2),
    "DP2xTP2": dict(data=2, tensor=2),
}
ONE, SEVERAL = dict(predicting=(2,)), dict(windows=4, predicting=(1, 3))
TEXT = dict(predicting=(0, 1, 2))
EVICTIONS = {"hard": {}, "sliding": {"eviction": "sliding"}}

KINDS = ("segment", "blocks", "nested", "selective")
OTHERS = [letter for letter, mixer in MIXERS.items() if mixer.has_fast_weights and letter != "G"]


def with_others(pattern: str = "AGAG") -> dict:
    """The pattern with the other mixers in turn in the place of the gated delta nets."""
    others = itertools.cycle(OTHERS)
    return {"pattern": "".join(next(others) if letter == "G" else letter for letter in pattern)}


# Two micro-batches, but a number of stages to show a pipeline that is full: forward and backward passes in turn.
EACH_LAYOUT = {
    f"{name}, recompute {kind}, {len(windows['predicting'])} answer windows, {eviction}": Case(
        **layout, **windows, recompute=kind, sleep=EVICTIONS[eviction]
    )
    for number, (name, layout) in enumerate(LAYOUTS.items())
    for kind, windows, eviction in [
        (KINDS[number % 4], ONE, "hard") if number % 2 else (KINDS[number % 4], SEVERAL, "sliding"),
        ("none", SEVERAL, "hard") if number % 2 else ("none", ONE, "hard"),
    ]
} | {
    f"{name}, every other mixer, {eviction}": Case(
        **{**layout, "layout": None, "model": with_others(layout.get("model", {}).get("pattern", "AGAG"))},
        **windows,
        recompute=kind,
        sleep=EVICTIONS[eviction],
    )
    for number, (name, layout) in enumerate({"one process": {}, **LAYOUTS}.items())
    for kind, windows, eviction in [(KINDS[number // 2], SEVERAL, "sliding") if number % 2 else ("none", ONE, "hard")]
    if OTHERS
}
# Each layout once with each choice of the other axes, and what only some layouts can get wrong.
ONCE = {
    name: case
    for name, case in EACH_LAYOUT.items()
    if case.recompute != "none" or name.startswith(("PP4", "TP2xPP2+SP, every other"))
    if not name.startswith(("PP2, every other", "TP2, every other"))
}
CASES = {
    "one process": Case(),
    **ONCE,
    "one process, inputs on the host": Case(
        recompute="segment", offload_inputs=True, passes=3, sleep=dict(write="last")
    ),
    "PP2, inputs on the host, sliding": Case(
        pipeline=2, **SEVERAL, micro_batches=4, recompute="segment", offload_inputs=True, sleep=EVICTIONS["sliding"]
    ),
    "PP2, tied embeddings": Case(pipeline=2, model=TIED),
    "TP2xPP2+SP, tied embeddings, pads": Case(tensor=2, pipeline=2, sequence=True, model=TIED, pads=True),
    "TP2+SP, short last window, sliding, pads": Case(
        tensor=2, sequence=True, last_window=4, pads=True, sleep=EVICTIONS["sliding"]
    ),
    "PP2, one window: Megatron-core's plain 1F1B": Case(pipeline=2, windows=1, predicting=(0,), micro_batches=4),
    "PP2, pass norm, embeddings again, part of the blocks": Case(
        pipeline=2, passes=3, sleep=dict(pass_norm=True, reinject_embeddings=True, loop_range=[1, 3])
    ),
    "PP4, part of the blocks": Case(
        pipeline=4,
        layout="A|G|G|A",
        model={"pattern": "AGGA"},
        micro_batches=4,
        passes=3,
        sleep=dict(loop_range=[1, 3]),
    ),
    "PP2, truncated back-propagation": Case(
        pipeline=2, recompute="nested", offload_inputs=True, passes=3, sleep=dict(backprop_passes=1)
    ),
    "TP2xPP2+SP, every window, sliding": Case(
        tensor=2, pipeline=2, sequence=True, **TEXT, sleep=dict(every_window=True, eviction="sliding")
    ),
    "TP2xPP2+SP, carried, pads": Case(
        tensor=2,
        pipeline=2,
        sequence=True,
        pads=True,
        recompute="blocks",
        offload_inputs=True,
        **TEXT,
        sleep=dict(every_window=True, carry=True),
    ),
    "one process, separate documents, sliding": Case(separate=True, sleep=dict(every_window=True, eviction="sliding")),
    "TP2+SP, separate documents, further letters": Case(
        tensor=2, sequence=True, separate=True, model=FURTHER, sleep=dict(every_window=True, eviction="sliding")
    ),
    "PP2, separate documents, every other mixer, sliding": Case(
        pipeline=2, separate=True, model=with_others(), sleep=dict(every_window=True, eviction="sliding")
    ),
    "DP2, separate documents": Case(data=2, separate=True, unequal=True, sleep=dict(every_window=True)),
    "PP2, embeddings again": Case(pipeline=2, passes=3, sleep=dict(pass_input="embeddings")),
    "PP2, last write alone": Case(pipeline=2, recompute="segment", passes=3, sleep=dict(write="last")),
    "PP2, nothing after the last write": Case(pipeline=2, model={"pattern": "GA"}, predicting=(1,)),
    "PP2, eight micro-batches": Case(pipeline=2, micro_batches=8),
    "TP2+SP, grouped and gated heads, sliding": Case(
        tensor=2, sequence=True, model=GROUPED, sleep=EVICTIONS["sliding"], recompute="selective"
    ),
    "PP2, further choices and letters, sliding": Case(pipeline=2, model=FURTHER, sleep=EVICTIONS["sliding"]),
    "DP2xTP2, further choices and letters": Case(data=2, tensor=2, recompute="segment", model=FURTHER),
    "TP2xPP2+SP, probes, sliding, pads": Case(
        tensor=2, pipeline=2, sequence=True, probes=True, pads=True, sleep=EVICTIONS["sliding"]
    ),
    "DP2xPP2, probes, every other mixer": Case(data=2, pipeline=2, probes=True, unequal=True, model=with_others()),
    "TP2+SP, the head in chunks": Case(tensor=2, sequence=True, recompute="segment", unequal=True, head_numbers=30),
    "DP2xPP2, unequal loss tokens": Case(data=2, pipeline=2, unequal=True),
    "TP2xPP2+SP, vocabulary padded, tied, the head in chunks": Case(
        tensor=2, pipeline=2, sequence=True, recompute="segment", head_numbers=30, model={**TIED, **ODD}, unequal=True
    ),
    "DP2xTP2, vocabulary padded": Case(data=2, tensor=2, model=ODD),
    "TP4, a rank with pads alone": Case(tensor=4, predicting=(1, 2), model=FOUR | {"vocab_size": 9}),
}
WIDE = {
    f"{name}, recompute {kind}, {len(windows['predicting'])} answer windows, {eviction}, N={passes}":
    Case(**layout, **windows, recompute=kind, sleep=EVICTIONS[eviction], passes=passes)
    for (name, layout), kind, windows, eviction, passes in itertools.product(
        LAYOUTS.items(), ("segment", "none"), (ONE, SEVERAL), EVICTIONS, (1, 2, 4)
    )
} | {
    f"{name}, recompute {kind}{', inputs on the host' * offload_inputs}, {eviction}, N=3":
    Case(**layout, **SEVERAL, recompute=kind, offload_inputs=offload_inputs, sleep=EVICTIONS[eviction], passes=3)
    for (name, layout), kind, offload_inputs, eviction in itertools.product(
        LAYOUTS.items(), KINDS, (False, True), EVICTIONS
    )
    if not (offload_inputs and kind == "selective")
} | {
    f"{name}, {option}={value}, recompute {kind}, {eviction}":
    Case(**layout, **SEVERAL, recompute=kind, passes=3, sleep={option: value, **EVICTIONS[eviction]})
    for (name, layout), (option, value), (kind, eviction) in itertools.product(
        LAYOUTS.items(), [("pass_input", "embeddings"), ("write", "last")], [("segment", "hard"), ("none", "sliding")]
    )
} | {
    f"{name}, probes, recompute {kind}, {eviction}, N={passes}":
    Case(**layout, probes=True, recompute=kind, sleep=EVICTIONS[eviction], passes=passes)
    for (name, layout), kind, eviction, passes in itertools.product(
        LAYOUTS.items(), ("segment", "none"), EVICTIONS, (1, 3)
    )
} | EACH_LAYOUT | {
    "PP2, no sleep": Case(pipeline=2, passes=1),
    "PP2, every window": Case(pipeline=2, **TEXT, sleep=dict(every_window=True)),
    "PP2, carried": Case(pipeline=2, **TEXT, sleep=dict(every_window=True, carry=True)),
    "PP2, grouped and gated heads": Case(pipeline=2, model=GROUPED),
    "PP2, the head in chunks, tied": Case(pipeline=2, unequal=True, head_numbers=50, model=TIED),
    "DP2, unequal loss tokens": Case(data=2, unequal=True),
    "TP2, unequal loss tokens": Case(tensor=2, unequal=True),
    "PP2, probes, kept": Case(pipeline=2, probes=True),
    "TP2+SP, further choices and letters": Case(tensor=2, sequence=True, model=FURTHER),
    "TP2, separate documents, sliding": Case(
        tensor=2, separate=True, recompute="segment", sleep=dict(every_window=True, eviction="sliding")
    ),
    "PP2, separate documents": Case(pipeline=2, separate=True, recompute="segment", sleep=dict(every_window=True)),
    "PP2, short last window, pads": Case(pipeline=2, last_window=4, pads=True),
    "TP2, probes": Case(tensor=2, recompute="selective", probes=True),
    "PP2, last write alone, every window": Case(
        pipeline=2, recompute="segment", predicting=(0, 1, 2), sleep=dict(write="last", every_window=True)
    ),
    "PP2, last write alone, truncated, part of the blocks": Case(
        pipeline=2, recompute="segment", passes=3, sleep=dict(write="last", backprop_passes=1, loop_range=[1, 3])
    ),
}  # fmt: skip
WIDE = {name: case for name, case in WIDE.items() if name not in CASES}
DROPOUT = {
    "dropout, computed again": Case(dropout=0.3, recompute="nested", **TEXT, sleep=dict(every_window=True)),
    "dropout, selective": Case(dropout=0.3, recompute="selective", sleep=EVICTIONS["sliding"]),
    "dropout, TP2+SP": Case(dropout=0.3, tensor=2, sequence=True, recompute="segment", pads=True),
    "dropout, PP2, a block without an MLP": Case(
        dropout=0.3,
        pipeline=2,
        recompute="blocks",
        micro_batches=4,
        model={"pattern": "AgGA", "gdn": {"norms": "sandwich"}},
    ),
    "dropout, DP2xTP2": Case(dropout=0.3, data=2, tensor=2),
}
BROKEN = {
    "dropout of another rank's tokens, TP2+SP": Case(
        dropout=0.3, tensor=2, sequence=True, broken="dropout of a rank's tokens"
    ),
    "dropout drawn anew": Case(dropout=0.3, recompute="segment", broken="dropout when computed again"),
    "a token's loss at another token, TP2": Case(tensor=2, unequal=True, broken="loss tokens"),
    "fast weights of another document, PP2": Case(
        pipeline=2, separate=True, sleep=dict(every_window=True), broken="fast weights of another document"
    ),
    "keys of another document": Case(
        separate=True, sleep=dict(every_window=True, eviction="sliding"), broken="keys of another document"
    ),
    "fast weights' gradient lost": Case(broken="fast weights' gradient"),
    "fast weights' gradient lost, PP2": Case(pipeline=2, broken="fast weights' gradient"),
    "norm gradients not summed, TP2+SP": Case(tensor=2, sequence=True, broken="shared gradients"),
    "a mixer's heads of another rank, TP2": Case(tensor=2, broken="split of a mixer"),
    "a probe's gradient lost, PP2": Case(pipeline=2, probes=True, broken="probe's gradient"),
    "a probe remembered, TP2": Case(tensor=2, probes=True, broken="forgetting"),
    "tied gradients not summed, PP2": Case(pipeline=2, model=TIED, broken="shared gradients"),
    "messages batched, PP2": Case(pipeline=2, micro_batches=4, broken="links"),
    "nothing carried, PP2": Case(
        pipeline=2, **TEXT, sleep=dict(every_window=True, carry=True), broken="carried fast weights"
    ),
    "a block computed again from another's input": Case(recompute="blocks", broken="inputs of blocks"),
    "a block computed again from another's input, PP2": Case(pipeline=2, recompute="nested", broken="inputs of blocks"),
    "inputs of another segment, PP2": Case(
        pipeline=2, recompute="segment", offload_inputs=True, broken="inputs on the host"
    ),
    "pads win, TP2": Case(tensor=2, model=ODD, broken="pads of the vocabulary"),
    "a mean of the ranks' means, DP2": Case(data=2, unequal=True, broken="global token mean, ranks"),
    "a mean of the ranks' means, DP2xPP2": Case(data=2, pipeline=2, unequal=True, broken="global token mean, ranks"),
    "a mean of the micro-batches' means": Case(unequal=True, broken="global token mean, micro-batches"),
}
# One of each kind, for `make test`.
FAST = [
    "TP2xPP2+SP, vocabulary padded, tied, the head in chunks",
    "TP2, recompute segment, 2 answer windows, sliding",
    "PP2, recompute nested, 2 answer windows, sliding",
    "TP2xPP2+SP, carried, pads",
    "TP2+SP, separate documents, further letters",
    "PP2, truncated back-propagation",
    "DP2xPP2, probes, every other mixer",
    "dropout, TP2+SP",
]
FAST_BROKEN = [
    "pads win, TP2",
    "fast weights' gradient lost, PP2",
    "norm gradients not summed, TP2+SP",
    "a mixer's heads of another rank, TP2",
    "tied gradients not summed, PP2",
    "a mean of the ranks' means, DP2",
]
FREED = Case(pipeline=2, micro_batches=4, broken="memory of what is sent")


@pytest.fixture(scope="module")
def results(request):
    grids = CASES | WIDE | DROPOUT | BROKEN | {"freed": FREED}
    return run_cases(layouts.compare, asked_for(request, grids, "freed"))


@pytest.mark.parametrize("name", names(FAST, CASES | DROPOUT | WIDE))
def test_equals_one_process(results, name):
    assert_exact((CASES | DROPOUT | WIDE)[name], results[name])


@pytest.mark.parametrize("name", names(FAST_BROKEN, BROKEN))
def test_the_comparison_sees_what_is_broken(results, name):
    assert max(result["gradient"]["error"] for result in results[name]) > 0.1


def test_the_comparison_sees_memory_freed_before_it_is_sent(results):
    assert all(result["freed"] for result in results["freed"])


@pytest.mark.wide
def test_equals_one_process_on_eight():
    name, case = "TP2xPP2xDP2+SP", Case(tensor=2, pipeline=2, data=2, sequence=True, **SEVERAL)
    assert_exact(case, run_cases(layouts.compare, {name: case})[name])


def assert_exact(case: Case, results: list[dict]) -> None:
    assert len(results) == case.world_size
    assert not any(result["freed"] for result in results)
    bound = 1e-6 if case.tensor > 1 else 1e-10
    for result in results:
        assert result["loss"] < bound
        assert result["gradient"]["error"] < bound, result["gradient"]["name"]
        assert result["predictions"] and result["read_losses"] < bound
        assert result["carried"] < bound and result["health"] < bound
        assert result["counted"] == 1
        assert result["parameters"] > 0
