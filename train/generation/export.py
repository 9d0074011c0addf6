"""Export a trained model: weights, sizes and vocabulary, in a folder that needs no run and no shards.

model.safetensors    every parameter, unsharded, in its training precision; several files and an index above 5 GB
config.json          {"format", "name", "step", "precision", "model", "sleep", "vocabulary": {"task", "fields", ...} or null}
tokenizer.json       if the vocabulary is a Hugging Face tokenizer
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from powernap.model.config import ModelConfig, SleepConfig, with_sections
from powernap.model.errors import PowernapError
from powernap.model.parameters import count_parameters, float32_names
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.shards import Split, shard
from powernap.parallel.checkpoint.writer import FILE_MODE
from powernap.train.config import Recipe
from powernap.train.data.corpus import Corpus
from powernap.train.data.sample import DataError
from powernap.train.data.vocabulary import Numbers, Vocabulary, described_by, find_task, vocabulary_of
from powernap.train.outputs import check_folder
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks import task_name
from powernap.train.weights_folder import CONFIG, ONE_FILE, TOKENIZER, WeightsFolder, write_weights

FORMAT = "powernap-model-1"


class ExportError(PowernapError):
    """A model that cannot be exported or read, in one line."""


@dataclass(frozen=True)
class Exported:
    name: str
    step: int
    model: ModelConfig
    sleep: SleepConfig
    vocabulary: Vocabulary


def export(checkpoint: Checkpoint, recipe: Recipe, to: Path) -> Path:
    """Write a checkpoint's model into the new folder `to`, which appears complete or not at all.

    Raises:
        ExportError, OutputError: if `to` exists or cannot be created.
    """
    with new_folder(to) as unfinished:
        config = write_model(checkpoint, recipe, unfinished)
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return to


def write_model(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write weights and tokenizer into `folder`; returns what config.json says."""
    dtypes = dict.fromkeys(float32_names(recipe.model, recipe.sleep), torch.float32)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    tensors = ((n, checkpoint.whole(n).to(dtypes.get(n, dtype)).contiguous()) for n in checkpoint.parameters)
    write_weights(folder, tensors, FILE_MODE)
    return {
        "format": FORMAT,
        "name": recipe.run.name,
        "step": checkpoint.step,
        "precision": recipe.train.precision,
        "model": recipe.model.model_dump(mode="json"),
        "sleep": recipe.sleep.model_dump(mode="json"),
        "vocabulary": export_vocabulary(recipe, folder),
    }


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `to` if nothing fails.

    Raises:
        ExportError, OutputError: if `to` exists or cannot be created, or a file of weights cannot be written.
    """
    check_new_folder(to)
    unfinished = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(to)
    except SafetensorError as error:
        raise ExportError(f"{unfinished}: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new_folder(to: Path) -> None:
    """Check the target of `export`; call it before a checkpoint is read."""
    if to.exists():
        raise ExportError(f"{to} exists: choose a new folder")
    check_folder(to, "")


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_exported(folder: Path) -> Exported:
    """Read all that `export` wrote except the weights.

    Raises:
        ExportError: if the folder holds something else.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert config["format"] == FORMAT
        name, step, description = str(config["name"]), int(config["step"]), config["vocabulary"]
        model, sleep = check(ModelConfig, with_sections(config["model"])), check(SleepConfig, config["sleep"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        why = f" ({error})" if isinstance(error, RecipeError) else ""
        raise ExportError(f"{path}: not what powernap checkpoint export writes{why}") from None
    _check_size(folder, model, sleep)
    return Exported(name, step, model, sleep, _read_vocabulary(folder, description))


class ExportedWeights:
    """The weights in an export, read one at a time.

    Attributes:
        shapes: of every parameter, whole.

    Raises:
        ExportError: if the file cannot be read.
    """

    def __init__(self, folder: Path):
        self._weights = WeightsFolder(folder, ExportError)
        self.shapes = {name: list(shape) for name, shape in sorted(self._weights.shapes.items())}

    def shard(self, name: str, split: Split | None, rank: int, ranks: int) -> torch.Tensor:
        """The part of a parameter that tensor rank `rank` of `ranks` has; nothing else of it stays in memory."""
        return shard(self._weights.tensor(name), split, rank, ranks)


def load_exported_weights(folder: Path, stage: HybridStage) -> None:
    """Copy the weights into an unsharded model.

    Raises:
        ExportError: if they do not fit the model.
    """
    weights, targets = ExportedWeights(folder), dict(stage.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in targets.items()}
    if wrong := [n for n in shapes.keys() | weights.shapes.keys() if shapes.get(n) != weights.shapes.get(n)]:
        raise ExportError(f"{folder / ONE_FILE}: not the weights of the model in {CONFIG}: {min(wrong)} differs")
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights.shard(name, None, 0, 1))


def _check_size(folder: Path, model: ModelConfig, sleep: SleepConfig) -> None:
    """Check that a model of these sizes has as many weights as the file, before memory is allocated."""
    expected = count_parameters(model, sleep)
    stored = sum(map(prod, ExportedWeights(folder).shapes.values()))
    if stored != expected:
        raise ExportError(
            f"{folder / ONE_FILE}: not the weights of the model in {CONFIG}: {stored:,} numbers, not {expected:,}"
        )


def export_vocabulary(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """What the tokens stand for, for config.json; a Hugging Face tokenizer is copied into `folder`."""
    try:
        task = find_task(recipe.data)
    except DataError:
        return None
    if not isinstance(task, Corpus):
        return {"task": task_name(task), "fields": task.model_dump(mode="json")}
    fields = {"inputs": "-", "tokenizer": task.tokenizer}  # the paths of the training text stay private
    if (tokenizer := Path(task.tokenizer)).is_file():
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        fields["tokenizer"] = TOKENIZER
    assert task.ids is not None  # from the manifest of existing shards
    end, pad = task.ids
    return {"task": "text", "fields": fields, "end_token_id": end, "pad_token_id": pad}


def _read_vocabulary(folder: Path, description: object) -> Vocabulary:
    try:
        if not isinstance(description, dict):
            raise DataError(f"{folder / CONFIG}: does not say what the tokens stand for")
        fields = dict(description["fields"])
        if fields.get("tokenizer") == TOKENIZER:
            fields["tokenizer"] = str(folder / TOKENIZER)
        task = described_by({**description, "fields": fields})
        if task is None:
            raise DataError(f"{folder / CONFIG}: its vocabulary is of an unknown task")
        return vocabulary_of(task)
    except (KeyError, TypeError, ValueError) as error:
        return Numbers(str(error))
