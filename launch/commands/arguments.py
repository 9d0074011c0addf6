"""What several commands take, read from the command line. Nothing here imports torch."""

import argparse
from pathlib import Path

from powernap.launch.jobs.units import parse_duration, parse_size

OVERRIDES = "fields of the recipe to change, such as train.steps=100 or sleep.passes=[1,2,4]"
RUN = "a run's folder, or its name below runs/"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE key=value ..."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe such as demo")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)


def add_jobs(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """NAME ..., in options.runs"""
    if several:
        parser.add_argument(
            "runs", metavar="NAME", nargs="+", help="a run or sweep: its name below runs/, or its folder"
        )
    else:
        parser.add_argument("job", metavar="NAME", help="a run: its name below runs/, or its folder")


def run_folder(name: str, files: tuple[str, ...] = ("config.yaml", "metrics.jsonl")) -> Path:
    """A run by folder or by its name below runs/: a folder with any of `files`."""
    from powernap.train.recipe_file import RecipeError

    for folder in (Path(name), Path("runs") / name):
        if any((folder / file).is_file() for file in files):
            return folder
    raise RecipeError(f"no run '{name}': give its folder, or its name below runs/")


def numbers(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4]"""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': write whole numbers from 1, such as 1,2,4,8")
    return found


def size(text: str) -> int:
    """80GB -> bytes"""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from None


def duration(text: str) -> int:
    """12h -> seconds"""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from None


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': write a whole number from 1, such as 64")
    return int(text)
