"""Parameters that stay float32 where the others are bfloat16."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from powernap.model.mixers.module import MixerModule
from powernap.model.stage import HybridStage
from powernap.parallel.zero.fragment import MASTER

if TYPE_CHECKING:
    from powernap.parallel.zero.optimizer import ZeroOptimizer


class Unrounded:
    """In bfloat16: the float32 values of the parameters that mixers list with `float32`, whole on every data rank.

    DeepSpeed casts every parameter of a module (0.19.8: engine.py _cast_module_mixed_precision; keep_in_fp32_modules spares
    buffers alone), and a parameter group of their own, which its flat buffers would allow, is empty on a stage without such
    a mixer. So the parameters stay bfloat16 beside the others, and mixers read the master weights.
    """

    def __init__(self, stage: HybridStage, zero: "ZeroOptimizer"):
        self._zero = zero
        self._of = [
            (mixer, name, parameter)
            for mixer in mixers_of(stage)
            for name, parameter in mixer.float32_parameters().items()
        ]
        exact = [mixer.unrounded[name].flatten() for mixer, name, _ in self._of]
        device = zero.topology.device
        self._flat = torch.cat(exact).to(device, torch.float32)
        self._parts = self._flat.split([len(values) for values in exact])
        for (mixer, name, _), values in zip(self._of, self._parts, strict=True):
            mixer.unrounded[name] = values.view(mixer.unrounded[name].shape)

    def to_masters(self) -> None:
        """Before the first step: DeepSpeed made its masters of rounded weights. A frozen parameter has none and stays rounded."""
        for values, master in self._parts_here():
            master.copy_(values)
        self.from_masters()

    def from_masters(self) -> None:
        """After the masters have changed. All data ranks call it."""
        self._flat.zero_()
        for values, master in self._parts_here():
            values.copy_(master)
        self._zero.topology.all_reduce_over_data(self._flat)

    def _parts_here(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What this rank has masters of: the values, and the masters."""
        for (_, _, parameter), values in zip(self._of, self._parts, strict=True):
            if fragment := self._zero.fragment(parameter):
                start, master = self._zero.values(parameter, fragment)[MASTER]
                yield values[fragment.start : fragment.stop], master[fragment.start - start : fragment.stop - start]


def mixers_of(module: torch.nn.Module) -> list[MixerModule]:
    return [part for part in module.modules() if isinstance(part, MixerModule)]


def keep_unrounded(module: torch.nn.Module) -> None:
    """Before its parameters are cast; a second call, when they are, changes nothing."""
    for mixer in mixers_of(module):
        if not mixer.unrounded:
            mixer.keep_unrounded()
