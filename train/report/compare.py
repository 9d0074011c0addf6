"""Compare two runs to the last digit: do they differ, where first, and by how much?"""

import math
from pathlib import Path

from powernap.train.recipe_file import flatten
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import read_metrics

# Metrics that depend on the clock, the machine or what is recomputed, not on the run.
NOT_COMPARED = {"seconds", "tokens_per_second", "peak_memory_bytes", "flops"}
# Fields that differ between equal runs: where they stand, not what they compute.
OF_A_RUN = {"run.name", "run.sweep"}


def compare(one: Path, other: Path) -> tuple[str, bool]:
    """Compare the metrics of two run folders.

    Returns:
        (a report to print, whether every metric of every step agrees to the last bit)
    """
    a, b = (_by_step(RunFolder(folder).metrics) for folder in (one, other))
    common = sorted(a.keys() & b.keys())
    lines = [f"{one}: {_steps(a)}", f"{other}: {_steps(b)}"]
    lines += [f"config: {line}" for line in _config_differences(one, other)]
    if not common:
        return "\n".join([*lines, "no step in common"]), False
    names = dict.fromkeys(name for step in common for run in (a, b) for name in run[step] if name not in NOT_COMPARED)
    width = max(len(name) for name in names)
    lines.append(f"{'metric':{width}}  {'first differs':>13}  {'largest difference':>18}  {'last step':>10}")
    differences = [
        _differences(name, one, [a[step] for step in common], other, [b[step] for step in common]) for name in names
    ]
    for name, lines_on_it in zip(names, differences, strict=True):
        lines += [f"{name:{width}}  {line}" for line in lines_on_it or [f"{'equal':>13}"]]
    equal = a.keys() == b.keys() and not any(differences)
    lines.append("equal to the digit" if equal else "not equal")
    return "\n".join(lines), equal


def _differences(name: str, one: Path, a: list[dict], other: Path, b: list[dict]) -> list[str]:
    """Lines on a metric in the common steps of two runs; none if it is equal in all of them."""
    lines = []
    both = [(x, y) for x, y in zip(a, b, strict=True) if name in x and name in y]
    for run, other_run, folder in ((a, b, one), (b, a, other)):
        missing = [y["step"] for x, y in zip(run, other_run, strict=True) if name in y and name not in x]
        if missing:
            lines.append(f"missing in {folder}" + (f" at {len(missing)} steps, first {missing[0]}" if both else ""))
    first = next(((x, y) for x, y in both if not _same(x[name], y[name])), None)
    if first:
        gaps = [_gap(x[name], y[name]) for x, y in both]
        worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
        x, y = first
        step = f"step {x['step']}"
        lines.append(f"{step:>13}  {worst:>18.3g}  {gaps[-1]:>10.3g}\n  {step}: {x[name]!r} and {y[name]!r}")
    return lines


def _by_step(path: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics(path)}


def _steps(run: dict[int, dict]) -> str:
    return f"steps {min(run)} to {max(run)}" if run else "no steps"


def _config_differences(one: Path, other: Path) -> list[str]:
    configs = [RunFolder(folder).config for folder in (one, other)]
    if not all(config.is_file() for config in configs):
        return []
    a, b = (flatten(RunFolder(folder).recipe().model_dump(mode="json")) for folder in (one, other))
    return [
        f"{key} = {a.get(key)} and {b.get(key)}" for key in a | b if a.get(key) != b.get(key) and key not in OF_A_RUN
    ]


def _same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _gap(a: object, b: object) -> float:
    """|a - b|; infinite if one of them is no number."""
    if _same(a, b):
        return 0.0
    return abs(a - b) if isinstance(a, int | float) and isinstance(b, int | float) else math.inf
