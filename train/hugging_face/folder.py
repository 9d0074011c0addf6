"""A model's folder in Hugging Face's format: config.json and safetensors, in one file or in several with an index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powernap.train.hugging_face.families import Family, HuggingFaceError, find_family, model_section
from powernap.train.weights_folder import CONFIG, TOKENIZER, WeightsFolder, read_object

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig
    from powernap.parallel.checkpoint.shards import Split

FLOATS = ("BF16", "F16", "F32", "F64")
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # what precedes "layers."
# Pictures; heads that predict several tokens; Ouro's gate that ends its loops.
IGNORED = ("model.visual.", "visual.", "mtp.", "model.mtp.", "model.early_exit_gate.")
IGNORED_ENDS = (".rotary_emb.inv_freq",)  # tables that are computed


@dataclass(frozen=True)
class HuggingFaceFolder:
    """What is in it; weights are read one at a time.

    Attributes:
        prefix: what precedes "layers." in the names of the text model.
    """

    path: Path
    config: Mapping[str, Any]
    weights: WeightsFolder
    prefix: str

    @classmethod
    def read(cls, path: Path) -> "HuggingFaceFolder":
        """Read all but the weights.

        Raises:
            HuggingFaceError: naming the file that is missing or cannot be read.
        """
        config, weights = read_object(path / CONFIG, HuggingFaceError), WeightsFolder(path, HuggingFaceError)
        prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in weights.files), None)
        if prefix is None:
            raise HuggingFaceError(f"{path}: has no {PREFIXES[-1]}embed_tokens.weight")
        return cls(path, config, weights, prefix)

    @property
    def files(self) -> dict[str, str]:
        """Tensor -> its file."""
        return self.weights.files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.weights.shapes

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if there is one."""
        path = self.path / TOKENIZER
        return path if path.is_file() else None

    @property
    def text_config(self) -> Mapping[str, Any]:
        """config.json, or its part about the text model."""
        return self.config.get("text_config", self.config)

    @property
    def model_type(self) -> str:
        return self.text_config["model_type"]

    @property
    def section(self) -> dict[str, Any]:
        """The fields of a recipe's model section that config.json fixes."""
        try:
            return model_section(self.config)
        except HuggingFaceError as error:
            raise HuggingFaceError(f"{self.path / CONFIG}: {error}") from None

    @property
    def ignored(self) -> dict[str, list[str]]:
        """Tensors that no text model has, by what their names begin or end with."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            for mark in [m for m in IGNORED if name.startswith(m)] or [m for m in IGNORED_ENDS if name.endswith(m)]:
                found.setdefault(mark, []).append(name)
        return found

    def name_of(self, tensor: str) -> str:
        """The name in the files of a tensor that a rule names."""
        name = tensor if tensor.startswith("lm_head.") else self.prefix + tensor
        other = disk_name(name, find_family(self.config)[0])
        return other if other in self.files else name

    def check(self, model: "ModelConfig") -> None:
        """Raise HuggingFaceError unless the files have what `model` needs, in these shapes, and nothing else."""
        from powernap.train.hugging_face.rules import rules

        wanted: set[str] = set()
        if tensor := next((n for n, dtype in self.weights.dtypes.items() if dtype not in FLOATS), None):
            raise HuggingFaceError(
                f"{self.path}: {tensor} is {self.weights.dtypes[tensor]}: weights are read as {', '.join(FLOATS)}"
            )
        for rule in rules(model, find_family(self.config)[0]):
            shapes = {self.name_of(name): shape for name, shape in rule.theirs.items()}
            wanted |= shapes.keys()
            if missing := [name for name in shapes if name not in self.shapes]:
                raise HuggingFaceError(f"{self.path}: has no {missing[0]}")
            rows = [sum(shape[0] for shape in of.values()) for of in (shapes, {n: self.shapes[n] for n in shapes})]
            for name, shape in shapes.items():
                found = self.shapes[name]
                if found != shape and not (rule.added_up and rows[0] == rows[1] and found[1:] == shape[1:]):
                    raise HuggingFaceError(f"{self.path}: {name} is {list(found)}, not {list(shape)}")
        ignored = {name for names in self.ignored.values() for name in names}
        if model.tie_embeddings:
            ignored.add("lm_head.weight")  # some files have the copy
        if others := sorted(self.files.keys() - wanted - ignored):
            raise HuggingFaceError(f"{self.path}: has {others[0]}, which no rule reads")

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by its name in the files."""
        return self.weights.tensor(name)


def disk_name(name: str, family: Family) -> str:
    """A tensor's name as the family's files have it."""
    for there, here in family.on_disk.items():
        name = name.replace(f".{here}.", f".{there}.")
    return name


class HuggingFaceShards:
    """The folder's weights under our names."""

    def __init__(self, folder: HuggingFaceFolder, model: "ModelConfig"):
        from powernap.train.hugging_face.rules import rules

        self._folder = folder
        self._rules = {rule.ours: rule for rule in rules(model, find_family(folder.config)[0])}
        # Between passes as after the last one: Ouro's loop.
        self._rules["pass_norm.weight"] = self._rules["decoder.final_layernorm.weight"]

    def shard(self, name: str, split: "Split | None", rank: int, ranks: int) -> "torch.Tensor":
        """The part of a parameter that tensor rank `rank` of `ranks` has; nothing else of it stays in memory."""
        from powernap.parallel.checkpoint.shards import shard

        rule = self._rules[name]
        whole = rule.join([self._folder.tensor(self._folder.name_of(tensor)) for tensor in rule.theirs])
        return shard(whole, split, rank, ranks)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder's config.json names a model_type, and is not of an export of ours that has one, too."""
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        return "model_type" in content and "format" not in content
    except (OSError, ValueError, TypeError):
        return False
