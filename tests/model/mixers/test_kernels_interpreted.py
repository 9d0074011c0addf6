"""FLA's kernels as the mixers call them, interpreted on the CPU: outputs, states and all gradients against float64.

Needs `make kernels`: Triton and FLA in a folder of their own, since transformers would call them where no GPU is.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.mixers import MIXERS
from powernap.model.mixers.recurrent import Recurrence
from powernap.model.sleep import sleep_and_predict
from tests.helpers import tiny
from tests.helpers.cases import asked_for, names

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / ".venv" / "kernels"


@dataclass(frozen=True)
class Case:
    """g is minus `decay` times numbers between 0 and 1."""

    mixer: str
    length: int
    decay: float = 0.1
    heads: int = 2
    d_k: int = 16
    d_v: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = True

    def rule(self) -> Recurrence:
        from powernap.model.mixers import kimi_delta_attention, mamba2
        from powernap.model.mixers.delta_rule import gated_delta_rule

        if self.mixer == "K":
            return kimi_delta_attention.KimiDeltaAttention.rule.fget(None)
        return {"G": gated_delta_rule, "M": mamba2.ssd}[self.mixer]

    def inputs(self) -> dict[str, torch.Tensor]:
        """q, k, v rounded to the case's type: the reference gets the same."""
        generator = torch.Generator().manual_seed(self.length)
        shape = (self.batch, self.length, self.heads)

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator)

        q, k = (torch.nn.functional.normalize(normal(*shape, self.d_k), dim=-1) for _ in range(2))
        q, k, v = (t.to(self.dtype).double() for t in (q, k, normal(*shape, self.d_v)))
        g_shape = (*shape, self.d_k) if self.mixer == "K" else shape
        g = -self.decay * torch.rand(*g_shape, generator=generator)
        beta = torch.rand(*shape, generator=generator)
        state = normal(self.batch, self.heads, self.d_k, self.d_v) / 4
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}


CASES = {
    "G, two chunks and a rest": Case("G", 130, decay=1.0, d_v=32),
    "G, short": Case("G", 24),
    "G, two tokens": Case("G", 2),
    "G, odd sizes": Case("G", 66, d_k=5, d_v=3, heads=1),
    "G, strong decay": Case("G", 70, decay=50.0),
    "G, all forgotten": Case("G", 70, decay=1e4),
    "G, none forgotten": Case("G", 70, decay=0.0),
    "G, float32": Case("G", 64, decay=1.0, dtype=torch.float32),
    "G, batch": Case("G", 75, batch=2, d_k=32, transposed=False),
    "K": Case("K", 70, heads=1),
    "M": Case("M", 70),
}
STAGE, PASSES, PLANTED = "a stage that sleeps", "twelve passes", "decays too strong"
LAUNCHES = "launches"


@dataclass(frozen=True)
class MixerCase:
    """A whole mixer in kernels."""

    fields: dict = field(default_factory=dict)
    letter: str = "G"
    length: int = 70
    dtype: torch.dtype = torch.float32
    pads: bool = True

    def model(self) -> ModelConfig:
        section = MIXERS[self.letter].section
        sizes = {"heads": 2, "key_dim": 16, "value_dim": 24, "conv_kernel": 4} | self.fields
        return tiny.model_config(pattern=self.letter, window=self.length, **{section: sizes})


# Every option of the section in one of them.
OPEN_MODELS = {"key_heads": 1, "scale_queries": True, "l2_eps": 1e-6, "norm_eps": 1e-5}
MIXERS_IN_KERNELS = {
    "mixer G": MixerCase(),
    "mixer G, as in open models": MixerCase(OPEN_MODELS, length=20, pads=False),
    "mixer G, bfloat16": MixerCase(OPEN_MODELS | {"allow_neg_eigval": True}, length=20, dtype=torch.bfloat16),
    "mixer G, longer taps than window": MixerCase({"conv_kernel": 5, "key_dim": 5, "value_dim": 3}, length=3),
    "mixer K": MixerCase({"allow_neg_eigval": True, "scale_queries": True}, letter="K", length=20),
    "mixer K, bfloat16": MixerCase({"heads": 1}, letter="K", length=20, dtype=torch.bfloat16, pads=False),
}


