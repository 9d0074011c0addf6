"""FLA's kernels as the mixers call them, interpreted on the CPU: outputs, states and all gradients against float64.

Needs `make kernels`: Triton and FLA in a folder of their own, since transformers would call them where no GPU is.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import SleepConfig
from powernap.model.mixers.recurrent import Recurrence
from powernap.model.sleep import sleep_and_predict
from tests.helpers import tiny

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
BF16 = 0.02  # FLA rounds inside; its own tests ask for as much
BOUNDS = {torch.bfloat16: BF16, torch.float32: 1e-5}


def stage_errors() -> dict[str, float]:
    """N=4 over three windows in float32: each gradient with the kernels, relative to those of torch's form."""
    from powernap.parallel.topology import init_distributed

    topology = init_distributed(store=torch.distributed.HashStore(), rank=0, world_size=1)
    tokens, loss_mask = tiny.batch(sequences=2, windows=3)
    tokens[0, :2] = 0  # pads
    found = []
    for form in ("chunked", "kernel"):

        def call(self, q, k, v, g, beta, state, need_output=True, form=form):
            if q.shape[1] == 1:
                return self.sequential(q, k, v, g, beta, state, need_output)
            return (
                self.kernel(q, k, v, g, beta, state)
                if form == "kernel"
                else self.chunked(q, k, v, g, beta, state, need_output)
            )

        with mock.patch.object(Recurrence, "__call__", call):
            stage = tiny.build_stage(topology, dtype=torch.float32)
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """case -> errors, all in one process: FLA's imports take ten CPU seconds."""
    if not KERNELS.is_dir():
        pytest.skip("make kernels puts Triton and FLA there")
    out = tmp_path_factory.mktemp("interpreted") / "errors.json"
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{KERNELS}:{ROOT}", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(out.parent),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.helpers.interpreted", "|".join([*CASES, STAGE, PASSES, PLANTED]), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_gradients(found, name):
    case, errors = CASES[name], found[name]
    assert errors.keys() >= {"o", "S", "dq", "dk", "dv", "dg", "dbeta", "dstate"}
    if case.decay == 1e4:
        errors = {n: e for n, e in errors.items() if n != "dg"}  # truly zero
    assert max(errors.values()) < BOUNDS[case.dtype], errors
    if case.dtype == torch.bfloat16:  # the rounding is there: these are not the inputs' own forms
        assert max(errors.values()) > 1e-5


def test_a_call_that_is_wrong_is_seen(found):
    assert max(found[PLANTED].values()) > 2 * BF16


def test_a_whole_stage(found):
    assert len(found[STAGE]) > 20 and max(found[STAGE].values()) < 1e-4, found[STAGE]


def test_the_states_error_does_not_grow_with_the_passes(found):
    """FLA keeps the state in float32 and multiplies it in bfloat16: what that costs after N=4 passes over three windows."""
    errors = [found[PASSES][f"bfloat16, {number}"] for number in range(1, 13)]
    assert 1e-4 < errors[0] < 5e-3 and max(errors) < 3 * errors[0], errors
    assert max(found[PASSES][f"float32, {number}"] for number in range(1, 13)) < 1e-5
