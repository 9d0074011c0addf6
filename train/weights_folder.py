"""Weights in a folder as Hugging Face's libraries keep them: model.safetensors, or several files and an index."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from powernap.model.errors import PowernapError

if TYPE_CHECKING:
    import torch

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9  # of a file, at most


class WeightsFolder:
    """Tensors of a folder, read one at a time.

    Attributes:
        files: tensor -> its file.
        shapes: tensor -> its shape.
        dtypes: tensor -> its type, as safetensors names it.

    Args:
        error: raised, in one line with the file's path, for what is missing or cannot be read.
    """

    def __init__(self, path: Path, error: type[PowernapError]):
        self.path, self._error = path, error
        self._open: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in self._names():
            if Path(name).name != name:  # nothing outside the folder is read
                raise error(f"{path / INDEX}: names a file '{name[:80]}' that is not in the folder")
            with self._reading(name), safe_open(path / name, framework="numpy") as file:
                for tensor in file.keys():
                    part = file.get_slice(tensor)
                    self.files[tensor], self.shapes[tensor] = name, tuple(part.get_shape())
                    self.dtypes[tensor] = part.get_dtype()

    def tensor(self, name: str) -> "torch.Tensor":
        file = self.files[name]
        with self._reading(file):
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_tensor(name)

    def _names(self) -> list[str]:
        if not (self.path / INDEX).is_file():
            return [ONE_FILE]
        return sorted(set(read_object(self.path / INDEX, self._error).get("weight_map", {}).values()))

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise self._error(f"{self.path / name}: cannot be read ({' '.join(str(error).split())})") from None


def write_weights(folder: Path, tensors: Iterator[tuple[str, "torch.Tensor"]], mode: int) -> None:
    """Write tensors as they come, into one file or several of at most FILE_BYTES; mode: of the files."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    parts: list[Path] = []
    held: dict[str, torch.Tensor] = {}

    def write() -> None:
        part = folder / f"part-{len(parts)}"
        save_file(held, part, {"format": "pt"})
        part.chmod(mode)
        places.update(dict.fromkeys(held, part.name))
        parts.append(part)
        held.clear()

    total = 0
    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    if len(parts) == 1:
        parts[0].rename(folder / ONE_FILE)
        return
    names = {part.name: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, part in enumerate(parts, start=1)}
    for part in parts:
        part.rename(folder / names[part.name])
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[part] for name, part in places.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_object(path: Path, error: type[PowernapError]) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not JSON"
        raise error(f"{path}: cannot be read ({reason})") from None