@dataclass(frozen=True)
class RotationCase:
    """Of attention's projection; two sequences."""

    length: int = 70
    groups: int = 2
    queries: int = 1
    gates: int = 0
    width: int = 16
    rotated: int = 16
    of_each: bool = False
    normed: bool = False
    dtype: torch.dtype = torch.float32


ROTATIONS = {
    "heads": RotationCase(),
    "heads, grouped and gated, bfloat16": RotationCase(queries=3, gates=3, dtype=torch.bfloat16),
    "heads, normed": RotationCase(length=300, width=10, rotated=6, queries=2, gates=2, normed=True),
    "heads, normed, none rotated": RotationCase(rotated=0, normed=True),
    "heads, normed, bfloat16": RotationCase(normed=True, dtype=torch.bfloat16),
    "heads, partly rotated, odd sizes": RotationCase(length=3, width=10, rotated=6, groups=1),
    "heads, none rotated": RotationCase(length=5, rotated=0, queries=2),
    "heads, tables of each sequence": RotationCase(length=300, queries=2, of_each=True),
}


@dataclass(frozen=True)
class GatedCase:
    width: int
    dtype: torch.dtype = torch.float32


GATED = {"SwiGLU": GatedCase(1500), "SwiGLU, bfloat16": GatedCase(24, torch.bfloat16)}
FAULTS = {
    "the convolution sees pads": ("powernap.model.mixers.conv_kernel.unpack", "padding_mask", lambda mask: None),
    "beta is doubled": (
        "powernap.model.mixers.kernels.gated_delta_rule", "allow_neg_eigval", lambda allowed: not allowed,
    ),
    "a head's gates are another's": (
        "powernap.model.mixers.kernels.gated_delta_rule", "parts",
        lambda parts: parts._replace(beta=parts.beta.flip(2), alpha=parts.alpha.flip(2)),
    ),
    "the norm's gate is another's": (
        "powernap.model.mixers.gated_norm_kernel.gated_norm", "gate", lambda gate: gate.flip(2),
    ),
    "the state is not handed on": (
        "powernap.model.mixers.kernels.gated_delta_rule", "state", lambda state: 0 * state,
    ),
}  # fmt: skip
FAULTY = MixerCase(OPEN_MODELS, length=20)
BF16 = 0.02  # FLA rounds inside; its own tests ask for as much
BOUNDS = {torch.bfloat16: BF16, torch.float32: 1e-5}


