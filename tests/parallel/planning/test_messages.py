"""Single ranks of worlds of up to 512 against the plan: groups, parameters' shapes, all messages of a training step."""

import itertools

import pytest

from powernap.parallel.planning.memory import stage_parameters
from powernap.parallel.planning.messages import Groups, Message, groups_of, messages
from powernap.parallel.planning.suggest import bytes_sent
from powernap.parallel.planning.work import segments_of
from powernap.train.config import Recipe
from tests.helpers import fake_ranks
from tests.helpers.cases import asked_for, names
from tests.helpers.processes import in_processes

ATTENTION = {"heads": 8, "head_dim": 8}
MODEL = dict(
    window=8, vocab_size=64, hidden_size=32, mlp=dict(ffn_hidden_size=48), attention=ATTENTION,
    gdn=dict(heads=8, key_dim=4, value_dim=6, conv_kernel=3), sliding_attention=dict(heads=8, reach=4),
    kda=dict(heads=8, key_dim=4, value_dim=6), mamba2=dict(heads=8, head_dim=4, state_dim=4, groups=8),
    jet=dict(heads=8, key_dim=4, value_dim=6, generator_dim=8),
)  # fmt: skip


def recipe(
    micro_batches=None, precision="bf16", recompute="segment", model=None, sleep=None, tokens=25, **parallel
) -> Recipe:
    """Two blocks a stage, three windows; a rank runs as many micro-batches, of two sequences, as there are stages."""
    pipeline = parallel.get("pipeline", 1)
    sequences = 2 * (micro_batches or pipeline) * parallel.get("data", 1)
    values = {
        "run": {"name": "fake"},
        "model": {"pattern": "AG" * pipeline, **MODEL, **(model or {})},
        "sleep": sleep or {"passes": 2},
        "data": {"train": "nowhere", "sequence_length": tokens, "lanes": sequences},
        "train": {
            "steps": 10,
            "global_batch_size": sequences,
            "micro_batch_size": 2,
            "precision": precision,
            "recompute": recompute,
        },
        "optimizer": {"warmup_steps": 0},
        "parallel": parallel,
    }
    return Recipe.model_validate(values)


EIGHT = recipe(data=2, tensor=2, pipeline=2, sequence=True, model={"tie_embeddings": True})
CASES = {
    "8 ranks, sequence-parallel, tied": EIGHT,
    "512 ranks, fp32, kept": recipe(
        data=32, tensor=4, pipeline=4, precision="fp32", recompute="none", sleep={"passes": 1}
    ),
}
NORMED = {"attention": {**ATTENTION, "qk_norm": True}}
NORMED_WIDE = {"attention": {**ATTENTION, "qk_norm": True, "qk_norm_over": "width", "norms": "post"}}
WIDE = {  # layouts, then what changes a stage's messages
    "DP512": recipe(data=512),
    "DP64xTP8": recipe(data=64, tensor=8, sequence=True),
    "DP16xPP8": recipe(data=16, pipeline=8),
    "TP8xPP8": recipe(tensor=8, pipeline=8, sequence=True, precision="fp32", model={"tie_embeddings": True}),
    "DP4xTP4xPP4": recipe(data=4, tensor=4, pipeline=4, micro_batches=12),
    "DP8xTP8xPP8": recipe(data=8, tensor=8, pipeline=8, sequence=True),
    "DP2xTP2xPP8, one segment": recipe(data=2, tensor=2, pipeline=8, sleep={"every_window": True}),
    "fp32, kept": recipe(data=2, tensor=2, pipeline=2, precision="fp32", recompute="none"),
    "sequence-parallel, kept": recipe(tensor=2, sequence=True, recompute="none", micro_batches=2),
    "last write, truncated": recipe(
        tensor=2, pipeline=2, sleep={"passes": 3, "write": "last", "backprop_passes": 1}
    ),
    "embeddings again": recipe(tensor=2, pipeline=2, sequence=True, sleep={"passes": 3, "pass_input": "embeddings"}),
    "sliding": recipe(tensor=2, pipeline=2, sleep={"eviction": "sliding"}),
    "loop": recipe(tensor=2, pipeline=2, model={"pattern": "AGAGAG"}, sleep={"passes": 3, "loop_range": [2, 4]}),
    "pass input": recipe(
        tensor=2, pipeline=2, sequence=True, sleep={"passes": 3, "reinject_embeddings": True, "pass_norm": True}
    ),
    "carried": recipe(tensor=2, pipeline=2, sleep={"passes": 2, "every_window": True, "carry": True}),
    "head norms": recipe(tensor=2, pipeline=2, model=NORMED),
    "width norms": recipe(tensor=2, pipeline=2, sequence=True, model=NORMED_WIDE),
    "other mixers": recipe(tensor=2, pipeline=3, sequence=True, model={"pattern": "KMASJg"}),
    "other mixers, whole": recipe(tensor=4, data=2, model={"pattern": "SJKM"}),
}  # fmt: skip


