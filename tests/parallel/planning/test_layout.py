"""Blocks to stages: exact against brute force, the recipe's layouts, and costs against the model itself."""

import itertools
import subprocess
import sys

import pytest

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.parallel.planning.layout import (
    Costs,
    LayoutError,
    consolidation_flops,
    format_layout,
    sequence_costs,
    split_layers,
)
from tests.helpers import tiny

COSTS = [
    Costs(0, (1,) * 7, 0),
    Costs(0, (5, 1, 1, 1, 1, 5), 0),
    Costs(3, (2, 7, 1, 8, 2, 8), 9),
    Costs(0, (1, 1, 1, 1), 100),
    Costs(0, (4, 3, 3, 2, 6, 2, 2), 1),
]


def stage_costs(stages, costs):
    sums = [sum(costs.blocks[block] for block in blocks) for blocks in stages]
    sums[0] += costs.embedding
    sums[-1] += costs.head
    return sums


def every_split(blocks, stages):
    for cuts in itertools.combinations(range(1, blocks), stages - 1):
        yield [range(*pair) for pair in itertools.pairwise([0, *cuts, blocks])]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_balanced_split_is_the_best_of_all(costs, stages):
    split = split_layers("A" * len(costs.blocks), stages, None, costs)
    best = min(
        (max(sums), sum(x * x for x in sums), [r.stop for r in candidate])
        for candidate in every_split(len(costs.blocks), stages)
        for sums in [stage_costs(candidate, costs)]
    )
    sums = stage_costs(split, costs)
    assert (max(sums), sum(x * x for x in sums), [r.stop for r in split]) == best


def test_split_without_costs_is_even_and_later_stages_get_the_rest():
    assert split_layers("AGAGA", 2) == [range(0, 2), range(2, 5)]
    assert split_layers("AGAG", 4) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]


def test_a_written_layout_is_followed():
    stages = split_layers("AGGAGAG", 3, "AG|GAG|AG")
    assert stages == [range(0, 2), range(2, 5), range(5, 7)]
    assert format_layout("AGGAGAG", stages) == "AG|GAG|AG"
    assert split_layers("AG", 1, "AG") == [range(0, 2)]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("AG|AG|AG", ["AG|AG|AG", "3", "parallel.pipeline=2", "write AG|AG"]),
        ("AGAG|", ["a stage is empty"]),
        ("AG|GA", ["AGGA", "model.pattern=AGAG"]),
        ("AGA|AG", ["AGAAG", "model.pattern=AGAG"]),
        ("AG AG", ["1", "parallel.pipeline=2"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_one_line(written, words):
    with pytest.raises(LayoutError) as caught:
        split_layers("AGAG", 2, written)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(LayoutError, match="parallel.pipeline=4 or less"):
        split_layers("AGAG", 5)


@pytest.mark.parametrize("pattern", ["AGAG", "GA", "AGGAA"])
@pytest.mark.parametrize("loop_range", [None, (1, 2), (0, 2)])
@pytest.mark.parametrize("passes", [1, 2, 4])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("pass_input", ["hidden", "embeddings"])
def test_passes_cost_the_blocks_that_segments_run(pattern, loop_range, passes, eviction, pass_input):
    if pass_input == "embeddings" and loop_range:
        return  # refused
    model = tiny.model_config(pattern=pattern)
    sleep = SleepConfig(loop_range=loop_range, eviction=eviction, pass_input=pass_input)
    tokens, loss_mask = tiny.batch(windows=2, predicting=(1,))
    segments = plan_segments(tokens, loss_mask, model, sleep, passes)
    run = [[block for block, flops in enumerate(row) if flops] for row in consolidation_flops(model, sleep, passes)]
    assert run == [list(s.blocks) for s in segments if not s.predicts]


def test_costs_count_runs():
    model = tiny.model_config(pattern="AGAGA")
    once = sequence_costs(model, consolidated=0)
    slept = sequence_costs(model, 4, consolidated=3, predicted=2)
    runs = [a / b for a, b in zip(slept.blocks, once.blocks, strict=True)]
    assert runs[:3] == [14, 14, 14]
    assert 11 < runs[3] < 14  # the last pass over 3 windows ends with its write
    assert runs[4] == 11  # ... and never comes here
    assert slept.head == 2 * once.head and slept.embedding == 5 * once.embedding


def test_no_torch():
    code = "import sys; import powernap.parallel.planning.layout; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
