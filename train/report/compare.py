"""Two runs side by side, to the digit: do they differ, where first, and by how much?"""

import math
from pathlib import Path

from powernap.train.run.folder import RunFolder, flatten
from powernap.train.tracking.metrics import read_metrics

# What a clock or a machine decides, not the run.
NOT_COMPARED = {"seconds", "tokens_per_second", "peak_memory_bytes"}


def compare(one: Path, other: Path) -> tuple[str, bool]:
    """Compare the metrics of two run folders.

    Returns:
        (a report for people, whether every metric of every step agrees to the last bit)
    """
    a, b = (_by_step(RunFolder(folder).metrics) for folder in (one, other))
    common = sorted(a.keys() & b.keys())
    lines = [f"{one}: {_steps(a)}", f"{other}: {_steps(b)}"]
    lines += [f"config: {line}" for line in _config_differences(one, other)]
    if not common:
        return "\n".join([*lines, "no step in common"]), False
    equal = a.keys() == b.keys()
    names = dict.fromkeys(name for step in common for run in (a, b) for name in run[step] if name not in NOT_COMPARED)
    width = max(len(name) for name in names)
    lines.append(f"{'metric':{width}}  {'first differs':>13}  {'largest difference':>18}  {'last step':>10}")
    for name in names:
        both = [step for step in common if name in a[step] and name in b[step]]
        for run, other_run, folder in ((a, b, one), (b, a, other)):
            if missing := [step for step in common if name in other_run[step] and name not in run[step]]:
                equal = False
                where = f" at {len(missing)} steps, first {missing[0]}" if both else ""
                lines.append(f"{name:{width}}  missing in {folder}{where}")
        if not both:
            continue
        differing = [step for step in both if not _same(a[step][name], b[step][name])]
        if not differing:
            lines.append(f"{name:{width}}  {'equal':>13}")
            continue
        equal = False
        gaps = {step: _gap(a[step][name], b[step][name]) for step in both}
        worst = max(gaps.values(), key=lambda gap: math.inf if math.isnan(gap) else gap)
        first = differing[0]
        lines.append(f"{name:{width}}  {f'step {first}':>13}  {worst:>18.3g}  {gaps[both[-1]]:>10.3g}")
        lines.append(f"  step {first}: {a[first][name]!r} and {b[first][name]!r}")
    lines.append("equal to the digit" if equal else "not equal")
    return "\n".join(lines), equal


def _by_step(path: Path) -> dict[int, dict]:
    return {record["step"]: record for record in read_metrics(path)}


def _steps(run: dict[int, dict]) -> str:
    return f"steps {min(run)} to {max(run)}" if run else "no steps"


def _config_differences(one: Path, other: Path) -> list[str]:
    configs = [RunFolder(folder).config for folder in (one, other)]
    if not all(config.is_file() for config in configs):
        return []
    a, b = (flatten(RunFolder(folder).recipe().model_dump(mode="json")) for folder in (one, other))
    return [f"{key} = {a.get(key)} and {b.get(key)}" for key in a | b if a.get(key) != b.get(key) and key != "run.name"]


def _same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _gap(a: object, b: object) -> float:
    """|a - b|; infinite where one of them is no number."""
    if _same(a, b):
        return 0.0
    return abs(a - b) if isinstance(a, int | float) and isinstance(b, int | float) else math.inf
