"""What a new run starts from in place of drawn weights: another run, one of its checkpoints, an exported model, or a model in
Hugging Face's format.

A source is found and checked before any process starts.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from powernap.model.config import ModelConfig, SleepConfig
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
    from powernap.parallel.zero.optimizer import ZeroOptimizer

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Source:
    """A checkpoint or an export, of which only the description has been read."""

    folder: Path
    kind: Literal["checkpoint", "export", "hugging face"]
    step: int  # 0: not known
    shapes: dict[str, list[int]]  # of whole parameters, under the names there
    model: dict[str, Any]  # the model section of its recipe, or what is known of it, in dotted keys
    optimizer: str | None  # its name; None: it has no states
    frozen: frozenset[str] = frozenset()  # parameters without states

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
        frozen = frozenset(name for name, entry in content["parameters"].items() if entry["group"] is None)
        model, optimizer = flatten(config["model"]), config["optimizer"]["name"]
        return cls(folder, "checkpoint", content["step"], shapes, model, optimizer, frozen)

    @classmethod
    def _of_hugging_face(cls, folder: HuggingFaceFolder, recipe: Recipe) -> "Source":
        """The model must be the recipe's: fields that change no shape change what the weights compute."""
        model = recipe.model.without_blocks(recipe.train.insert or ())
        there, here = flatten(folder.section), flatten(model.model_dump(mode="json"))
        for key, value in there.items():
            if here.get(key) != value:
                raise RecipeError(
                    f"train.start_from={recipe.train.start_from}: model.{key} is {value} there, {here.get(key)} in this "
                    "recipe: powernap import writes one that fits"
                )
        folder.check(model)
        return cls(folder.path, "hugging face", 0, _shapes(model, recipe.sleep), there, None)

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if the model of `recipe` cannot start from these weights, or not from these states."""
        own, inserted = _shapes(recipe.model, recipe.sleep), recipe.train.insert or []
        rest = recipe.model.without_blocks(inserted).pattern
        if inserted and rest != self.model.get("pattern", rest):
            raise RecipeError(
                f"train.insert={inserted}: model.pattern={recipe.model.pattern} without them is {rest}, "
                f"{recipe.train.start_from} has {self.model['pattern']}"
            )
        for name, shape in own.items():
            there = self.shapes.get(name_there(name, inserted) or "", shape)
            if there != shape:
                raise RecipeError(f"{self._given(recipe)}: {name} is {there} there, {shape} in this recipe")
        needed = {name_there(name, inserted) for name in own}
        if further := [name for name in self.shapes if name not in needed]:
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
        if frozen := [name for name in own if name_there(name, inserted) in self.frozen and recipe.train.trains(name)]:
            raise RecipeError(
                f"train.start_optimizer=true: {self.folder} has no states of {_some(frozen)}, frozen there: freeze them here, "
                "too, or write train.start_optimizer=false"
            )

    def drawn(self, recipe: Recipe) -> list[str]:
        """Parameters of the recipe's model that the source lacks, which are drawn."""
        inserted = recipe.train.insert or ()
        return [name for name in _shapes(recipe.model, recipe.sleep) if name_there(name, inserted) not in self.shapes]

    def describe(self, recipe: Recipe) -> list[str]:
        """Lines for the log: where the weights are from, what is drawn, what else is not as there."""
        what = "weights and optimizer states" if recipe.train.start_optimizer else "weights"
        lines = [f"{what} of {self.folder}" + (f", step {self.step:,}" if self.step else "")]
        if drawn := self.drawn(recipe):
            count = len(_shapes(recipe.model, recipe.sleep))
            lines.append(f"{len(drawn)} of {count} parameters are not there and drawn: {_some(drawn)}")
        if recipe.train.insert:
            lines.append(
                f"inserted blocks {recipe.train.insert} of {recipe.model.pattern}: output projections start at zero"
            )
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


def name_there(name: str, inserted: Collection[int]) -> str | None:
    """What the source calls a parameter of this recipe's model; None: it belongs to an inserted block."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    block, _, rest = name.removeprefix(prefix).partition(".")
    if int(block) in inserted:
        return None
    return f"{prefix}{int(block) - sum(other < int(block) for other in inserted)}.{rest}"


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
        self._inserted = recipe.train.insert or []
        weights = parameters(recipe.model, recipe.sleep, range(recipe.model.num_layers))
        self._output_projections = {weight.name for weight in weights if weight.split == 1}
        self._checkpoint: Checkpoint | None = None
        self._read: Callable[[str, Split | None, int, int], torch.Tensor]
        if source.kind == "checkpoint":
            self._checkpoint = Checkpoint(source.folder, verify_together(source.folder, topology))
            self._read = self._checkpoint.shard
        elif source.kind == "export":
            self._read = ExportedWeights(source.folder).shard
        else:
            self._read = HuggingFaceShards(
                HuggingFaceFolder.read(source.folder), recipe.model.without_blocks(self._inserted)
            ).shard

    def weights(self, name: str, module: "torch.nn.Module") -> None:
        """Copy this rank's shards of all parameters of a module that the source has; name: in the whole model.

        An inserted block adds nothing to the residual stream: the output projections of its mixer and MLP become zero.
        """
        import torch

        from powernap.parallel.checkpoint.shards import split_of

        with torch.no_grad():
            for inside, parameter in module.named_parameters(name):
                there = name_there(inside, self._inserted)
                if there in self.source.shapes:
                    parameter.copy_(
                        self._read(there, split_of(parameter), self._topology.tp_rank, self._topology.tp_size)
                    )
                elif there is None and inside in self._output_projections:
                    parameter.zero_()

    def optimizer(self, stage: "HybridStage", zero: "ZeroOptimizer") -> None:
        """Copy this rank's part of the optimizer's states."""
        assert self._checkpoint is not None
        self._checkpoint.load(stage, zero, self._topology)


def _shapes(model: ModelConfig, sleep: SleepConfig) -> dict[str, list[int]]:
    weights = parameters(model, sleep, range(model.num_layers))
    return {weight.name: list(weight.shape) for weight in weights}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
