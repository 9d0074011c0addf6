"""`powernap train --detect-anomaly`: find the module that produces the first non-finite number.

The inputs and outputs of every module are checked, and their gradients in the backward pass, so the first to fail is
the innermost module in which it happened. Slow: each check waits for the device. Last digits may differ from a run
without it, because autograd accumulates gradients in another order.

torch's own anomaly mode does not help here: it detects NaN but not infinity, names autograd functions instead of
modules, and prints pages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from powernap.model.errors import PowernapError
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology


class AnomalyError(PowernapError):
    """A non-finite number, and the module that produced it, in one line."""


@contextmanager
def anomalies_detected(stage: HybridStage, topology: Topology, wanted: bool = True) -> Iterator[None]:
    """Inside, the stage raises AnomalyError at the first non-finite number.

    Works with activation checkpointing, because the gradient checks are part of the recomputed graph, and in a
    pipeline, where the stage that produces the number detects it before sending it.
    """
    watch = _Watch(stage, topology)
    hooks = watch.hook_all() if wanted else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    def __init__(self, stage: HybridStage, topology: Topology):
        self._stage, self._topology = stage, topology

    def hook_all(self) -> list[Any]:
        hooks = []
        for name, module in self._stage.named_modules():
            shown = self._stage.global_name(name) if name else "the stage"
            hooks.append(module.register_forward_pre_hook(self._input_hook(shown), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._output_hook(shown), with_kwargs=True))
        for name, parameter in self._stage.named_parameters():
            hooks.append(parameter.register_hook(self._gradient_of(self._stage.global_name(name))))
        return hooks

    def _input_hook(self, name: str):
        """Check a module's inputs, and in the backward pass their gradients, which the module itself computes."""

        def before(module, arguments, options):
            look = self._looker(
                lambda: f"{name}: input not finite, and no module made it",
                f"{name}: gradient of its input not finite, gradient of its output finite",
            )
            return _each(look, arguments), _each(look, options)

        return before

    def _output_hook(self, name: str):
        def after(module, arguments, options, output):
            look = self._looker(
                lambda: f"{name}: output not finite, input finite, {_weights(module)}",
                f"{name}: gradient of its output not finite, made by what comes after it",
            )
            return _each(look, output)

        return after

    def _gradient_of(self, name: str):
        def look(gradient: torch.Tensor) -> None:
            if not _finite(gradient):
                self._fail(f"{name}: gradient not finite")

        return look

    def _looker(self, forward: Callable[[], str], backward: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(tensor: torch.Tensor) -> torch.Tensor:
            if not _finite(tensor.detach()):
                self._fail(forward())
            if not (torch.is_grad_enabled() and tensor.requires_grad):
                return tensor
            return _Look.apply(tensor, lambda: self._fail(backward))

        return look

    def _fail(self, what: str) -> None:
        raise AnomalyError(f"{self._topology.describe()}: {self._topology.progress.describe(brief=True)}: {what}")


class _Look(torch.autograd.Function):
    """Identity that checks the gradient in the backward pass."""

    @staticmethod
    def forward(ctx, tensor, fail):
        ctx.fail = fail
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        if not _finite(gradient):
            ctx.fail()
        return gradient, None


def _weights(module: torch.nn.Module) -> str:
    broken = [name for name, parameter in module.named_parameters() if not _finite(parameter.detach())]
    return f"its {broken[0]} not finite" if broken else "weights finite"


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _each(look: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply `look` to every float tensor in `value`, also inside tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return look(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_each(look, item) for item in value)
    if type(value) is dict:
        return {key: _each(look, item) for key, item in value.items()}
    return value
