"""FLA's kernels as the mixers call them, compiled for Hopper and Blackwell without either: do they fit the card?

Needs `make .venv/kernels`, as test_kernels_interpreted.py, which shows what they compute.
"""

import pytest
import torch

from powernap.model.mixers.fla import LARGEST_KEY_DIM
from tests.helpers.compiled import KERNELS, OWN, SINGLE, Compiled, compile_cases
from tests.model.mixers.test_kernels_interpreted import Case

# A micro-batch of benchmarks/device.py's 1B; Mamba-2 as wide; OLMo-Hybrid's heads. Every configuration of each kernel.
LARGE = {
    "G, bf16": Case("G", 1024, heads=14, d_k=128, d_v=128, batch=4),
    "G, fp32": Case("G", 1024, heads=14, d_k=128, d_v=128, batch=4, dtype=torch.float32),
    "G, bf16, 96 x 192": Case("G", 1024, heads=30, d_k=96, d_v=192),
    "K, bf16": Case("K", 1024, heads=14, d_k=128, d_v=128, batch=4),
    "M, bf16": Case("M", 1024, heads=56, d_k=128, d_v=64, batch=4),
}
ON_BLACKWELL = ("G, bf16", "M, bf16")
TOO_MANY_KEYS = "G, 264 keys"
CASES = {**LARGE, TOO_MANY_KEYS: Case("G", 64, heads=1, d_k=264, d_v=16)}
NUMBER = {"G": 9, "K": 10, "M": 6}  # of kernels, forward and back
# Bytes that a thread spills at least; 0 where a kernel is not named, in the best of its configurations.
SPILLED = {
    ("sm_90a", "K, bf16"): {"chunk_kda_bwd_kernel_wy_dqkg_fused": 2048},
    ("sm_90a", "G, fp32"): {"recompute_w_u_fwd_kernel": 512, "prepare_wy_repr_bwd_kernel": 512},
    ("sm_100a", "G, bf16"): {"prepare_wy_repr_bwd_kernel": 2048},  # which has one configuration there
}
# Kernels of which some configuration is too large for the card: FLA's autotuner leaves it out.
PARTLY_TOO_LARGE = {
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
}

pytestmark = [
    pytest.mark.wide,
    pytest.mark.skipif(not KERNELS.is_dir(), reason="make .venv/kernels puts Triton and FLA there"),
]


def by_kernel(found: list[Compiled]) -> dict[str, list[Compiled]]:
    return {name: [one for one in found if one.kernel == name] for name in dict.fromkeys(one.kernel for one in found)}


@pytest.mark.parametrize("card", ["sm_90a", "sm_100a"])
def test_our_own_kernels_fit_the_card(card):
    found = compile_cases(card, [*OWN])
    for name, (_, number) in OWN.items():
        assert len(found[name]) == number, found[name]
        assert all(one.error is None and one.spilled == 0 for one in found[name]), found[name]


def test_what_a_card_would_not_run_is_seen():
    fits, too_large, refused, other = (one for (one,) in compile_cases("sm_90a", [*SINGLE]).values())
    assert fits.error is None and fits.shared == 192 * 1024 and 0 < fits.registers <= 255
    assert too_large.error == "589,824 bytes of shared memory, 232,448 are there"
    assert refused.error.startswith("CompilationError")
    assert other.error == "machine code for sm_80, not sm_90a"


@pytest.mark.parametrize(
    ("card", "name"), [*(("sm_90a", name) for name in LARGE), *(("sm_100a", name) for name in ON_BLACKWELL)]
)
def test_kernels_fit_the_card(card, name):
    kernels = by_kernel(compile_cases(card, [name])[name])
    assert len(kernels) == NUMBER[LARGE[name].mixer]
    for kernel, configurations in kernels.items():
        fitting = [one for one in configurations if one.error is None]
        assert fitting, configurations
        assert min(one.spilled for one in fitting) <= SPILLED.get((card, name), {}).get(kernel, 0), fitting
        wrong = [one for one in configurations if one.error is not None]
        assert not wrong or kernel in PARTLY_TOO_LARGE, wrong
        assert all("of shared memory" in one.error for one in wrong), wrong


def test_more_keys_than_kernels_take_are_refused():
    """As `check_fla` says before a run starts."""
    found = compile_cases("sm_90a", [TOO_MANY_KEYS])[TOO_MANY_KEYS]
    assert f"head dimension larger than {LARGEST_KEY_DIM}" in found[-1].error
