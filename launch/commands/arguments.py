"""Arguments shared by several commands, and their parsers. Nothing here imports torch."""

import argparse
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from powernap.launch.jobs.units import parse_duration, parse_size

OVERRIDES = "fields of the recipe to change, such as train.steps=100 or sleep.passes=[1,2,4]"
RUN = "a run's folder, or its name below runs/"
LARGEST = 2**32  # upper bound of integers, as in a recipe
WIDEST = 100  # columns that are read easily
MOST_PASSES = 1024  # as sleep.passes


def add_recipe(parser: argparse.ArgumentParser, or_else: str = "") -> None:
    """RECIPE key=value ..., where `or_else` says when there is none."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if or_else else None,
        help=f"a YAML file, or the name of a shipped recipe such as demo{or_else}",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=OVERRIDES)


def add_jobs(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """NAME ..., in options.runs"""
    if several:
        parser.add_argument(
            "runs", metavar="NAME", nargs="+", help="a run or sweep: its name below runs/, or its folder"
        )
    else:
        parser.add_argument("job", metavar="NAME", help="a run: its name below runs/, or its folder")


def run_folder(name: str, files: tuple[str, ...] = ("config.yaml", "metrics.jsonl")) -> Path:
    """The folder of a run, given as such or by its name below runs/; it has at least one of `files`."""
    from powernap.train.paths import expanded_path
    from powernap.train.recipe_file import RecipeError

    for folder in (expanded_path(name), Path("runs") / name):
        if any((folder / file).is_file() for file in files):
            return folder
    raise RecipeError(f"no run '{name}': give its folder, or its name below runs/")


def numbers(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4], values of N"""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1 or max(values) > MOST_PASSES:
        raise argparse.ArgumentTypeError(f"'{text:.60}': write whole numbers from 1 to {MOST_PASSES}, such as 1,2,4,8")
    return values


def part(text: str) -> tuple[int, int]:
    """3/64 -> (3, 64)"""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts:
        raise argparse.ArgumentTypeError(f"'{text:.60}': write such as 3/64, from 1/64 to 64/64")
    return number, parts


def size(text: str) -> int:
    """80GB -> bytes"""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text:.60}': {error}") from None


def duration(text: str) -> int:
    """12h -> seconds"""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text:.60}': {error}") from None


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """A parser of whole numbers within these bounds."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"'{text:.60}': write a whole number from {least} to {most}")
        return number

    return parse


def real(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers within these bounds; above: `least` itself is excluded."""
    bounds = f"above {least:g}" if above else f"from {least:g}"
    bounds += f" to {most:g}" if math.isfinite(most) else ""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and least <= number <= most) or (above and number == least):
            raise argparse.ArgumentTypeError(f"'{text:.60}': write a number {bounds}")
        return number

    return parse


count = whole(1)
passes = whole(1, MOST_PASSES)
seed = whole(0, 2**32 - 1)  # as run.seed


def path(text: str) -> Path:
    """Expand ~ and $NAME, as shells do not in --to=~/folder."""
    from powernap.train.paths import PathError, expanded_path

    try:
        return expanded_path(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(f"'{text:.60}': {error}") from None


def shards(text: str) -> str:
    """Expand ~ and $NAME in shards, written as in a recipe."""

    from powernap.train.paths import PathError, expand_shards

    try:
        return expand_shards(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(f"'{text:.60}': {error}") from None


def terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
