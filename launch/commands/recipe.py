"""powernap recipe: the shipped recipes, a recipe as resolved, and every field."""

import argparse
import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from powernap.launch.commands.arguments import add_recipe, terminal_width


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recipe",
        help="shipped recipes, a recipe as resolved, every field",
        description="Look at recipes and at what they may say.",
    )
    parts = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = parts.add_parser(
        "list", help="the shipped recipes", description="The shipped recipes, and what they are."
    )
    listing.set_defaults(run=list_recipes)
    show = parts.add_parser(
        "show",
        help="a recipe as resolved, and where each value comes from",
        description="A recipe with all its fields, checked, as YAML that is a recipe again. A comment says where a value comes "
        "from: a file, the command line, or the default.",
        epilog="example: powernap recipe show demo/n1 sleep.passes=2",
    )
    add_recipe(show)
    show.set_defaults(run=show_recipe)
    fields = parts.add_parser(
        "fields",
        help="type, limits, default and meaning of every field",
        description="Type, limits, default and meaning of every field of a recipe, and of `job`, what powernap submit requests.",
        epilog="examples: powernap recipe fields sleep; powernap recipe fields optimizer.lr; powernap recipe fields job",
    )
    fields.add_argument("name", metavar="NAME", nargs="?", help="a section or a field alone, such as sleep")
    form = fields.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    form.add_argument("--schema", action="store_true", help="print the JSON schema that editors check recipes with")
    fields.set_defaults(run=show_fields)


def list_recipes(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.recipe_file import shipped_recipes

    width = terminal_width()
    for name, path in shipped_recipes().items():
        print(name)
        print(textwrap.fill(_first_sentence(path), width, initial_indent="    ", subsequent_indent="    "))
    return 0


def _first_sentence(path: Path) -> str:
    """Of the comment that a recipe begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = " ".join(" ".join(comment).replace("#", "").split())
    return re.split(r"(?<=[.?])\s", text)[0]


def show_recipe(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.config import Recipe
    from powernap.train.recipe_file import find_recipe, load_recipe, parse_overrides, read_bases, shipped_recipes
    from powernap.train.run.secrets import mask_values

    recipe = load_recipe(options.recipe, options.overrides)
    names = {path: name for name, path in shipped_recipes().items()}
    given = {"command line": parse_overrides(options.overrides, model=Recipe)}
    given |= {names.get(path, str(path)): values for path, values in read_bases(find_recipe(options.recipe)).items()}
    print("\n".join(_annotated(mask_values(recipe.model_dump(mode="json")), given)))
    return 0


def _annotated(values: Mapping[str, Any], given: Mapping[str, dict], prefix: str = "") -> Iterator[str]:
    """Lines of YAML; sections that nothing names are left out."""
    from powernap.train.config import Recipe
    from powernap.train.fields import as_written
    from powernap.train.recipe_file import field_names, has_field

    fields = set(field_names(Recipe))
    for name, value in values.items():
        field, indent = prefix + name, "  " * prefix.count(".")
        if field not in fields and value is None:
            continue
        if field not in fields:
            yield f"{indent}{name}:"
            yield from _annotated(value, given, f"{field}.")
        else:
            origin = next((where for where, named in given.items() if has_field(named, field)), "default")
            yield f"{f'{indent}{name}: {as_written(value)}':<40}  # {origin}"


def show_fields(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.jobs.description import JobDescription
    from powernap.train.config import Recipe
    from powernap.train.fields import chosen, fields_of, markdown, recipe_schema

    if options.schema:
        print(json.dumps(recipe_schema(Recipe), indent=2))
        return 0
    entries = [*fields_of(Recipe), *fields_of(JobDescription, "job.")]
    entries = chosen(entries, options.name) if options.name else entries
    print(markdown(entries) if options.markdown else "\n".join(entry.text(terminal_width()) for entry in entries))
    return 0
