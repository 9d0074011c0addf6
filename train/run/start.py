"""What a new run starts from in place of drawn weights: another run, one of its checkpoints, an exported model, or a model in
Hugging Face's format.

A source is found and checked before any process starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from powernap.model.parameters import parameters
from powernap.parallel.checkpoint import manifest
from powernap.train.config import Recipe
from powernap.train.hugging_face.folder import HuggingFaceFolder, HuggingFaceShards, is_hugging_face
from powernap.train.recipe_file import RecipeError, flatten
from powernap.train.run.folder import RunFolder
from powernap.train.weights_folder import CONFIG

if TYPE_CHECKING:
    import torch

    from powernap.model.stage import HybridStage
    from powernap.parallel.checkpoint.shards import Split
    from powernap.parallel.topology import Topology
    from powernap.parallel.zero import ZeroOptimizer

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Source:
    """A checkpoint or an export, of which only the description has been read."""

    folder: Path
    kind: Literal["checkpoint", "export", "hugging face"]
    step: int  # 0: not known
    shapes: dict[str, list[int]]  # of whole parameters
    model: dict[str, Any]  # the model section of its recipe, or what is known of it, in dotted keys
    optimizer: str | None  # its name; None: it has no states

    @classmethod
    def find(cls, recipe: Recipe) -> "Source":
        """The source that `recipe` names; of a run the newest checkpoint.

        Raises:
            RecipeError, CheckpointError, ExportError: if there is none, or it cannot be read.
        """
        given = recipe.train.start_from
        assert given is not None
        folder = folder_of(given, recipe)
        if checkpoint := checkpoint_in(folder, f"train.start_from={given}"):
            return cls._of_checkpoint(*checkpoint)
        if is_hugging_face(folder):
            return cls._of_hugging_face(HuggingFaceFolder.read(folder), recipe)
        if (folder / CONFIG).is_file():
            from powernap.train.generation.export import ExportedWeights, read_exported  # late: it imports torch

            exported = read_exported(folder)
            model = flatten(exported.model.model_dump(mode="json"))
            return cls(folder, "export", exported.step, ExportedWeights(folder).shapes, model, None)
        raise RecipeError(
            f"train.start_from={given}: no run below run.root={recipe.run.root}, and no folder of a run (config.yaml), of a "
            f"checkpoint ({manifest.NAME}) or of a model ({CONFIG})"
        )

    @classmethod
    def _of_checkpoint(cls, folder: Path, content: dict[str, Any]) -> "Source":
        shapes = {name: entry["shape"] for name, entry in content["parameters"].items()}
        config = content["config"]
        return cls(folder, "checkpoint", content["step"], shapes, flatten(config["model"]), config["optimizer"]["name"])

    @classmethod
    def _of_hugging_face(cls, folder: HuggingFaceFolder, recipe: Recipe) -> "Source":
        """The model must be the recipe's: fields that change no shape change what the weights compute."""
        there, here = flatten(folder.section), flatten(recipe.model.model_dump(mode="json"))
        for key, value in there.items():
            if here.get(key) != value:
                raise RecipeError(
                    f"train.start_from={recipe.train.start_from}: model.{key} is {value} there, {here.get(key)} in this "
                    "recipe: powernap import writes one that fits"
                )
        folder.check(recipe.model)
        return cls(folder.path, "hugging face", 0, _shapes(recipe), there, None)

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the model of `recipe` cannot start from these weights, or not from these states."""
        own = _shapes(recipe)
        for name, shape in own.items():
            if name in self.shapes and self.shapes[name] != shape:
                raise RecipeError(f"{self._given(recipe)}: {name} is {self.shapes[name]} there, {shape} in this recipe")
        if further := [name for name in self.shapes if name not in own]:
            raise RecipeError(f"{self._given(recipe)}: has {_some(further)}, which the model of this recipe has not")
        if not recipe.train.start_optimizer:
            return
        if self.optimizer is None:
            raise RecipeError(f"train.start_optimizer=true: {self.folder} is a model without optimizer states")
        if self.optimizer != recipe.optimizer.name:
            raise RecipeError(
                f"train.start_optimizer=true: the states in {self.folder} are of {self.optimizer}, not of "
                f"{recipe.optimizer.name}"
            )
        if drawn := self.drawn(recipe):
            raise RecipeError(f"train.start_optimizer=true: {self.folder} has no {_some(drawn)}")

    def drawn(self, recipe: Recipe) -> list[str]:
        """Parameters of the recipe's model that the source lacks, which are drawn."""
        return [name for name in _shapes(recipe) if name not in self.shapes]

    def describe(self, recipe: Recipe) -> list[str]:
        """Lines for the log: where the weights are from, what is drawn, what else is not as there."""
        what = "weights and optimizer states" if recipe.train.start_optimizer else "weights"
        lines = [f"{what} of {self.folder}" + (f", step {self.step:,}" if self.step else "")]
        if drawn := self.drawn(recipe):
            lines.append(f"{len(drawn)} of {len(_shapes(recipe))} parameters are not there and drawn: {_some(drawn)}")
        own = flatten(recipe.model.model_dump(mode="json"))
        others = [
            f"model.{key}={own[key]}, there {self.model[key]}"
            for key in own
            if self.model.get(key, own[key]) != own[key]
        ]
        return lines + ([f"not as there: {'; '.join(others)}"] if others else [])

    def record(self) -> dict[str, Any]:
        """For origin.json."""
        return {"folder": str(self.folder), "step": self.step}

    def _given(self, recipe: Recipe) -> str:
        return f"train.start_from={recipe.train.start_from}"


