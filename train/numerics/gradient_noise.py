"""The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1): the batch beyond which more sequences hardly help.

With b sequences on each of n data ranks, |g|^2 the mean square norm of the ranks' gradients and |G|^2 that of their mean:

    signal = (n |G|^2 - |g|^2) / (n - 1)            of the squared norm of the true gradient
    variance = b (|g|^2 - |G|^2) n / (n - 1)        of the trace of the covariance of one sequence's gradient

both without bias but noisy: the scale, variance / signal, is that of their means over the last steps.
"""

import math
from collections import deque

WINDOW = 50  # steps


class GradientNoise:
    """Of a run's last steps.

    Args:
        sequences: on each data rank.
        ranks: data ranks, at least two.
    """

    def __init__(self, sequences: int, ranks: int):
        self._sequences, self._ranks = sequences, ranks
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, square: float, norm: float) -> dict[str, float]:
        """The metrics after another step, the scale in sequences.

        Args:
            square: mean square norm of the ranks' gradients.
            norm: of their mean, before clipping.
        """
        if not (math.isfinite(square) and math.isfinite(norm)):
            return {}
        ranks, mean = self._ranks, norm**2
        signal = (ranks * mean - square) / (ranks - 1)
        variance = self._sequences * (square - mean) * ranks / (ranks - 1)
        self._steps.append((signal, variance))
        signals, variances = (sum(values) for values in zip(*self._steps, strict=True))
        metrics = {"gradient_noise/signal": signal, "gradient_noise/variance": variance}
        return metrics | ({"gradient_noise/scale": variances / signals} if signals > 0 else {})
