"""What the plan says of a GPU's memory against the tensors of a micro-batch at 1B sizes, on torch's meta device.

Needs `make .venv/kernels`: FLA allocates what it would on a GPU.
"""

import pytest

from powernap.parallel.planning import memory
from powernap.parallel.planning.work import segments_of
from powernap.train.config import Recipe
from tests.helpers.cases import asked_for
from tests.helpers.compiled import KERNELS, run_with_kernels

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(not KERNELS.is_dir(), reason="make .venv/kernels puts Triton and FLA there"),
]


def recipe(
    pattern="AGAG", windows=4, window=1024, micro_batch=4, passes=1, vocabulary=32768, recompute="segment"
) -> Recipe:
    """Blocks, windows and micro-batches of benchmarks/device.py's 1B, tied and in bf16."""
    wide = {"heads": 14, "key_dim": 128, "value_dim": 128}
    return Recipe(
        run={"name": "meta"},
        model=dict(
            pattern=pattern, window=window, vocab_size=vocabulary, hidden_size=1792, mlp={"ffn_hidden_size": 4864},
            attention={"heads": 14}, gdn=wide, kda=wide, mamba2={"heads": 56, "head_dim": 64, "state_dim": 128},
            tie_embeddings=True,
        ),
        sleep={"passes": passes},
        data={"train": "-", "sequence_length": windows * window + 1},
        train={
            "steps": 10, "global_batch_size": micro_batch, "micro_batch_size": micro_batch, "precision": "bf16",
            "recompute": recompute,
        },
        optimizer={"warmup_steps": 0},
    )  # fmt: skip


MANY_SEGMENTS = "many segments"
CASES = {
    "four blocks": recipe(),
    MANY_SEGMENTS: recipe("AG", windows=12, window=256, micro_batch=1, passes=4),
    "1B": recipe("AG" * 12),
    "vocabulary of 152k": recipe(vocabulary=151936),
    "activations kept": recipe(recompute="none"),
    "four passes": recipe(passes=4),
    "Kimi": recipe("AK"),
    "Mamba-2": recipe("AMAM"),
}


@pytest.fixture(scope="module")
def peaks(request):
    return run_with_kernels(
        "tests.helpers.meta_memory", "|".join(asked_for(request, CASES, "four blocks", MANY_SEGMENTS))
    )


def planned(recipe: Recipe) -> int:
    """Bytes of a micro-batch, besides weights, gradients and optimizer."""
    _, most, _ = memory.replay(recipe, segments_of(recipe), 0, "cuda")
    return most


@pytest.mark.parametrize("name", CASES)
def test_plan_is_what_a_gpu_would_hold(peaks, name):
    assert planned(CASES[name]) == pytest.approx(peaks[name], rel=0.1)


def test_a_plan_without_saved_inputs_is_seen(peaks, monkeypatch):
    monkeypatch.setattr(memory, "handed_on", lambda *arguments: 0)
    assert planned(CASES[MANY_SEGMENTS]) < 0.9 * peaks[MANY_SEGMENTS]


def test_a_plan_without_the_tied_gradient_is_seen(peaks, monkeypatch):
    head_bytes = memory.head_bytes
    monkeypatch.setattr(memory, "head_bytes", lambda *arguments: head_bytes(*arguments)._replace(tied=0))
    assert planned(CASES["four blocks"]) < 0.95 * peaks["four blocks"]
