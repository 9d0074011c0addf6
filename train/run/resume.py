"""What may change when a run continues.

The steps that are done must be those of the recipe: a change is refused if it would have made them others, and asks for a
new run. The run's history.jsonl records every change (RunFolder.record).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Self

from powernap.model.config import with_sections
from powernap.parallel.checkpoint import manifest
from powernap.train.by_step import FIELDS as BY_STEP
from powernap.train.config import Recipe
from powernap.train.data.shard import fingerprint
from powernap.train.data.shard_list import expand_shards
from powernap.train.data.test_sets import is_test
from powernap.train.lr_schedule import lr_factor
from powernap.train.recipe_file import RecipeError, check, flatten
from powernap.train.run.secrets import mask_values

ON_RESUME = "on --resume"
# Fields and sections that change the numbers of steps by no more than rounding.
FREE = {
    "data.workers",
    "data.on_error",
    "data.skip_budget",
    "data.cache",
    "data.cache_limit_gb",
    "data.retries",
    "data.timeout_seconds",
    "train.micro_batch_size",
    "run.root",
    "run.experiment",
    "run.sweep",
    "run.trackers",
    "train.log_every",
    "train.recompute",
    "train.offload_inputs",
    "checkpoint",
    "parallel",
    "zero",
    "train.skip_budget",
    "train.spike_factor",
    "train.gradient_noise",
    "train.deterministic",
    "model.embedding_std",  # of drawn weights: later steps read them from the checkpoint
    "evaluation.every",
    "evaluation.passes",
    "evaluation.samples",
}
# by_step.FIELDS may change as long as every step that is done has the value it had; these, the learning rate it had.
SCHEDULE = {
    "train.steps",
    "optimizer.schedule",
    "optimizer.hold",
    "optimizer.decay",
    "optimizer.final_lr",
    "optimizer.warmup_steps",
}


@dataclass(frozen=True)
class Past:
    """A run up to one of its checkpoints, of which only the manifest has been read.

    Attributes:
        place: the run's folder, or the checkpoint's.
        step: the last one done, 0 before the first checkpoint.
        fingerprints: of the shards, by dataset.
    """

    place: Path
    recipe: Recipe
    step: int
    fingerprints: dict[str, str]

    @classmethod
    def of_run(cls, run: Path, recipe: Recipe) -> Self:
        """`run` up to its newest checkpoint; `recipe` is that of its config.yaml."""
        _, content, _ = manifest.newest_valid(manifest.checkpoints(run / "checkpoints"), manifest.read_manifest)
        return cls(run, recipe, content["step"] if content else 0, _fingerprints(content))

    @classmethod
    def of_checkpoint(cls, folder: Path, content: dict[str, Any]) -> Self:
        """Up to this checkpoint, with the recipe in its manifest."""
        values = content["config"]
        recipe = check(Recipe, values | {"model": with_sections(values["model"])})
        return cls(folder, recipe, content["step"], _fingerprints(content))

    def changes(self, now: Recipe, other: Collection[str] = ()) -> dict[str, list[Any]]:
        """Field -> [before, now] of all that differs, as in `flatten`, secrets masked; `other`: fields that do not count."""
        # A renewed secret, as in a signed URL, is no change.
        before, after = (flatten(mask_values(one.model_dump(mode="json"))) for one in (self.recipe, now))
        keys = [key for key in dict.fromkeys([*after, *before]) if key not in other]
        return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}

    def check(self, now: Recipe, how: str, other: Collection[str] = ()) -> None:
        """Raise RecipeError if the steps done would have been others with the recipe `now`.

        Args:
            how: what asks for it, for messages.
        """
        changes = self.changes(now, other)
        data = [key for key in changes if key == "data.train" or key.startswith("data.train.")]
        by_step = {key: field for field in BY_STEP for key in changes if key == field or key.startswith(f"{field}.")}
        allowed = {*FREE, *SCHEDULE, *data, *by_step}
        for key in changes:
            if key not in allowed and not is_test(key) and key.split(".")[0] not in FREE:
                raise self._refusal(key, changes, how)
        for key, field in by_step.items():
            self._check_by_step(now, field, key, changes, how)
        if data:
            self._check_shards(now, data[0], changes, how)
        if scheduled := [key for key in changes if key in SCHEDULE]:
            self._check_schedule(now, scheduled[0], changes, how)

    def _check_shards(self, now: Recipe, key: str, changes: dict[str, list[Any]], how: str) -> None:
        """They may have moved."""
        weights, weights_now = ({n: w for n, (_, w) in one.data.datasets.items()} for one in (self.recipe, now))
        if weights != weights_now or not self.step:
            raise self._refusal(key, changes, how)
        for name, (shards, _) in now.data.datasets.items():
            field = f"data.train.{name}" if name else "data.train"
            if fingerprint(expand_shards(shards, field)) != self.fingerprints.get(name):
                raise self._refusal(key, changes, how, "its steps have read other shards")

    def _check_by_step(self, now: Recipe, field: str, key: str, changes: dict[str, list[Any]], how: str) -> None:
        """Every step that is done must have had the value."""
        section, name = field.split(".")
        for start in sorted({start for one in (self.recipe, now) for start, _ in one.phases}):
            had, has = (getattr(getattr(one.at(start + 1), section), name) for one in (self.recipe, now))
            if start < max(1, self.step) and had != has:
                why = f"step {start + 1}, which is done, had {field}={had}" if start else ""
                raise self._refusal(key, changes, how, why)

    def _check_schedule(self, now: Recipe, key: str, changes: dict[str, list[Any]], how: str) -> None:
        if now.train.steps < self.step:
            raise RecipeError(f"train.steps={now.train.steps} {how}: {self.place} has done {self.step} steps")
        for step in range(1, self.step + 1):
            had, has = (lr_factor(step, one.train.steps, one.optimizer) for one in (self.recipe, now))
            if had != has:
                why = f"step {step}, which is done, had {had:.4g} of the learning rate's peak, would have {has:.4g}"
                raise self._refusal(key, changes, how, why)

    def _refusal(self, key: str, changes: dict[str, list[Any]], how: str, why: str = "") -> RecipeError:
        before, now = changes[key]
        why = why or f"{self.place} has {key}={before}"
        message = f"{key}={now} cannot change {how}: {why}; "
        if how == ON_RESUME:  # more often a command without the fields of the first one than a change that was meant
            message += (
                f"to continue with all its fields: powernap train {quote(str(self.place / 'config.yaml'))} --resume; "
            )
        return RecipeError(f"{message}for a new run: train.start_from={self.place}")


def _fingerprints(content: dict[str, Any] | None) -> dict[str, str]:
    data = content["state"]["data"] if content else None
    return data["fingerprints"] if data else {}
