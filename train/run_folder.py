"""The folder a run owns: config.yaml, metrics.jsonl, checkpoints/, logs/ and what evaluation leaves there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from powernap.train.config import Recipe
from powernap.train.origin import origin
from powernap.train.recipe_file import RecipeError, check, save_recipe
from powernap.train.secrets import mask_values

# Fields that may differ when a run goes on: none changes the numbers of the steps to come, by more than rounding.
FREE_ON_RESUME = {
    "data.workers",
    "data.on_error",
    "data.skip_budget",
    "data.cache",
    "data.cache_limit_gb",
    "data.retries",
    "train.micro_batch_size",
    "run.root",
    "run.experiment",
    "train.log_every",
    "train.checkpoint_every",
    "evaluation.every",
    "evaluation.passes",
    "evaluation.samples",
    "parallel.timeout_seconds",
}


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def create(self, recipe: Recipe) -> None:
        """Make the folders, write the resolved recipe and where the run's numbers come from."""
        for folder in (self.path, self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, self.config)
        self.origin.write_text(json.dumps(origin(), indent=2) + "\n")

    def recipe(self) -> Recipe:
        """The recipe this run was started with, without its secrets."""
        if not self.config.is_file():
            raise RecipeError(f"{self.path}: no run there (config.yaml is missing)")
        return check(Recipe, yaml.safe_load(self.config.read_text()))

    def check_start(self, recipe: Recipe, resume: bool) -> None:
        """Raise RecipeError where starting would overwrite a run or resuming would go on with another."""
        exists = self.config.is_file()
        if not resume:
            if exists:
                raise RecipeError(f"{self.path} exists: go on with --resume, or choose another run.name")
            return
        if not exists:
            raise RecipeError(f"{self.path}: nothing to resume: start it without --resume")
        # A secret that has been renewed, as in a signed URL, is no change.
        before, now = (flatten(mask_values(one.model_dump(mode="json"))) for one in (self.recipe(), recipe))
        changed = [key for key in now if now[key] != before.get(key) and key not in FREE_ON_RESUME]
        if changed:
            key = changed[0]
            raise RecipeError(f"{key}={now[key]} cannot change on --resume: {self.path} has {key}={before.get(key)}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
