"""Fields in words and as JSON schema: every field is there, and the schema takes what a recipe takes."""

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

from powernap.model.section import Section
from powernap.train.config import Recipe
from powernap.train.fields import chosen, fields_of, recipe_schema
from powernap.train.recipe_file import RecipeError, field_names, read_sections, shipped_recipes
from powernap.train.yaml_core import settle


class Inner(Section):
    share: float = Field(0.5, ge=0, lt=1, description="a share | of all")


class Outer(Section):
    size: int = Field(ge=1, le=4096, description="a size")
    names: list[str] | None = Field(None, description="some names")
    pair: tuple[int, float] = Field((1, 2.0), description="two numbers")
    inner: Inner = Field(Inner())
    parts: dict[str, Inner] = Field({}, description="several")


def test_types_limits_and_defaults():
    size, names, pair, share, parts = fields_of(Outer, "outer.")
    assert (size.name, size.type, size.default) == ("outer.size", "whole number, 1 to 4,096", None)
    assert (names.type, names.default) == ("list of: text, or null", "null")
    assert (pair.type, pair.default) == ("[whole number, number]", "[1, 2.0]")
    assert (share.name, share.type, share.default) == ("outer.inner.share", "number, 0 or more, below 1", "0.5")
    assert parts.type == "mapping of: share"
    assert size.text(80) == "outer.size: whole number, 1 to 4,096; must be given\n    a size"
    assert share.row().endswith(r"| `0.5` | a share \| of all |")


def test_every_field_of_a_recipe_is_there_and_fits_a_terminal():
    entries = fields_of(Recipe)
    assert [entry.name for entry in entries] == field_names(Recipe)
    for entry in entries:
        assert entry.meaning and "any value" not in entry.type, entry
        assert max(map(len, entry.text(80).splitlines())) <= 80


def test_a_section_or_a_field_alone():
    entries = fields_of(Recipe)
    assert {entry.name.split(".")[0] for entry in chosen(entries, "sleep")} == {"sleep"}
    assert [entry.name for entry in chosen(entries, "model.gdn.heads")] == ["model.gdn.heads"]
    with pytest.raises(RecipeError, match="no field or section sleep.pases: did you mean sleep.passes?"):
        chosen(entries, "sleep.pases")


def test_the_schema_takes_what_a_recipe_takes():
    schema = recipe_schema(Recipe)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in shipped_recipes().values():
        validator.validate(plain(read_sections(path)))
    for good in ({"sleep": {"passes": {"0": 1, "2000": 4}}}, {"train": {"steps": "2B tokens"}}, {"base": "demo"}):
        validator.validate(good)
    for bad in (
        {"model": {"patern": "AG"}},
        {"train": {"steps": "many"}},
        {"sleep": {"passes": {"0": 0}}},
        {"sleep": {"eviction": "soft"}},
    ):
        assert not validator.is_valid(bad), bad


def plain(values):
    """As an editor reads a recipe: without the notes that wait for a field's type."""
    return settle(values, dict[str, dict])