def corners(recipe: Recipe) -> list[int]:
    """The first and the last of pipeline, data and tensor ranks, in all combinations."""
    parallel = recipe.parallel
    ends = ({0, size - 1} for size in (parallel.pipeline, parallel.data, parallel.tensor))
    return sorted(
        (stage * parallel.data + data) * parallel.tensor + tensor for stage, data, tensor in itertools.product(*ends)
    )


def run(cases: dict[str, Recipe]) -> dict[tuple[str, int], fake_ranks.Rank]:
    keys = [(name, rank) for name, recipe in cases.items() for rank in corners(recipe)]
    (found,) = in_processes(fake_ranks.run_ranks, 1, [(cases[name], rank, None) for name, rank in keys])
    return dict(zip(keys, found, strict=True))


@pytest.fixture(scope="module")
def ranks(request):
    return run(asked_for(request, CASES | WIDE))


def assert_as_planned(recipe: Recipe, rank: int, found: fake_ranks.Rank) -> None:
    groups, tensor = groups_of(recipe, rank), recipe.parallel.tensor
    assert found.groups == groups
    weights = stage_parameters(recipe, groups.pipeline.index(rank))
    assert found.shapes == {
        w.name: tuple(n // tensor if dimension == w.split else n for dimension, n in enumerate(w.shape))
        for w in weights
    }
    planned = messages(recipe, segments_of(recipe), rank)
    for kind in ("send", "receive"):  # the schedule posts receives before their steps
        assert [m for m in found.messages if m.kind == kind] == [m for m in planned if m.kind == kind]
    assert collectives(found.messages) == collectives(planned)


def collectives(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.kind not in ("send", "receive")]


@pytest.mark.parametrize("name", names([next(iter(CASES))], CASES | WIDE))
def test_ranks_do_what_is_planned(ranks, name):
    recipe = (CASES | WIDE)[name]
    for rank in corners(recipe):
        assert_as_planned(recipe, rank, ranks[name, rank])


def test_faults_are_seen():
    (found,) = in_processes(fake_ranks.run_ranks, 1, [(EIGHT, 3, fault) for fault in fake_ranks.FAULTS])
    for fault, rank in zip(fake_ranks.FAULTS, found, strict=True):
        with pytest.raises(AssertionError):
            assert_as_planned(EIGHT, 3, rank)
            pytest.fail(fault)
    groups, sizes, shapes, missing = found
    assert groups.groups != groups_of(EIGHT, 3)
    planned = messages(EIGHT, segments_of(EIGHT), 3)
    assert {m.numbers for m in sizes.messages if m.kind == "send"} == {
        2 * m.numbers for m in planned if m.kind == "send"
    }
    assert shapes.shapes["decoder.layers.1.self_attention.conv_weight"] == (8, 7, 3)
    assert len(missing.messages) < len(planned)


def test_groups_by_hand():
    """Two tensor ranks in two data ranks in two stages."""
    assert groups_of(EIGHT, 5) == Groups(
        tensor=(4, 5), data=(5, 7), pipeline=(1, 5), model=(0, 1, 4, 5), embedding=(1, 5)
    )


LARGE = {
    "DP8": dict(data=8),
    "DP64xTP8": dict(data=64, tensor=8, sequence=True),
    "DP4xPP8": dict(data=4, pipeline=8),
    "TP8xPP8": dict(tensor=8, pipeline=8, sequence=True, recompute="none"),
    "DP2xTP2xPP2, fp32": dict(data=2, tensor=2, pipeline=2, precision="fp32"),
}


@pytest.mark.parametrize("name", LARGE)
def test_suggestions_count_these_messages(name):
    """At 1B sizes, of the rank that sends most, within 10 %: embedding, head and norms are left out of `bytes_sent`."""
    sizes = dict(window=1024, vocab_size=32768, hidden_size=2048, mlp=dict(ffn_hidden_size=5504), pattern="AG" * 12)
    mixers = dict(attention=dict(heads=16), gdn=dict(heads=16, key_dim=128, value_dim=128))
    large = recipe(**LARGE[name], model={**sizes, **mixers}, tokens=4097)
    segments = segments_of(large)
    sent = []
    for rank in corners(large):
        tensor = groups_of(large, rank).tensor
        found = messages(large, segments, rank)
        sent.append([sum(m.sent for m in found if (m.ranks == tensor) == inside) for inside in (True, False)])
    for planned, most in zip(bytes_sent(large, segments), map(max, zip(*sent, strict=True)), strict=True):
        assert planned == pytest.approx(most, rel=0.1)