def stage_errors(topology) -> dict[str, float]:
    """N=4 over three windows in float32: each gradient with the kernels, relative to those of torch's form."""
    tokens, loss_mask = tiny.batch(sequences=1, windows=3)
    tokens[0, :2] = 0  # pads
    found = []
    for kernels in (False, True):
        with mock.patch("powernap.model.mixers.fla.kernels_compute", lambda x, kernels=kernels: kernels):
            stage = tiny.build_stage(topology, tiny.model_config(pattern="AG"), dtype=torch.float32)
            segments = plan_segments(tokens, loss_mask, stage.model, SleepConfig(passes=4), 4)
            loss = sleep_and_predict(stage, segments, tokens, loss_mask, recompute="none").loss
            loss.backward()
            found.append({n: p.grad for n, p in stage.named_parameters()} | {"loss": loss.detach()})
    torch_form, kernels = found
    return {
        name: float((kernels[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        for name, value in torch_form.items()
        if value is not None
    }


# One of each kind, for `make test`.
FAST = ["G, odd sizes", "M"]
FAST_MIXERS = ["mixer G, bfloat16", "mixer K"]
FAST_AROUND = ["heads, grouped and gated, bfloat16", "heads, normed, none rotated", "SwiGLU, bfloat16"]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """case -> errors, all in one process: FLA's imports take ten CPU seconds."""
    if not KERNELS.is_dir():
        pytest.skip("make kernels puts Triton and FLA there")
    out = tmp_path_factory.mktemp("interpreted") / "errors.json"
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{KERNELS}:{ROOT}", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(out.parent),
    }  # fmt: skip
    cases = CASES | MIXERS_IN_KERNELS | ROTATIONS | GATED | FAULTS | dict.fromkeys([STAGE, PASSES, PLANTED, LAUNCHES])
    asked = "|".join(asked_for(request, cases))
    command = [sys.executable, "-m", "tests.helpers.interpreted", asked, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", names(FAST, CASES))
def test_outputs_states_and_gradients(found, name):
    case, errors = CASES[name], found[name]
    assert errors.keys() >= {"o", "S", "dq", "dk", "dv", "dg", "dbeta", "dstate"}
    if case.decay == 1e4:
        errors = {n: e for n, e in errors.items() if n != "dg"}  # truly zero
    assert max(errors.values()) < BOUNDS[case.dtype], errors
    if case.dtype == torch.bfloat16:  # the rounding is there: these are not the inputs' own forms
        assert max(errors.values()) > 1e-5


@pytest.mark.parametrize("name", names([], [PLANTED]))
def test_a_call_that_is_wrong_is_seen(found, name):
    assert max(found[name].values()) > 2 * BF16


@pytest.mark.parametrize("name", names(FAST_MIXERS, MIXERS_IN_KERNELS))
def test_a_whole_mixer(found, name):
    case, errors = MIXERS_IN_KERNELS[name], found[name]
    assert len(errors) == 13  # the output, two states, two gates, two inputs, six parameters
    if case.dtype == torch.float32:  # FLA's softplus has no log1p: steps of 1e-4 are off by 5e-4 of themselves
        assert errors.pop("dA_log") < 1e-4 and errors.pop("ddt_bias") < 1e-4
    assert max(errors.values()) < BOUNDS[case.dtype], errors


@pytest.mark.parametrize("name", names(FAST_AROUND, [*ROTATIONS, *GATED]))
def test_around_attention_and_in_the_mlp(found, name):
    case, errors = (ROTATIONS | GATED)[name], found[name]
    # Outputs and gradients.
    assert len(errors) == (2 if name in GATED else 4 + bool(case.gates) + 2 * case.normed)
    assert max(errors.values()) < (2**-8 if case.dtype == torch.bfloat16 else 1e-6), errors


@pytest.mark.parametrize("fault", names(["a head's gates are another's"], FAULTS))
def test_a_mixer_that_is_wrong_is_seen(found, fault):
    assert max(found[fault].values()) > 2 * BF16


@pytest.mark.parametrize("name", names([], [STAGE]))
def test_a_whole_stage(found, name):
    assert len(found[name]) > 15 and max(found[name].values()) < 1e-4, found[name]


@pytest.mark.parametrize("name", names([], [PASSES]))
def test_the_states_error_does_not_grow_with_the_passes(found, name):
    """FLA keeps the state in float32 and multiplies it in bfloat16: what that costs after N=4 passes over three windows."""
    errors = [found[name][f"bfloat16, {number}"] for number in range(1, 13)]
    assert 1e-4 < errors[0] < 5e-3 and max(errors) < 3 * errors[0], errors
    assert max(found[name][f"float32, {number}"] for number in range(1, 13)) < 1e-5


@pytest.mark.parametrize("name", names([], [LAUNCHES]))
def test_launches(found, name):
    """FLA's calls count what they launch. Two blocks of a segment: forward, recompute, backward."""
    plain, kernels = found[name]["plain"], found[name]["kernels"]
    assert plain["mixer, forward"] >= 42 and kernels["mixer, forward"] <= 12
    assert plain["mixer, backward"] > 75 and kernels["mixer, backward"] <= 27
    assert plain["pair of blocks"] > 240 and kernels["pair of blocks"] <= 115
    assert kernels["segment, FLA's rule as one"] < 1000
