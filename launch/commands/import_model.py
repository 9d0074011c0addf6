"""powernap import: what a model in Hugging Face's format is, and a recipe that starts from it."""

import argparse
import math
from pathlib import Path

from powernap.launch.commands.arguments import count, path
from powernap.train.hugging_face.families import FAMILIES


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import",
        help="a recipe that starts from a Hugging Face model",
        description="Read the description of a model in Hugging Face's format (config.json, safetensors) and check that "
        "every tensor has its place. Prints what it is and a recipe that starts from it, or writes the recipe. No weight is "
        "copied: training reads them where they are, each rank its own.",
        epilog=f"model_type in config.json: one of {', '.join(FAMILIES)}. example: powernap import Qwen3.5-0.8B "
        "--recipe retrofit.yaml && powernap train retrofit.yaml data.train='data/text/train-*.tar'",
    )
    parser.add_argument("folder", metavar="FOLDER", type=path, help="a folder with config.json and .safetensors files")
    parser.add_argument("--recipe", metavar="FILE", type=path, help="write the recipe there")
    parser.add_argument(
        "--window", type=count, default=1024, metavar="L", help="tokens a window (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.parallel.planning.plan import in_units
    from powernap.train.hugging_face.folder import HuggingFaceFolder
    from powernap.train.hugging_face.recipe import WINDOWS, recipe_of
    from powernap.train.recipe_file import RecipeError
    from powernap.train.yaml_core import dump

    target: Path | None = options.recipe
    if target and target.exists():
        raise RecipeError(f"--recipe {target} exists: choose a new file")
    folder = HuggingFaceFolder.read(options.folder)
    recipe, values = recipe_of(folder, options.window)
    folder.check(recipe.model)
    ignored = {name for names in folder.ignored.values() for name in names}
    numbers = sum(math.prod(shape) for name, shape in folder.shapes.items() if name not in ignored)
    files = len(set(folder.files.values()))
    print(f"{options.folder}: {folder.model_type}, {in_units(numbers)} numbers in {files} file{'s' * (files > 1)}")
    for mark, names in folder.ignored.items():
        print(f"not read: {len(names)} tensors {mark}{'*' if mark.endswith('.') else ''}")
    text = dump(values)
    if target is None:
        print(f"a recipe that starts from it:\n\n{text}", end="")
    else:
        target.write_text(text)
        print(f"{target}: a recipe that starts from it; set data.train, steps and optimizer")
    if folder.tokenizer:
        build = f"powernap data build text data/text inputs=FILES tokenizer={folder.tokenizer}"
        print(f"text for it:\n  {build} window={options.window} windows={WINDOWS}")
    return 0
