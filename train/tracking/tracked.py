"""What trackers get of a step: its record with fast weights as summaries, sums since the run began, one accuracy; and the
worst of the steps since the last one that they got.

metrics.jsonl keeps the whole record.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from powernap.train.config import Recipe
from powernap.train.run.folder import RunFolder, flops_of_step
from powernap.train.tracking.metrics import read_metrics
from powernap.train.tracking.summary import held_out

HEALTH = re.compile(r"fast_weights/block_\d+/pass_\d+/(\w+)")
RENAMED = {"seconds": "seconds_per_step"}
SUMMARY = {"norm": max, "alpha": min, "beta": max}  # the block and pass that is nearest to trouble


class Tracked:
    """Sums over all steps, those before a resume among them."""

    def __init__(self, recipe: Recipe, folder: RunFolder, resumed: bool) -> None:
        self._recipe, self._folder = recipe, folder
        self._work: dict[str, Any] = {}
        trained = {passes for _, phase in recipe.phases for passes in phase.sleep.pass_choices}
        self._left_out = {"tokens", "flops"} | (
            {"passes"} if len(trained) == 1 else set()
        )  # constant, or a total says more
        self.tokens = self.flops = self.skipped_steps = self.gradient_spikes = 0
        self._norms: list[float] = []  # of the steps since the last one that trackers got
        if resumed and folder.metrics.exists():
            for record in read_metrics(folder.metrics):
                self.add(record)
                if self.is_point(record):
                    self._norms.clear()

    def add(self, record: Mapping[str, Any]) -> None:
        """A step that is done."""
        self.tokens += record["tokens"]
        self.flops += record.get("flops") or self.flops_of(record)  # records of an older version lack them
        self.skipped_steps += record.get("skipped_step", False)
        self.gradient_spikes += record.get("gradient_spike", False)
        self._norms.append(record["grad_norm"])

    def is_point(self, record: Mapping[str, Any]) -> bool:
        """Whether trackers get this step, wherever the process starts and ends."""
        return record["step"] % self._recipe.train.log_every == 0 or bool(held_out(record))

    def of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record of the last step added, as trackers get it."""
        found: dict[str, Any] = {"loss": record["loss"]} | main_results(
            record, self._recipe
        )  # in this order in a table
        others = {name: value for name, value in record.items() if name not in self._left_out}
        found |= {RENAMED.get(name, name): value for name, value in others.items() if not HEALTH.fullmatch(name)}
        found |= self._health(record) | {"total_tokens": self.tokens}
        if self.flops:
            found["total_flops"] = self.flops
        # Skipped steps, whose norms are not finite, have a count of their own.
        found["grad_norm_max"] = max(filter(math.isfinite, self._norms), default=record["grad_norm"])
        self._norms.clear()
        found["skipped_steps"] = self.skipped_steps
        if self._recipe.train.spike_factor is not None:
            found["gradient_spikes"] = self.gradient_spikes
        return found

    def _health(self, record: Mapping[str, Any]) -> dict[str, float]:
        values = defaultdict(list)
        for name, value in record.items():
            if match := HEALTH.fullmatch(name):
                values[match[1]].append(value)
        summaries = {what: SUMMARY.get(what, max) for what in values}  # a mixer of another package may watch more
        return {f"fast_weights/{what}_{way.__name__}": way(values[what]) for what, way in summaries.items()}

    def flops_of(self, record: Mapping[str, Any]) -> int:
        """Training FLOPs of a step, on all ranks; 0 if the run has not recorded them: the first step does."""
        if not self._work:
            with suppress(OSError, ValueError):
                self._work = json.loads(self._folder.work.read_text())
        return flops_of_step(self._work, self._recipe, record) or 0


def main_results(record: Mapping[str, Any], recipe: Recipe) -> dict[str, float]:
    """Held-out results at the trained N, under one name for every N."""
    found = {}
    passes = max(recipe.sleep.pass_choices)
    depths = [value for name, value in record.items() if re.fullmatch(rf"accuracy/N{passes}/depth_\w+", name)]
    if depths:
        found["accuracy"] = sum(depths) / len(depths)
    if (loss := record.get(f"held_out_loss/N{passes}")) is not None:
        found["held_out_loss"] = loss
    return found
