"""Health of the fast weights per block and pass: how large they grow, how much they retain and write."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from powernap.model.fast_weights import LayerStates
from powernap.model.segments import Segment
from powernap.model.stage import HybridStage


class FastWeightHealth:
    """Collects, over the consolidation windows of one batch, the norm of each block's fast weights after every pass and
    the means of alpha (what a token leaves of the old state) and beta (how strongly it writes)."""

    def __init__(self, stage: HybridStage):
        self._mixers = stage.fast_weight_mixers
        self._blocks_with_state = [stage.blocks[index] for index in stage.decoder.layers_with_state]
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)

    @contextmanager
    def watch(self, segment: Segment) -> Iterator[None]:
        """Record gates inside only: recomputation in the backward pass must not count them twice."""
        for mixer in self._mixers.values():
            mixer.gates = []
        try:
            yield
            for block, mixer in self._mixers.items():
                for gates in [] if segment.predicts else mixer.gates or []:
                    for name, mean in gates.items():
                        self._values[f"fast_weights/block_{block}/pass_{segment.pass_number}/{name}"].append(mean)
        finally:
            for mixer in self._mixers.values():
                mixer.gates = None

    def record(self, segment: Segment, layer_states: LayerStates) -> None:
        """Record the Frobenius norm of the heads' states after the segment, averaged over batch and heads."""
        if segment.predicts:
            return
        states = dict(zip(self._blocks_with_state, layer_states, strict=True))
        for block in self._mixers:
            norm = states[block].detach().norm(dim=(-2, -1)).mean()
            self._values[f"fast_weights/block_{block}/pass_{segment.pass_number}/norm"].append(norm)

    def summary(self) -> dict[str, float]:
        """Metric name -> mean over the windows seen. Blocks count from 0, passes from 1."""
        return {name: torch.stack(values).mean().item() for name, values in self._values.items()}
