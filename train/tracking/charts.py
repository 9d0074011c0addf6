"""Names of metrics in MLflow, whose pages order charts by them.

Charts with a slash in their names come first, in sections by the alphabet, then all others by the alphabet. So that loss
and accuracy come first, none of ours has a slash, and what has many charts, results by N and depth, begins with a late letter.
"""

import re
from collections.abc import Callable

_NAMES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (  # accuracy/N2/web/depth_3 -> with_N2_accuracy_web_depth_3
        re.compile(r"(accuracy|held_out_loss)/(N\d+)(.*)"),
        lambda match: f"with_{match[2]}_{match[1]}{match[3].replace('/', '_')}",
    ),
    (  # fast_weights/norm_max -> max_norm_of_fast_weights
        re.compile(r"fast_weights/(\w+)_(max|min)"),
        lambda match: f"{match[2]}_{match[1]}_of_fast_weights",
    ),
    (re.compile(r"gradient_noise/scale"), lambda _: "gradient_noise_scale"),
]


def chart_name(name: str) -> str:
    """As MLflow gets it; a metric of a user's own keeps its name."""
    for pattern, new in _NAMES:
        if match := pattern.fullmatch(name):
            return new(match)
    return name
