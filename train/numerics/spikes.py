"""Spikes: norms that leave what they were in the last steps, and the parameters that did so most.

A norm is held against its median over the last 50 values, which one spike does not move. How many times the median is
a spike: in 21,000 steps of 19 runs (two tasks, N = 1 to 4) the gradient norm was over 3 times its median in 3 % of them,
over 5 times in 0.9 %, over 10 times in 0.16 %, single steps that a person may want to see. Fast weights are calmer: never over
1.5 times.
"""

import statistics
from collections import defaultdict, deque
from typing import Any

import torch

from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology

WINDOW = 50  # values
LEAST = 10  # before that nothing is a spike
FAST_WEIGHT_FACTOR = 3.0
PARAMETERS_NAMED = 3


class History:
    """The last values of numbers that have names."""

    def __init__(self):
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def median_if_spike(self, name: str, value: float, factor: float) -> float | None:
        """The median of what `name` was before, if `value` is more than `factor` times that; `value` is added."""
        before = self._values[name]
        median = statistics.median(before) if len(before) >= LEAST else None
        before.append(value)
        return median if median is not None and value > factor * median else None


class Spikes:
    """Watches a run's gradient norm and its fast weights' norms. All ranks hold one and call it together.

    A normal step costs no communication and no waiting for the device: the global norm, known to all ranks, says whether
    it spikes, and only then the parameters' own norms, which each rank keeps for itself, are looked at and gathered.
    """

    def __init__(self, factor: float | None, stage: HybridStage, topology: Topology):
        self._factor, self._topology = factor, topology
        self._names = [stage.global_name(name) for name, _ in stage.named_parameters()]
        self._history = History()
        self._own: deque[torch.Tensor] = deque(maxlen=WINDOW)  # [parameters] each, on the device

    def check(self, step: int, metrics: dict[str, Any], norms: torch.Tensor) -> list[str]:
        """A line for each spike of a step that was not skipped.

        Args:
            metrics: of the step: grad_norm, at watched steps the fast weights' norms.
            norms: [parameters of this stage], of this rank's gradients before averaging.
        """
        if self._factor is None:
            return []
        lines = []
        median = self._history.median_if_spike("gradient", metrics["grad_norm"], self._factor)
        if median is not None:
            lines.append(
                f"step {step}: gradient norm {metrics['grad_norm']:.4g}, {_times(metrics['grad_norm'], median)} the median "
                f"of the last {len(self._own)} steps ({median:.4g}); grown most: {self._grown_most(norms)}"
            )
        self._own.append(norms)
        for name, value in metrics.items():
            if not (name.startswith("fast_weights/") and name.endswith("/norm")):
                continue
            median = self._history.median_if_spike(name, value, min(self._factor, FAST_WEIGHT_FACTOR))
            if median is not None:
                _, block, number, _ = name.split("/")
                lines.append(
                    f"step {step}: fast weights of {block.replace('_', ' ')} after {number.replace('_', ' ')} have norm "
                    f"{value:.4g}, {_times(value, median)} their recent median ({median:.4g})"
                )
        return lines

    def _grown_most(self, norms: torch.Tensor) -> str:
        """The parameters whose norm is the most times its own median, over all ranks."""
        self._topology.progress.note("comparing where the gradient norm spikes")
        medians = torch.stack(tuple(self._own)).median(dim=0).values
        growth = (norms / medians.clamp(min=torch.finfo(norms.dtype).tiny)).tolist()
        own = sorted(zip(growth, self._names, strict=True), reverse=True)[:PARAMETERS_NAMED]
        found = [(*one, rank) for rank, part in enumerate(self._topology.all_gather_object(own)) for one in part]
        several = self._topology.world_size > 1
        return ", ".join(
            f"{name} {times:.1f} times" + (f" on {self._topology.describe_rank(rank)}" if several else "")
            for times, name, rank in sorted(found, reverse=True)[:PARAMETERS_NAMED]
        )


def _times(value: float, median: float) -> str:
    return f"{value / median if median else float('inf'):.1f} times"
