"""Gradients of a stage: where they lie between steps, their norm, and how a step with a bad one is skipped."""

from typing import Any

import torch

from powernap.model.megatron import ColumnParallelLinear, RowParallelLinear
from powernap.model.stage import HybridStage


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
        norms = [torch.linalg.vector_norm(piece) for g in gradients for piece in g.view(-1).split(2**14)]
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return torch.stack(norms or [torch.zeros((), device=device)]).double().square().sum().float()


def poison_if_nonfinite(gradient: torch.Tensor, witness: torch.Tensor) -> None:
    """Make `gradient` NaN, in place, if the scalar `witness` is not finite; else add zero. No wait for the device."""
    gradient += (witness * 0).to(gradient.dtype)
