"""A trained model by itself: weights, sizes, and what its tokens stand for, in a folder that needs no run and no shards.

model.safetensors    every parameter, whole, in the precision it was trained in
config.json          {"format", "name", "step", "precision", "model", "sleep", "vocabulary": {"task", "fields", ...} or null}
tokenizer.json       if the vocabulary is one of Hugging Face's
"""

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from powernap.model.config import ModelConfig, SleepConfig, with_sections
from powernap.model.errors import PowernapError
from powernap.model.parameters import parameters
from powernap.model.stage import HybridStage
from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.parallel.checkpoint.writer import FILE_MODE
from powernap.train.config import Recipe
from powernap.train.data.sample import DataError
from powernap.train.data.text import Text
from powernap.train.data.vocabulary import Numbers, Vocabulary, described_by, find_task, vocabulary_of
from powernap.train.outputs import check_folder
from powernap.train.recipe_file import RecipeError, check
from powernap.train.tasks import task_name

FORMAT = "powernap-model-1"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class ExportError(PowernapError):
    """A model that cannot be exported or read, in one line."""


@dataclass(frozen=True)
class Exported:
    name: str
    model: ModelConfig
    sleep: SleepConfig
    vocabulary: Vocabulary


def export(checkpoint: Checkpoint, recipe: Recipe, to: Path) -> Path:
    """Write the model of a checkpoint into the new folder `to`; complete, or not there.

    Raises:
        ExportError, OutputError: if `to` exists or cannot be made.
    """
    check_new_folder(to)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    unfinished = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        weights = {name: checkpoint.whole(name).to(dtype).contiguous() for name in checkpoint.parameters}
        save_file(weights, unfinished / WEIGHTS, {"format": "pt"})
        (unfinished / WEIGHTS).chmod(FILE_MODE)
        config = {
            "format": FORMAT,
            "name": recipe.run.name,
            "step": checkpoint.step,
            "precision": recipe.train.precision,
            "model": recipe.model.model_dump(mode="json"),
            "sleep": recipe.sleep.model_dump(mode="json"),
            "vocabulary": _export_vocabulary(recipe, unfinished),
        }
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        unfinished.rename(to)
    except SafetensorError as error:
        raise ExportError(f"{unfinished / WEIGHTS}: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return to


def check_new_folder(to: Path) -> None:
    """What `export` asks of its target; worth asking before a checkpoint is read."""
    if to.exists():
        raise ExportError(f"{to} exists: choose a new folder")
    check_folder(to, "")


def is_exported(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_exported(folder: Path) -> Exported:
    """What `export` wrote, but the weights.

    Raises:
        ExportError: if it is something else.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert config["format"] == FORMAT
        name, told = str(config["name"]), config["vocabulary"]
        model, sleep = check(ModelConfig, with_sections(config["model"])), check(SleepConfig, config["sleep"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        why = f" ({error})" if isinstance(error, RecipeError) else ""
        raise ExportError(f"{path}: not what powernap checkpoint export writes{why}") from None
    _check_size(folder / WEIGHTS, model, sleep)
    return Exported(name, model, sleep, _read_vocabulary(folder, told))


def load_exported_weights(folder: Path, stage: HybridStage) -> None:
    """Copy the weights into a whole model.

    Raises:
        ExportError: if they are not those of such a model.
    """
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    own = dict(stage.named_parameters())
    wrong = [
        n for n in own.keys() | weights.keys() if n not in own or n not in weights or own[n].shape != weights[n].shape
    ]
    if wrong:
        raise ExportError(f"{path}: not the weights of the model in {CONFIG}: {min(wrong)} differs")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _check_size(weights: Path, model: ModelConfig, sleep: SleepConfig) -> None:
    """That a model of such sizes has as many weights as the file, before any memory is asked for."""
    expected = sum(weight.size() for weight in parameters(model, sleep, range(model.num_layers)))
    try:
        with safe_open(weights, framework="pt") as file:
            found = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{weights}: cannot be read ({' '.join(str(error).split())})") from None
    if found != expected:
        raise ExportError(f"{weights}: not the weights of the model in {CONFIG}: {found:,} numbers, not {expected:,}")


def _export_vocabulary(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    try:
        task = find_task(recipe.data)
    except DataError:
        return None
    if not isinstance(task, Text):
        return {"task": task_name(task), "fields": task.model_dump(mode="json")}
    fields = {"inputs": "-", "tokenizer": task.tokenizer}  # which text it was is nobody's business here
    if (tokenizer := Path(task.tokenizer)).is_file():
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        fields["tokenizer"] = TOKENIZER
    assert task.ids is not None  # of shards that are there
    end, pad = task.ids
    return {"task": "text", "fields": fields, "end_token_id": end, "pad_token_id": pad}


def _read_vocabulary(folder: Path, told: object) -> Vocabulary:
    try:
        if not isinstance(told, dict):
            raise DataError(f"{folder / CONFIG}: does not say what the tokens stand for")
        fields = dict(told["fields"])
        if fields.get("tokenizer") == TOKENIZER:
            fields["tokenizer"] = str(folder / TOKENIZER)
        task = described_by({**told, "fields": fields})
        if task is None:
            raise DataError(f"{folder / CONFIG}: its vocabulary is of an unknown task")
        return vocabulary_of(task)
    except (KeyError, TypeError, ValueError) as error:
        return Numbers(str(error))
