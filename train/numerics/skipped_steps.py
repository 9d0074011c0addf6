"""Steps whose loss or gradient was not finite: they change nothing, and leave a record of its origin.

parallel/zero/optimizer.py skips them. Here their diagnosis is recorded: which ranks' gradients of which parameters, and which
samples the batch held, in runs/NAME/skipped_steps.jsonl, a line per step.
"""

import json
import math
from typing import Any

import torch

from powernap.model.errors import PowernapError
from powernap.model.fast_weights import LayerStates, reset_rows
from powernap.model.stage import HybridStage
from powernap.parallel.topology import Topology
from powernap.train.config import Recipe
from powernap.train.data.cache import cache_of
from powernap.train.data.loader import Batch, sample_names
from powernap.train.data.sequences import Cutting
from powernap.train.run.folder import RunFolder
from powernap.train.tracking.metrics import cut_after, to_json

PARAMETERS_NAMED = 3  # of a rank, in the model's order
RANKS_NAMED = 8


class DivergedError(PowernapError):
    """A run has skipped more steps than it may, in one line."""


class SkippedSteps:
    """The skipped steps of a run. All ranks hold one and call it together; the main rank writes.

    Args:
        steps: those skipped before the checkpoint that a run resumes from.
        resume_step: the step of that checkpoint, None for a new run: records of later steps are removed.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, topology: Topology, steps: list[int], resume_step: int | None
    ):
        self.steps = list(steps)
        self._recipe, self._file, self._topology = recipe, folder.skipped_steps, topology
        self._first_origin = ""  # of the steps that this process saw
        if topology.is_main and resume_step is not None and self._file.exists():
            cut_after(self._file, resume_step)

    def add(
        self,
        step: int,
        metrics: dict[str, Any],
        batch: Batch,
        stage: HybridStage,
        norms: torch.Tensor,
        layer_states: LayerStates | None,
    ) -> tuple[str, LayerStates | None]:
        """Record `step`, which was skipped.

        Args:
            metrics: of the step, with loss and grad_norm.
            norms: [trained parameters of `stage`], of this rank's gradients.
            layer_states: under sleep.carry, the states after the step's sequences.

        Returns:
            a line for the log; the layer states, with zeros for lanes that were not finite
        """
        self._topology.progress.note("recording a skipped step")
        names = _names_not_finite(stage, norms)
        summary = [len(names), names[:PARAMETERS_NAMED]] if names else None
        ranks = [(rank, *other) for rank, other in enumerate(self._topology.all_gather_object(summary)) if other]
        # Each rank that reads looks up its own samples: the shards are in its cache.
        data = self._recipe.data
        samples = sample_names(batch.sample_ids, cache_of(data), Cutting.of(data, self._recipe.model))
        parts = self._topology.all_gather_over_data(samples)
        layer_states, reset_lanes = reset_nonfinite_lanes(layer_states, self._topology)
        record = {
            "step": step,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "not_finite": [
                {"rank": self._topology.describe_rank(rank), "parameters": count, "first": first}
                for rank, count, first in ranks[:RANKS_NAMED]
            ],
            "ranks_not_finite": len(ranks),
            # Rank k % world_size reads sample k of the run.
            "samples": [name for row in zip(*parts, strict=True) for name in row],
        }
        if layer_states is not None:
            record["lanes_begun_anew"] = reset_lanes
        self.steps.append(step)
        self._first_origin = self._first_origin or _origin(record)
        if self._topology.is_main:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(record), allow_nan=False) + "\n")
        return _describe(record), layer_states

    def check_budget(self) -> None:
        """Raise DivergedError, on all ranks, if more steps were skipped than train.skip_budget allows."""
        count, budget = len(self.steps), self._recipe.train.skip_budget
        if count <= budget:
            return
        row = _last_in_a_row(self.steps)
        if row > max(1, count // 2):
            advice = (
                f"the last {row} follow each other, so it is the weights: start a new run with a lower optimizer.lr or "
                "optimizer.clip"
            )
        else:
            advice = "look at the samples, or raise train.skip_budget"
        raise DivergedError(
            f"loss or gradient not finite in {count} step{'s' if count > 1 else ''}, {_listed(self.steps)} "
            f"(train.skip_budget={budget}); {self._first_origin}; {advice}; --resume --detect-anomaly names the module, "
            f"{self._file} the samples"
        )


def reset_nonfinite_lanes(layer_states: LayerStates | None, topology: Topology) -> tuple[LayerStates | None, list[int]]:
    """Under sleep.carry: zero the fast weights of sequences that have non-finite ones on any rank of the model.

    The others keep theirs. All ranks call it together.

    Returns:
        the layer states, and the lanes of all data ranks that were reset
    """
    if layer_states is None:
        return None, []
    # A stage without recurrent mixers has no layer states and no rows: the slices below are empty.
    rows = len(layer_states[0]) if layer_states else 0
    broken = torch.zeros(rows, dtype=torch.bool)
    for state in layer_states:
        broken |= ~state.isfinite().flatten(1).all(1).cpu()
    broken_rows = broken.nonzero().flatten().tolist()
    gathered = topology.all_gather_object((topology.dp_rank, broken_rows))
    everywhere = {(rank, row) for rank, rows in gathered for row in rows}
    for row in (row for rank, row in everywhere if rank == topology.dp_rank):
        broken[row : row + 1] = True
    layer_states = reset_rows(layer_states, broken.to(layer_states[0].device)) if layer_states else layer_states
    return layer_states, sorted(row * topology.dp_size + rank for rank, row in everywhere)


def _describe(record: dict[str, Any]) -> str:
    loss, norm = record["loss"], record["grad_norm"]
    lanes = ", ".join(map(str, record.get("lanes_begun_anew", [])))
    return (
        f"step {record['step']} skipped: loss {loss:.4g}, gradient norm {norm:.4g}; {_origin(record)}"
        + f"; the fast weights of lanes {lanes} begin anew" * bool(lanes)
        + "; its samples: skipped_steps.jsonl"
    )


def _names_not_finite(stage: HybridStage, norms: torch.Tensor) -> list[str]:
    return [
        name for name, finite in zip(stage.trained_parameters, norms.isfinite().tolist(), strict=True) if not finite
    ]


def _origin(record: dict[str, Any]) -> str:
    if not record["not_finite"]:
        return "the loss alone" if not math.isfinite(record["loss"]) else "only in the sum of the ranks' gradients"
    first = record["not_finite"][0]
    names, more = ", ".join(first["first"]), first["parameters"] - len(first["first"])
    others = record["ranks_not_finite"] - 1
    return (
        f"first in {first['rank']}: {names}"
        + f" and {more} more" * (more > 0)
        + f", and in {others} other rank{'s' * (others > 1)}" * (others > 0)
    )


def _last_in_a_row(steps: list[int]) -> int:
    """How many of the last steps are consecutive."""
    row = 1
    while row < len(steps) and steps[-row] - 1 == steps[-row - 1]:
        row += 1
    return row


def _listed(steps: list[int]) -> str:
    """`3, 5-7, 9`; the oldest are left out if there are many."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in ranges[-10:]]
    return ("... " if len(ranges) > 10 else "") + ", ".join(shown)
