"""YAML 1.2's scalars: text stays as written, in files and on the command line; nothing is read as something else in silence."""

import itertools
import json

import pytest
import yaml

from powernap.train.config import Recipe
from powernap.train.recipe_file import RecipeError, check, load_recipe, parse_overrides, read_sections
from powernap.train.run.folder import save_recipe
from powernap.train.yaml_core import YamlError, dump, parse, settle
from tests.helpers import runs

# What YAML 1.1 or 1.2 takes for something else than text.
AMBIGUOUS = [
    "001", "022", "0o17", "0x1F", "0b11", "1_000", "1.10", "1e-3", "5E-3", ".5", "12e4567", "1:30", "12:00:00", "2026-11-28",
    "on", "off", "yes", "no", "y", "true", "True", "null", "~", "", ".inf", ".nan", "=", "<<", "*.tar", "a: b", "a # b", "[a",
    "'a'", "-", "- a", "{a,b}.tar", "@a", "%a", " a", "a\nb", "schläfer",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "tiny.yaml"
    path.write_text(yaml.safe_dump(runs.RECIPE))
    return path


def load(tiny, field, text, on_command_line):
    """tiny.yaml with a field that stands in the file, or on the command line."""
    if on_command_line:
        return load_recipe(str(tiny), [f"{field}={text}"])
    own_section, own_name = field.split(".")
    sections = {section: {k: json.dumps(v) for k, v in values.items()} for section, values in runs.RECIPE.items()}
    sections.setdefault(own_section, {})[own_name] = text
    lines = [
        line
        for section, values in sections.items()
        for line in (f"{section}:", *(f"  {k}: {v}" for k, v in values.items()))
    ]
    path = tiny.with_name("own.yaml")
    path.write_text("\n".join(lines))
    return load_recipe(str(path))


@pytest.mark.parametrize("on_command_line", [False, True])
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "5E-3", 5e-3),
        ("optimizer.lr", ".5e-3", 5e-4),
        ("model.hidden_size", "0064", 64),  # 1.1: 52
        ("run.seed", "0o17", 15),
        ("run.name", "2026-11-28", "2026-11-28"),
        ("run.name", "001", "001"),
        ("run.name", "no", "no"),
        ("run.name", "'12'", "12"),
        ("run.experiment", "1.10", "1.10"),
        ("run.experiment", "12:00:00", "12:00:00"),
        ("run.experiment", "null", "null"),
        ("data.test", "null", None),
        ("data.test", "001", "001"),
        ("train.deterministic", "True", True),
    ],
)
def test_a_field_gets_the_meaning_or_the_text(tiny, field, text, value, on_command_line):
    recipe = load(tiny, field, text, on_command_line)
    section, name = field.split(".")
    found = getattr(getattr(recipe, section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("on_command_line", [False, True])
@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("optimizer.lr", "12e4567", "optimizer.lr=12e4567: "),
        ("optimizer.lr", "'0.1'", "optimizer.lr=0.1: input should be a valid number, without quotes"),
        ("train.steps", "1:30", "train.steps=1:30: "),
        ("train.steps", "1_000", "train.steps=1_000: "),
        ("train.deterministic", "on", "train.deterministic=on: write true or false"),
        ("train.deterministic", "no", "train.deterministic=no: write true or false"),
    ],
)
def test_what_is_no_number_or_boolean_is_refused(tiny, field, text, words, on_command_line):
    with pytest.raises(RecipeError, match=words):
        load(tiny, field, text, on_command_line)


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_text_on_the_command_line_is_taken_as_written(text):
    if text.startswith("'"):
        assert settle(parse_overrides([f"a={text}"]), dict[str, str]) == {"a": text.strip("'")}
    else:
        assert settle(parse_overrides([f"a={text}"]), dict[str, str]) == {"a": text}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:\n  name: a\n  seed: 1\n  name: b\n", "line 4: run.name is given twice, first in line 2"),
        ("run: {name: a}\ntrain: {}\nrun: {seed: 1}\n", "line 3: run is given twice, first in line 1"),
        ("data:\n  train:\n    web: {}\n    'web': {}\n", "line 4: data.train.web is given twice, first in line 3"),
        ("1: a\n1: b\n", "line 2: 1 is given twice"),
        ("a: [1, {b: 1, b: 2}]", "line 1: a.b is given twice"),
        ("a: 1\nb: [1,\nc: 2", r"not YAML \(line 3, column 5: "),
        ("a: *b", r"line 1, column 4: aliases such as \*name are not read"),
        ("a: &b [*b]", "aliases"),
        ("a: !!bool on", "line 1, column 4: 'on' is no bool"),
        ("a: !!timestamp 2001-01-01", "!!timestamp is not read"),
        ("a: !!set {b}", "!!set is not read"),
    ],
)
def test_mistakes_are_named_with_their_line(text, words):
    with pytest.raises(YamlError, match=words):
        parse(text)


@pytest.mark.parametrize("reads_back", [yaml.safe_load, lambda text: settle(parse(text), dict[str, str | list[str]])])
def test_what_is_written_is_read_back_by_both_versions(reads_back):
    values = {f"key{number}": text for number, text in enumerate(AMBIGUOUS)} | {"all": AMBIGUOUS}
    assert reads_back(dump(values)) == values


def test_configs_of_earlier_versions_and_new_ones_are_read_back(tiny, tmp_path):
    """Those were written by PyYAML alone, which puts no quotes around 1e-3 and 0o17."""
    recipe = load_recipe(str(tiny), ["run.name=001", "run.experiment=1e-3", "data.test=0o17", "optimizer.eps=1e-8"])
    values = recipe.model_dump(mode="json")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert "experiment: 1e-3\n" in (tmp_path / "old.yaml").read_text()
    save_recipe(recipe, tmp_path / "new.yaml")
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == yaml.safe_load((tmp_path / "old.yaml").read_text())
    for name in ("old", "new"):
        assert check(Recipe, read_sections(tmp_path / f"{name}.yaml")) == recipe


def test_a_section_on_the_command_line_keeps_what_it_does_not_name(tiny):
    whole = load_recipe(str(tiny), ["optimizer={warmup_steps: 1}", "optimizer.clip=2"]).optimizer
    assert (whole.warmup_steps, whole.clip, whole.lr) == (1, 2.0, 5.0e-3)


def test_a_typo_inside_a_mixture_names_its_field(tiny):
    for wrong, words in (
        (
            "{web: {shards: a.tar, wieght: 3}}",
            r"unknown key data.train.web.wieght: did you mean data.train.web.weight\?$",
        ),
        (
            "{web: {shard: a.tar}}",
            "data.train.web.shards is missing .*; unknown key data.train.web.shard: did you mean",
        ),
        ("{web: {shards: a.tar, weight: 0}}", "data.train.web.weight=0: input should be greater than 0"),
        ("{web: 3}", r"data.train.web=3: .*\(shards to train on"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe(str(tiny), [f"data.train={wrong}"])


def test_every_kind_of_value_settles_where_it_stands():
    assert list(itertools.chain(*settle(parse("[[1, a], [true, ~]]")))) == [1, "a", True, None]
    assert settle(parse("{a: [1, 022], b: {c: on}}"), dict[str, list[str] | dict[str, str]]) == {
        "a": ["1", "022"],
        "b": {"c": "on"},
    }
