"""Spikes: norms far above their recent values, and the parameters that grew most.

A norm is compared with its median over the last 50 values, which one spike does not move. The thresholds are measured:
in 21,000 steps of 19 runs (two tasks, N = 1 to 4) the gradient norm was over 3 times its median in 3 % of them, over 5
times in 0.9 %, over 10 times in 0.16 %, single steps worth a look. Fast weights are steadier: never over 1.5 times.
"""

import statistics
from collections import defaultdict, deque
from typing import Any

import torch

from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology

WINDOW = 50  # values
LEAST = 10  # values; with fewer nothing is a spike
FAST_WEIGHT_FACTOR = 3.0
PARAMETERS_NAMED = 3


class History:
    """The last values of named numbers."""

    def __init__(self):
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def median_if_spike(self, name: str, value: float, factor: float) -> float | None:
        """The median of the earlier values of `name`, if `value` is more than `factor` times that; `value` is added."""
        before = self._values[name]
        median = statistics.median(before) if len(before) >= LEAST else None
        before.append(value)
        return median if median is not None and value > factor * median else None


class Spikes:
    """Watches a run's gradient norm and its fast weights' norms. All ranks hold one and call it together.

    A normal step costs no communication and no wait for the device: the global norm, known to all ranks, shows a spike,
    and only then the norms of the parameters, which each rank keeps, are compared and gathered.
    """

    def __init__(self, factor: float | None, stage: HybridStage, topology: Topology):
        self._factor, self._topology = factor, topology
        self._names = list(stage.trained_parameters)
        self._history = History()
        self._norms: deque[torch.Tensor] = deque(maxlen=WINDOW)  # [parameters] each, on the device

    def check(self, step: int, metrics: dict[str, Any], norms: torch.Tensor) -> list[str]:
        """A line for each spike of a step that was not skipped.

        Args:
            metrics: of the step: grad_norm, at watched steps the fast weights' norms; gets "gradient_spike" if that is one.
            norms: [trained parameters of this stage], of this rank's gradients before averaging.
        """
        if self._factor is None:
            return []
        lines = []
        median = self._history.median_if_spike("gradient", metrics["grad_norm"], self._factor)
        if median is not None:
            metrics["gradient_spike"] = True
            lines.append(
                f"step {step}: gradient norm {metrics['grad_norm']:.4g}, {_times(metrics['grad_norm'], median)} the median "
                f"of the last {len(self._norms)} steps ({median:.4g}); grown most: {self._grown_most(norms)}"
            )
        self._norms.append(norms)
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
        """The parameters, over all ranks, whose norm exceeds its own median by the largest factor."""
        self._topology.progress.note("comparing where the gradient norm spikes")
        medians = torch.stack(tuple(self._norms)).median(dim=0).values
        growth = (norms / medians.clamp(min=torch.finfo(norms.dtype).tiny)).tolist()
        top = sorted(zip(growth, self._names, strict=True), reverse=True)[:PARAMETERS_NAMED]
        of_all_ranks = [(*one, rank) for rank, part in enumerate(self._topology.all_gather_object(top)) for one in part]
        several = self._topology.world_size > 1
        return ", ".join(
            f"{name} {times:.1f} times" + (f" on {self._topology.describe_rank(rank)}" if several else "")
            for times, name, rank in sorted(of_all_ranks, reverse=True)[:PARAMETERS_NAMED]
        )


def _times(value: float, median: float) -> str:
    return f"{value / median if median else float('inf'):.1f} times"
