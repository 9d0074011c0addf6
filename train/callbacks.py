"""Callbacks: code of one's own at a few places of a run; `powernap.fit` takes them."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from powernap.model.errors import PowernapError

if TYPE_CHECKING:
    from powernap.train.trainer import Trainer


class CallbackError(PowernapError):
    """A callback that breaks a rule, in one line."""


class Callback:
    """Methods that a run calls; each does nothing here.

    All ranks call them alike: what communicates, such as `trainer.zero.gathered_parameters`, must run on all of them, and a
    decision must not depend on the rank. Of the metrics `loss`, `grad_norm`, `lr`, `passes`, those of loss terms and of evaluations
    are the same on all ranks; the others are a rank's own. `trainer.stop()` is for any rank: all stop after the same step.

    The trainer has `recipe`, `topology`, `stage` (this rank's part of the model), `zero` (its optimizer) and `state.step`, the
    last step done.
    """

    @property
    def name(self) -> str:
        """Its state's name in checkpoints."""
        return type(self).__name__

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Before the first step, or the first one after a resume, with the weights and states that it starts from."""

    def on_step_end(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """After each step. Numbers that are added to `metrics` are recorded like the others: rank 0's."""

    def on_evaluate(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """After each evaluation: `held_out_loss/N2`, `accuracy/N2/depth_1` and so on, to read."""

    def on_save(self, trainer: "Trainer") -> None:
        """Before a checkpoint of the last step is written."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last step, or the step after which the run stops."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON: rank 0's. {}: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned on rank 0, before `on_train_begin` of a resumed run; all ranks do."""


class Callbacks:
    """Those of a run, called in their order."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self._callbacks = list(callbacks)
        names = [callback.name for callback in self._callbacks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise CallbackError(f"two callbacks are named {twice}: give one another `name`")

    @property
    def names(self) -> list[str]:
        return [callback.name for callback in self._callbacks]

    def call(self, method: Callable[..., None], *arguments: Any) -> None:
        """Call a method of `Callback` on all."""
        for callback in self._callbacks:
            getattr(callback, method.__name__)(*arguments)

    def step_end(self, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        """Call on_step_end on all; `metrics` gets what they add."""
        for callback in self._callbacks:
            seen = dict(metrics)
            callback.on_step_end(trainer, seen)
            metrics |= _added(callback, metrics, seen)

    def states(self) -> dict[str, dict[str, Any]]:
        """Name -> state, of those that have one."""
        states = {callback.name: callback.state_dict() for callback in self._callbacks}
        for name, state in states.items():
            try:
                json.dumps(state, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise CallbackError(f"state_dict of callback {name} is not JSON: {error}") from None
        return {name: state for name, state in states.items() if state}

    def restore(self, states: Mapping[str, dict[str, Any]]) -> None:
        for callback in self._callbacks:
            if callback.name in states:
                callback.load_state_dict(states[callback.name])


def _added(callback: Callback, metrics: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """Only rank 0 writes metrics: what it could not write must fail on all ranks."""
    for name, value in seen.items():
        if name in metrics and value is not metrics[name]:
            raise CallbackError(f"callback {callback.name} changes the metric {name}: add one of another name")
        if name not in metrics and not isinstance(value, int | float):
            raise CallbackError(
                f"callback {callback.name} adds {name}, a {type(value).__name__}: a metric is a number, such as "
                "float(tensor)"
            )
    return {name: value for name, value in seen.items() if name not in metrics}
