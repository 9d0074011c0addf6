"""Shared by all benchmarks: paired timing, a description of the machine, results as one JSON file and one table."""

import json
import os
import secrets
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from powernap.parallel.topology import Topology, init_distributed
from powernap.train.evaluation.tables import markdown_table
from powernap.train.run import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

MEASURED = ("model", "parallel", "train", "benchmarks/*.py")  # what a result depends on

Times = dict[str, list[float]]


def interleave(forms: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Times:
    """CPU seconds of every form in every round.

    CPU time of this one-threaded process, not wall time: an idle machine would show the same, and other processes do
    not count.

    The forms take turns, so that a busy neighbour or a change of clock affects all of them: compare two forms by
    `paired_ratio`, not by separate times. Every other round runs in reverse, or a form would always follow the same one
    and find its caches.
    """
    times: Times = {name: [] for name in forms}
    for number in range(warmup + rounds):
        for name in reversed(forms) if number % 2 else forms:
            start = time.process_time()
            forms[name]()
            if number >= warmup:
                times[name].append(time.process_time() - start)
    return times


def paired_ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of one / other."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def milliseconds(seconds: list[float]) -> float:
    """Their median, in ms."""
    return 1e3 * statistics.median(seconds)


def join_alone() -> Topology:
    """This process as a world of one, on one CPU thread."""
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    if not dist.is_initialized():
        return init_distributed(store=dist.HashStore(), rank=0, world_size=1)
    return init_distributed()


def machine(clock: str = "CPU time") -> dict:
    """Hardware and versions that the numbers depend on; nothing that names the machine or its folders."""
    about = provenance.machine()
    return {**about, "clock": "wall" if about["gpu"] else clock}


def write(name: str, command: str, numbers: dict, report: list[str], clock: str = "CPU time") -> None:
    """results/NAME.json with `numbers` and results/NAME.md with `report`, both headed by machine, date and commit.

    Args:
        clock: the kind of time measured on a CPU.
    """
    header = {
        "benchmark": name,
        "command": command,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance.commit(MEASURED),
    }
    RESULTS.mkdir(exist_ok=True)
    about = machine(clock)
    document = {**header, "machine": about, **numbers}
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded(document), indent=1) + "\n")
    hardware = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread; {clock}"
    commit = header["commit"] + (" with uncommitted changes" if header["uncommitted_changes"] else "")
    heading = [f"{hardware}; torch {about['torch']};", f"{header['date']}, commit {commit}."]
    text = "\n".join([f"# {name}", "", f"`{command}`", "", *heading, "", *report]).rstrip() + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print("\n".join(report), flush=True)


def draw_seeds(home: Path, count: int) -> list[int]:
    """Fresh seeds, or those already drawn for this folder."""
    file = home / "seeds.json"
    if not file.exists():
        file.write_text(json.dumps([secrets.randbelow(10_000) for _ in range(count)]) + "\n")
    return json.loads(file.read_text())


def table(columns: list[str], rows: list[list], left: int = 0) -> list[str]:
    """A Markdown table, the first `left` columns flush left; floats with three significant digits."""
    return markdown_table(columns, [[_show(value) for value in row] for row in rows], left)


def verdicts(targets: list[tuple[str, float, str, float]]) -> tuple[list[dict], list[str]]:
    """Targets (what, measured, "<=" or ">=", bound) as numbers and as a table."""
    judged = []
    for what, value, sign, bound in targets:
        met = value <= bound if sign == "<=" else value >= bound
        judged.append({"what": what, "measured": value, "target": f"{sign} {bound:g}", "met": met})
    rows = [[t["what"], t["measured"], t["target"], "yes" if t["met"] else "NO"] for t in judged]
    return judged, ["Targets:", "", *table(["what", "measured", "target", "met"], rows), ""]


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def rounded(value: object) -> object:
    """Floats with six significant digits: the rest is noise and makes every diff unreadable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value