def folder_of(given: str, recipe: Recipe) -> Path:
    """The folder that a field names: a path, or a run of the recipe's root."""
    return Path(given) if Path(given).exists() else Path(recipe.run.root) / given


def checkpoint_in(folder: Path, given: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `folder` is, or the newest of the run that it is, and its manifest; None: neither.

    Raises:
        RecipeError: if a run has none.
    """
    if (folder / manifest.NAME).is_file():
        return folder, manifest.read_manifest(folder)
    if not RunFolder(folder).config.is_file():
        return None
    checkpoints = manifest.checkpoints(RunFolder(folder).checkpoints)
    newest, content, passed_over = manifest.newest_valid(checkpoints, manifest.read_manifest)
    if newest is None:
        raise RecipeError(f"{given}: {passed_over[0] if passed_over else 'has no checkpoint yet'}")
    assert content is not None
    return newest, content


def find_together(recipe: Recipe, topology: "Topology") -> Source:
    """The source, found and checked by the main rank: a run that is still trained may have a newer one a moment later."""
    found: list[Source] = []

    def find() -> None:
        found.append(Source.find(recipe))
        found[0].check(recipe)

    topology.raise_together(find)
    source = topology.broadcast_object(found[0] if found else None)
    assert isinstance(source, Source)
    return source


class Start:
    """A source that is open: `weights` before ZeRO takes the stage's parameters, `optimizer` after."""

    def __init__(self, source: Source, recipe: Recipe, topology: "Topology"):
        from powernap.parallel.checkpoint.reader import Checkpoint, verify_together
        from powernap.train.generation.export import ExportedWeights

        self.source, self._topology = source, topology
        self._checkpoint: Checkpoint | None = None
        self._read: Callable[[str, Split | None, int, int], torch.Tensor]
        if source.kind == "checkpoint":
            self._checkpoint = Checkpoint(source.folder, verify_together(source.folder, topology))
            self._read = self._checkpoint.shard
        elif source.kind == "export":
            self._read = ExportedWeights(source.folder).shard
        else:
            self._read = HuggingFaceShards(HuggingFaceFolder.read(source.folder), recipe.model).shard

    def weights(self, name: str, module: "torch.nn.Module") -> None:
        """Copy this rank's shards of all parameters of a module that the source has; name: in the whole model."""
        import torch

        from powernap.parallel.checkpoint.shards import split_of

        with torch.no_grad():
            for inside, parameter in module.named_parameters(name):
                if inside in self.source.shapes:
                    shard = self._read(inside, split_of(parameter), self._topology.tp_rank, self._topology.tp_size)
                    parameter.copy_(shard)

    def optimizer(self, stage: "HybridStage", zero: "ZeroOptimizer") -> None:
        """Copy this rank's part of the optimizer's states."""
        assert self._checkpoint is not None
        self._checkpoint.load(stage, zero, self._topology)


def _shapes(recipe: Recipe) -> dict[str, list[int]]:
    weights = parameters(recipe.model, recipe.sleep, range(recipe.model.num_layers))
    return {weight.name: list(weight.shape) for weight in weights}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
