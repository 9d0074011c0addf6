"""What a run says of itself in a few lines: held-out results as it trains, and a summary at its end."""

import os
import re
import shlex
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powernap.parallel.planning.peak import peak_flops
from powernap.parallel.topology import Topology
from powernap.train.config import Recipe

# held_out_loss/N2/web or accuracy/N2/web/depth_3; in the middle a test set's name and a length, or nothing.
HELD_OUT = re.compile(r"(held_out_loss|accuracy)/N(\d+)((?:/(?!depth_|window_)[^/]+)*)(?:/depth_(\w+))?")


def held_out(record: Mapping[str, Any]) -> list[str]:
    """A line for each N, test set and length that was evaluated: its loss, and its accuracy by depth."""
    losses: dict[str, float] = {}
    shares: dict[str, dict[str, float]] = {}
    for name, value in record.items():
        if match := HELD_OUT.fullmatch(name):
            kind, passes, which, depth = match.groups()
            of = f"N={passes}" + which.replace("/windows_", ", windows ").replace("/", ", ")
            if kind == "accuracy":
                shares.setdefault(of, {})[depth] = value
            else:
                losses[of] = value
    lines = []
    for of in dict.fromkeys([*losses, *shares]):
        parts = [f"loss {losses[of]:.4f}"] if of in losses else []
        if by_depth := shares.get(of):
            depths = list(by_depth)
            which = depths[0] if len(depths) == 1 else f"{depths[0]} to {depths[-1]}"
            parts.append(f"accuracy at depth {which}: {' '.join(f'{share:.2f}' for share in by_depth.values())}")
        lines.append(f"held out, {of}: {', '.join(parts)}")
    return lines


class Summary:
    """The last tenth of a run's steps, and its last evaluation."""

    def __init__(self, recipe: Recipe, folder: Path, topology: Topology) -> None:
        self._recipe, self._folder, self._topology = recipe, folder, topology
        self._last: deque[Mapping[str, Any]] = deque(maxlen=max(1, recipe.train.steps // 10))
        self._held_out: list[str] = []

    def add(self, record: Mapping[str, Any]) -> None:
        self._last.append(record)
        self._held_out = held_out(record) or self._held_out

    def lines(self, seconds: float) -> list[str]:
        """The summary of a run that took `seconds`."""
        lines = [f"done in {duration(seconds)}"]
        if self._last:
            loss, *others = self.result()
            lines += [f"loss     {loss.removeprefix('loss ')}", *(f"         {line}" for line in others)]
            lines.append(f"speed    {self._speed()}")
        lines.append(f"files    {os.path.relpath(self._folder)}: checkpoints, metrics.jsonl, logs")
        return [*lines, f"next     {self._next()}"]

    def result(self) -> list[str]:
        """The loss, and held-out results; nothing before the first step."""
        if not self._last:
            return []
        mean = statistics.fmean(record["loss"] for record in self._last)
        over = f", the mean of the last {len(self._last):,} steps" if len(self._last) > 1 else ""
        return [f"loss {mean:.4f}{over}", *self._held_out]

    def _speed(self) -> str:
        seconds = sum(record["seconds"] for record in self._last)
        speed = f"{sum(record['tokens'] for record in self._last) / seconds:,.0f} tokens/s"
        peak = self._peak()
        flops = sum(record.get("flops", 0) for record in self._last)
        if peak and flops:
            speed += f", {flops / seconds / peak:.0%} of the GPUs' peak (bf16, with what is recomputed)"
        return speed

    def _peak(self) -> float | None:
        """FLOP/s of all ranks by the data sheet, where it is known."""
        if self._topology.device.type != "cuda":
            return None
        from torch.cuda import get_device_name

        peak = peak_flops(get_device_name())
        return peak and peak * self._topology.world_size

    def _next(self) -> str:
        run = self._folder.name
        if self._folder.absolute() != Path("runs", run).absolute():
            run = os.path.relpath(self._folder)
        what = "eval" if self._recipe.data.test else "generate"
        return f"powernap {what} {shlex.quote(run)}"


def duration(seconds: float) -> str:
    """75 -> 1:15"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
