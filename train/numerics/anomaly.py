"""`powernap train --detect-anomaly`: which module makes the first number that is not finite.

Every module's inputs and outputs are looked at as they pass, and in the backward pass the gradients of both, so the first
to complain is the innermost module in which it happened. Slow: each look waits for the device. Last digits may differ from
those of a run without, since autograd adds up gradients in another order.

torch's own anomaly mode is of no help here: it knows NaN but not infinity, names autograd's functions and not modules, and
prints pages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from powernap.model.errors import PowernapError
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology


class AnomalyError(PowernapError):
    """A number that is not finite, and the module that made it, in one line."""


@contextmanager
def anomalies_detected(stage: HybridStage, topology: Topology, wanted: bool = True) -> Iterator[None]:
    """Inside, the stage raises AnomalyError at the first number that is not finite.

    Works through activation checkpoints, since the looks at gradients are part of the graph that is recomputed, and
    within a pipeline, where the stage that makes the number sees it before it is sent.
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
            hooks.append(module.register_forward_pre_hook(self._before(shown), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after(shown), with_kwargs=True))
        for name, parameter in self._stage.named_parameters():
            hooks.append(parameter.register_hook(self._gradient_of(self._stage.global_name(name))))
        return hooks

    def _before(self, name: str):
        """What goes in, and the gradient that comes out there: this module's own part of it."""

        def before(module, arguments, options):
            look = self._looker(
                lambda: f"{name}: input not finite, and no module made it",
                f"{name}: gradient of its input not finite, gradient of its output finite",
            )
            return _each(look, arguments), _each(look, options)

        return before

    def _after(self, name: str):
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
    """The tensor itself; backward, a look at its gradient."""

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
    """`value` with every tensor of floats in its tuples, lists and dicts as `look` returns it."""
    if isinstance(value, torch.Tensor):
        return look(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_each(look, item) for item in value)
    if type(value) is dict:
        return {key: _each(look, item) for key, item in value.items()}
    return value
