"""What MLflow's pages show of a run beside its parameters: source, commit, place, data, and its story in short."""

import getpass
import hashlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from powernap.model.parameters import count_parameters
from powernap.train.config import Recipe
from powernap.train.data.manifest import read_manifest
from powernap.train.data.sample import DataError
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.run.folder import first_manifest
from powernap.train.run.provenance import LOCAL_JOB, SUBMITTED_AS
from powernap.train.run.secrets import as_typed, mask_secrets, mask_values

EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # its page opens as that of model training
NOTE = "mlflow.note.content"  # the description, in Markdown
DIGEST = 36  # characters, MLflow's limit


class About(NamedTuple):
    """Written once when a process starts to train."""

    tags: dict[str, str]
    datasets: list[dict[str, str]]  # name, digest, source, context


def about(recipe: Recipe, folder: Path) -> About:
    """Tags with MLflow's own names where it has one, and the data sets by digest, as their manifests have them."""
    origin: dict[str, Any] = {}
    command = os.environ.get(SUBMITTED_AS) or as_typed(sys.argv[1:])
    with suppress(OSError, ValueError):
        origin = json.loads((folder / "origin.json").read_text())
    job = job_of_process()
    tags = {
        "mlflow.source.type": "JOB" if job else "LOCAL",
        "mlflow.source.name": " ".join(shlex.split(command)[:3]),  # MLflow shows what follows the last slash
        "command": command,
        "mlflow.source.git.commit": origin.get("commit", "unknown"),
        NOTE: description(recipe, folder),
        "uncommitted_changes": str(origin.get("uncommitted_changes", "unknown")).lower(),
        "host": socket.gethostname(),
        "folder": os.path.abspath(folder),
        "parameters": str(count_parameters(recipe.model, recipe.sleep)),
        "passes": str(recipe.sleep.passes),
    }
    with suppress(KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if job:
        tags["job"] = job
    if code := (first_manifest(recipe) or {}).get("task_sha256"):
        tags["task_sha256"] = code
    if recipe.run.sweep:
        tags["sweep"] = recipe.run.sweep
    return About(tags, datasets(recipe))


def job_of_process() -> str | None:
    """What started this process, and its name for the job or pod."""
    if number := os.environ.get(LOCAL_JOB):
        return f"local job {number}"
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM job {number}"
    return f"Kubernetes pod {socket.gethostname()}" if "KUBERNETES_SERVICE_HOST" in os.environ else None


def description(recipe: Recipe, folder: Path, result: Sequence[str] = ()) -> str:
    """The run in short paragraphs: what it is, where its checkpoints are, and its result or how to continue."""
    where = f"Checkpoints: `{os.path.abspath(folder / 'checkpoints')}`."
    ending = ["Result: " + "; ".join(result) + ".", where] if result else [f"{where} {continuation(folder)}"]
    return "\n\n".join([story(recipe), *ending])


def continuation(folder: Path) -> str:
    """The command that continues."""
    if SUBMITTED_AS in os.environ:
        return "To continue: the command in the tag `command` again."
    command = shlex.join(["powernap", "train", str(folder / "config.yaml"), "--resume"])
    return f"To continue: `{command}`" + ("." if folder.is_absolute() else f" in `{Path.cwd()}`.")


def passes_text(recipe: Recipe) -> str:
    """N, with its weights and steps: `1, from step 2,001 one of [1, 4]`."""
    parts: list[str] = []
    for start, phase in recipe.phases:
        passes, weights = phase.sleep.passes, phase.sleep.pass_weights
        text = (
            str(passes)
            if isinstance(passes, int)
            else f"one of {passes}" + (f" by weights {weights}" if weights else "")
        )
        if not parts or not parts[-1].endswith(text):
            parts.append(f"from step {start + 1:,} {text}" if parts else text)
    return ", ".join(parts)


def story(recipe: Recipe) -> str:
    """What is trained, on what, how long and how."""
    model, train, tokens = recipe.model, recipe.train, recipe.data.sequence_length - 1
    total, world_size = train.steps * train.global_batch_size * tokens, recipe.parallel.world_size
    task = ""
    if manifest := first_manifest(recipe):
        given = {name: value for name, value in mask_values(manifest.get("fields") or {}).items() if value is not None}
        fields = " ".join(f"{name}={value}" for name, value in given.items())
        task = f"Task {manifest['task']}{f' ({fields})' if fields else ''}. "
    layout = f" ({recipe.parallel.grid})" if world_size > 1 else ""
    return (
        f"{task}{count_parameters(recipe.model, recipe.sleep):,} parameters, pattern {model.pattern}, windows of {model.window} tokens, N={passes_text(recipe)}; "
        f"{train.steps:,} steps of {train.global_batch_size} sequences of {tokens:,} tokens: {total:,} tokens; "
        f"{world_size} process{'es' if world_size > 1 else ''}{layout}, {train.precision}."
    )


def datasets(recipe: Recipe) -> list[dict[str, str]]:
    """Of the training and of each test set."""
    train = recipe.data.train
    named = {name: part.shards for name, part in train.items()} if isinstance(train, dict) else {"": train}
    found = [("training", name, shards) for name, shards in named.items()]
    found += [("testing", name, shards) for name, shards in recipe.data.tests.items()] if recipe.data.test else []
    return [_dataset(context, name, shards) for context, name, shards in found]


def _dataset(context: str, name: str, shards: str | list[str]) -> dict[str, str]:
    folder, digest = None, "unknown"
    with suppress(DataError):
        names = expand_shards(shards)
        paths = [path for shard in names if (path := local_path(shard))]
        if len(paths) == len(names):  # no manifest is read over the network
            folder, digest = paths[0].absolute().parent.name, _digest(paths)
    return {
        "name": name or folder or context,
        "digest": digest[:DIGEST],
        "source": mask_secrets(shards if isinstance(shards, str) else " ".join(shards)),
        "context": context,
    }


def _digest(paths: list[Path]) -> str:
    """The hash of the shards' hashes in the manifests beside them."""
    known = {
        (folder, shard["file"]): shard["sha256"]
        for folder, path in {path.parent: path for path in paths}.items()
        for shard in read_manifest(path).get("shards", [])
    }
    hashes = [known.get((path.parent, path.name)) for path in paths]
    return hashlib.sha256("".join(map(str, hashes)).encode()).hexdigest() if all(hashes) else "unknown"
