"""A model's folder in Hugging Face's format: config.json and safetensors, in one file or in several with an index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from powernap.train.hugging_face.families import HuggingFaceError, find_family, model_section

if TYPE_CHECKING:
    import torch

    from powernap.model.config import ModelConfig
    from powernap.parallel.checkpoint.shards import Split

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIXES = ("model.language_model.", "language_model.model.", "model.")  # what precedes "layers."
IGNORED = ("model.visual.", "visual.", "mtp.", "model.mtp.")  # pictures; heads that predict several tokens
IGNORED_ENDS = (".rotary_emb.inv_freq",)  # tables that are computed


@dataclass(frozen=True)
class HuggingFaceFolder:
    """What is in it; weights are read one at a time.

    Attributes:
        files: tensor -> its file.
        shapes: tensor -> its shape.
        prefix: what precedes "layers." in the names of the text model.
    """

    path: Path
    config: Mapping[str, Any]
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    prefix: str
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> "HuggingFaceFolder":
        """Read all but the weights.

        Raises:
            HuggingFaceError: naming the file that is missing or cannot be read.
        """
        config = _json(path / CONFIG)
        if (path / INDEX).is_file():
            names = sorted(set(_json(path / INDEX).get("weight_map", {}).values()))
        else:
            names = [ONE_FILE]
        files, shapes = {}, {}
        for name in names:
            if Path(name).name != name:  # nothing outside the folder is read
                raise HuggingFaceError(f"{path / INDEX}: names a file '{name[:80]}' that is not in the folder")
            try:
                with safe_open(path / name, framework="numpy") as file:
                    for tensor in file.keys():
                        files[tensor], shapes[tensor] = name, tuple(file.get_slice(tensor).get_shape())
            except (OSError, SafetensorError) as error:
                raise HuggingFaceError(f"{path / name}: cannot be read ({' '.join(str(error).split())})") from None
        prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in files), None)
        if prefix is None:
            raise HuggingFaceError(f"{path}: has no {PREFIXES[-1]}embed_tokens.weight")
        return cls(path, config, files, shapes, prefix)

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
        return tensor if tensor.startswith("lm_head.") else self.prefix + tensor

    def check(self, model: "ModelConfig") -> None:
        """Raise HuggingFaceError unless the files have what `model` needs, in these shapes, and nothing else."""
        from powernap.train.hugging_face.rules import rules

        wanted = {
            self.name_of(n): s for rule in rules(model, find_family(self.config)[0]) for n, s in rule.theirs.items()
        }
        for name, shape in wanted.items():
            if name not in self.shapes:
                raise HuggingFaceError(f"{self.path}: has no {name}")
            if self.shapes[name] != shape:
                raise HuggingFaceError(f"{self.path}: {name} is {list(self.shapes[name])}, not {list(shape)}")
        ignored = {name for names in self.ignored.values() for name in names}
        if model.tie_embeddings:
            ignored.add("lm_head.weight")  # some files have the copy
        if others := sorted(self.files.keys() - wanted.keys() - ignored):
            raise HuggingFaceError(f"{self.path}: has {others[0]}, which no rule reads")

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by its name in the files."""
        file = self.files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise HuggingFaceError(f"{self.path / file}: cannot be read ({' '.join(str(error).split())})") from None


class HuggingFaceShards:
    """The folder's weights under our names."""

    def __init__(self, folder: HuggingFaceFolder, model: "ModelConfig"):
        from powernap.train.hugging_face.rules import rules

        self._folder = folder
        self._rules = {rule.ours: rule for rule in rules(model, find_family(folder.config)[0])}

    def shard(self, name: str, split: "Split | None", rank: int, ranks: int) -> "torch.Tensor":
        """The part of a parameter that tensor rank `rank` of `ranks` has; nothing else of it stays in memory."""
        from powernap.parallel.checkpoint.shards import shard

        rule = self._rules[name]
        whole = rule.join([self._folder.tensor(self._folder.name_of(tensor)) for tensor in rule.theirs])
        return shard(whole, split, rank, ranks)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder's config.json names a model_type."""
    try:
        return "model_type" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise HuggingFaceError(f"{path}: cannot be read ({reason})") from None
