"""Gradients of a stage: where they lie between steps, their norm, and how a step with a bad one is skipped."""

from collections.abc import Iterator
from typing import Any

import torch

from powernap.model.megatron import ColumnParallelLinear, RowParallelLinear
from powernap.model.stage import HybridStage

PIECE = 2**14  # numbers whose norm a CPU takes in float32


class Gradients:
    """All gradients of a stage, in a flat buffer for each parameter group that persists across steps.

    DeepSpeed's bf16 optimizer keeps its own like that. Nothing grows in the middle of a step, and nothing fragments.
    """

    def __init__(self, zero: Any):
        self.flat = [torch.zeros_like(weights) for weights in zero.bit16_groups_flat]  # laid out as DeepSpeed's weights
        self._parts = {
            parameter: flat.narrow(0, parameter.storage_offset(), parameter.numel())
            for flat, group in zip(self.flat, zero.bit16_groups, strict=True)
            for parameter in group
        }

    def attach(self) -> None:
        """Zero the buffers, and make every parameter's gradient a view of them."""
        for flat in self.flat:
            flat.zero_()
        for (
            parameter,
            part,
        ) in self._parts.items():  # new views: with offloading DeepSpeed gives those of a step other data
            parameter.grad = part.view_as(parameter)

    def attached(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The gradients, which still must be views of the buffers."""
        found = {parameter: parameter.grad for parameter in self._parts}
        assert all(g is not None and g.data_ptr() == self._parts[p].data_ptr() for p, g in found.items())
        return found  # type: ignore[return-value]  # by now none is None


def matrices_of_blocks(stage: HybridStage) -> set[torch.nn.Parameter]:
    """Of Powernap's own blocks: a segment's graph uses each once, so that autograd adds nothing up before it accumulates."""
    return {
        parameter
        for layer in stage.modules()
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer is not stage.output_layer
        for parameter in layer.parameters()
        if parameter.ndim == 2
    }


def sum_of_squares(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        # A CPU copies what it converts to float64, three times the cost. In float32 a norm of so few numbers is right to 1e-7; of
        # 62 million at once it was 0.7 % too small.
        norms = [norm for g in gradients for norm in _norms_of_pieces(g.view(-1))]
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64)[None] for g in gradients]
    return torch.cat(norms or [torch.zeros(1, device=device)]).double().square().sum().float()


def _norms_of_pieces(numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a matrix in one call, to the bits of a call for each; then the rest."""
    whole = len(numbers) // PIECE * PIECE
    yield torch.linalg.vector_norm(numbers[:whole].view(-1, PIECE), dim=1)
    if whole < len(numbers):
        yield torch.linalg.vector_norm(numbers[whole:])[None]


def poison_if_nonfinite(gradient: torch.Tensor, witness: torch.Tensor) -> None:
    """Make `gradient` NaN, in place, if the scalar `witness` is not finite; else add zero. No wait for the device."""
    gradient += (witness * 0).to(gradient.dtype)
