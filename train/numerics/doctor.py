"""Does this machine compute what it should? A tiny model's loss and gradients against float64 on the CPU, per mixer."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.mixers import MIXERS
from powernap.model.mixers.fla import KernelError, fla_is_precise_enough_for
from powernap.model.part import Mixer
from powernap.model.sleep import sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology

WINDOW, WIDTH = 64, 64
SIZE = 16  # of a head
# Largest relative error of a gradient. bf16: inputs and outputs are rounded to 8 bits, and FLA rounds inside.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Finding(NamedTuple):
    """A block of attention and one of a mixer, in one precision, over two windows with a sleep of two passes."""

    letter: str
    dtype: torch.dtype
    how: str  # the form of the recurrence that computed
    error: float | None  # the largest relative error of the loss and of any gradient; None: refused
    problem: str  # in one line; empty: none

    @property
    def is_right(self) -> bool:
        return self.error is not None and self.error < BOUNDS[self.dtype]


def examine(topology: Topology) -> Iterator[Finding]:
    """Every mixer with fast weights, in float32 and bfloat16 on this rank's device."""
    for letter, kind in MIXERS.items():
        if not kind.has_fast_weights:
            continue
        try:
            model = _model(letter, kind)
        except ValueError as error:  # of another package, with fields that we cannot guess
            yield Finding(letter, torch.float32, "-", None, f"not tried: {' '.join(str(error).split())[:60]}")
            continue
        loss, expected = _gradients(model, topology, torch.float64, torch.device("cpu"))
        for dtype in (torch.float32, torch.bfloat16):
            kernel = topology.device.type == "cuda" and fla_is_precise_enough_for(dtype)
            how = "Triton kernels" if kernel else "torch, in chunks"
            try:
                for mixer in dict.fromkeys(model.mixers):
                    mixer.check_kernels(dtype, topology.device)
                found_loss, found = _gradients(model, topology, dtype, topology.device)
            except KernelError as error:
                yield Finding(letter, dtype, how, None, str(error))
                continue
            errors = [abs(found_loss / loss - 1)]
            errors += [float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items() if g.any()]
            worst = max(errors) if all(error == error for error in errors) else float("nan")
            yield Finding(letter, dtype, how, worst, "")


def _model(letter: str, kind: type[Mixer]) -> ModelConfig:
    small = {"heads": 2, "groups": 2, "kv_heads": 2}
    fields = {name: small.get(name, SIZE) for name, field in kind.model_fields.items() if field.is_required()}
    section = {
        "pattern": f"A{letter}", "window": WINDOW, "vocab_size": 32, "hidden_size": WIDTH,
        "mlp": {"ffn_hidden_size": WIDTH}, "attention": {"heads": 2}, kind.section: fields,
    }  # fmt: skip
    return ModelConfig.model_validate(section)


def _gradients(
    model: ModelConfig, topology: Topology, dtype: torch.dtype, device: torch.device
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and all gradients, in float64 on the CPU, from weights and tokens that are the same on every machine."""
    torch.manual_seed(0)
    sleep = SleepConfig(passes=2)
    stage = HybridStage(model, sleep, topology.groups).to(device, dtype)
    tokens = torch.randint(1, 32, (2, 2 * WINDOW + 1), generator=torch.Generator().manual_seed(1))
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, WINDOW + 1 :] = True
    segments = plan_segments(tokens, loss_mask, model, sleep, 2)
    output = sleep_and_predict(stage, segments, tokens.to(device), loss_mask.to(device), recompute="none")
    output.loss.backward()
    gradients = {name: p.grad.cpu().double() for name, p in stage.named_parameters() if p.grad is not None}
    return float(output.loss.detach()), gradients
