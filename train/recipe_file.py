"""Read recipes: YAML, `base`, `key=value` overrides; every mistake is reported in one line. config.py has the fields.

Nothing here imports torch.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from powernap.model.errors import PowernapError
from powernap.model.section import Section
from powernap.train.config import Recipe
from powernap.train.paths import PathError, expanded_path
from powernap.train.yaml_core import Scalar, YamlError, is_model, members_of, parse, parse_argument, settle


class RecipeError(PowernapError):
    """A recipe that cannot run: one line, naming field, value and what to write instead."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), files: str | None = None) -> Recipe:
    """Read a recipe, apply `key=value` overrides (values are YAML), check everything that can be checked without data.

    `name_or_path` is a YAML file or the name of one in train/recipes/. A file with `base: NAME_OR_PATH` (a path is
    relative to the file) holds only what differs from that recipe. `files`: where the target cluster keeps its files
    (launch/jobs/cluster.py: Profile), None for this process; it decides what ~ and $NAME in a path mean.
    """
    values = parse_overrides(overrides, into=_read_recipe(find_recipe(name_or_path)), model=Recipe)
    return check(Recipe, values, files=files)


def parse_overrides(
    overrides: Sequence[str], into: dict[str, Any] | None = None, model: type[Section] | None = None
) -> dict[str, Any]:
    """Set every `dotted.key=value` in nested sections; values are YAML, and a section keeps its other fields.

    The result is for `check`, which knows what each field takes. `model` tells a nested section from a field whose
    value is a mapping.
    """
    values = {} if into is None else into
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or re.search(r"[{}\[\]]", key):
            raise RecipeError(f"'{override}' is no override: {_advice(overrides)}")
        _set(values, key, text, model)
    return values


def _advice(overrides: Sequence[str]) -> str:
    """What to write instead of a word that is no override."""
    for word in overrides:
        if any(word.count(opening) != word.count(closing) for opening, closing in ("{}", "[]")):
            key, equals, _ = word.partition("=")
            whole = f"{key}='...'" if equals else "key='{...}'"
            return f"a value with {{ or [ is divided at blanks by the shell: put it in quotes, {whole}"
    return "write key=value, such as train.steps=100"


def find_recipe(name_or_path: str, folder: Path = Path(".")) -> Path:
    """The path of a recipe: a file, relative to `folder`, or a shipped one by name, such as depo or depo/deeper."""
    if (path := folder / expanded_path(name_or_path)).is_file():
        return path
    shipped = shipped_recipes()
    if found := shipped.get(name_or_path.removesuffix(".yaml")):
        return found
    names = ", ".join(name for name in shipped if "/" not in name)
    raise RecipeError(
        f"no recipe '{name_or_path}': give a YAML file or one of {names}, a baseline such as depo/deeper, or a size such as sizes/1b"
        + did_you_mean(name_or_path, list(shipped))
    )


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe in train/recipes/, each before those in the folder of its name."""
    folder = Path(str(resources.files("powernap.train.recipes")))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: found[name] for name in sorted(found, key=lambda name: name.split("/"))}


def check(model: type[Section], values: Any, **context: Any) -> Any:
    """Validate `values`; report the first five wrong fields in one line. `context`: see paths.py."""
    try:
        return model.model_validate(settle(values, model), context=context)
    except YamlError as error:
        raise RecipeError(str(error)) from None
    except ValidationError as error:
        by_field: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for finding in error.errors():
            by_field.setdefault(tuple(_place(model, finding)), []).append(finding)
        # If one member of a union fits except for a field inside it, the other members do not matter.
        fields = [field for field in by_field if not any(field == other[: len(field)] != other for other in by_field)]
        raise RecipeError("; ".join(_explain(model, field, by_field[field]) for field in fields[:5])) from None


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's sections, completed from its base.

    A field is replaced as a whole: a mixture of datasets replaces the base's.
    """
    values: dict[str, Any] = {}
    for changes in reversed(read_bases(path).values()):
        values = _merged(values, changes, Recipe)
    return values


def read_bases(path: Path) -> dict[Path, dict[str, Any]]:
    """The sections of a recipe's file, then those of its base, and of that one's."""
    found: dict[Path, dict[str, Any]] = {}
    while True:
        found[path] = values = read_sections(path)
        base = settle(values.pop("base", None), str | None)
        if base is None:
            return found
        if not isinstance(base, str):
            raise RecipeError(f"{path}: base={base}: write one recipe's name or path")
        try:
            base_path = find_recipe(base, path.parent)
        except (RecipeError, PathError) as error:
            raise RecipeError(f"{path}: base={base}: {error}") from None
        if any(base_path.samefile(file) for file in found):
            raise RecipeError(f"{path}: base={base}: its base in turn is {path}: one of them must stand alone")
        path = base_path


def _merged(base: dict[str, Any], changes: dict[str, Any], model: type[Section] | None) -> dict[str, Any]:
    """`base` updated with `changes`, field by field in sections and nested sections."""
    merged = dict(base)
    for name, value in changes.items():
        section = _section(model, (name,)) if model else None
        both = section and isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value, section) if both else value
    return merged


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a recipe's file, unchecked: for `check`, like the result of `parse_overrides`."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except YamlError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as model: and train:")
    return values


def _set(values: dict[str, Any], key: str, text: str, model: type[Section] | None) -> None:
    try:
        value = parse_argument(text)
    except YamlError as error:
        raise RecipeError(f"{key}={text}: {error}") from None
    *sections, field = key.split(".")
    for section in sections:
        inner = _as_mapping(values.setdefault(section, {}))
        if not isinstance(inner, dict):
            raise RecipeError(f"{key}: '{section}' is a value, not a section")
        values[section] = values = inner
    before, now = _as_mapping(values.get(field)), _as_mapping(value)
    # A section given as a mapping is merged. A field is replaced as a whole: a mixture of datasets replaces another.
    kind = _section(model, (*sections, field)) if model else None
    both = (kind or not sections) and isinstance(before, dict) and isinstance(now, dict)
    values[field] = _merged(before, now, kind) if both else value


def has_field(values: dict[str, Any], field: str) -> bool:
    """Whether unchecked sections name the dotted `field`."""
    here: Any = values
    for part in field.split("."):
        here = _as_mapping(here)
        if not isinstance(here, dict) or part not in here:
            return False
        here = here[part]
    return True


def _as_mapping(value: Any) -> Any:
    """The mapping in `a={b: c}` on the command line; other values unchanged."""
    return value.value if isinstance(value, Scalar) and isinstance(value.value, dict) else value


def _place(model: type[Section], finding: Mapping[str, Any]) -> list[str]:
    """The dotted field a finding is about, without pydantic's notes on which member of a union it tried."""
    here: Any = model
    fields: list[str] = []
    for part in map(str, finding["loc"]):
        members = {member for member in members_of(here) if member is not NoneType}
        if len(members) > 1:  # then this is such a note
            kind = dict if part.startswith("dict[") else None
            here = next((member for member in members if get_origin(member) is kind), None) if kind else None
            continue
        inner = _inside(here, part)
        if inner is None:
            if is_model(next(iter(members), None)) and finding["type"] == "extra_forbidden":
                fields.append(part)
            break
        fields.append(part)
        here = inner
    return fields


def _explain(model: type[Section], fields: tuple[str, ...], findings: list[Mapping[str, Any]]) -> str:
    """Pydantic's findings about one field as `field=value: what is allowed`."""
    # Of a union's members, one that accepted the type and rejected the value gives the best message.
    ours = [finding for finding in findings if finding["type"] == "value_error"]
    findings = ours[:1] or findings
    kind, value = findings[0]["type"], findings[0]["input"]
    field, description = ".".join(fields), _description(model, fields)
    if kind == "extra_forbidden":
        section = _section(model, fields[:-1])
        assert section is not None
        names = [".".join([*fields[:-1], name]) for name in section.model_fields]
        everywhere = names if fields[:-1] else [*names, *field_names(model)]
        return f"unknown key {field}" + (did_you_mean(field, everywhere) or f": allowed are {', '.join(names)}")
    if kind == "missing":
        return f"{field} is missing" + (f" ({description})" if description else "")
    message = findings[0]["msg"].removeprefix("Value error, ")
    if len(findings) > 1:  # one for each member of a union: none of them alone is the rule
        message = "not allowed"
    elif kind == "bool_type":
        message = "write true or false"
    elif (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and isinstance(parse_argument(value).value, float | int)
    ):
        message = message[0].lower() + message[1:] + ", without quotes"
    elif not message[:2].isupper():
        message = message[0].lower() + message[1:]
    if isinstance(value, dict) or not fields:  # a rule between fields names them itself
        return f"{field}: {message}" if field else message
    return f"{field}={_show(value)}: {message}" + (f" ({description})" if description else "")


def _inside(annotation: Any, part: str) -> Any:
    """The type of a section's field, or of a mapping's values; None if there is no such part."""
    for member in members_of(annotation):
        if is_model(member) and part in member.model_fields:
            return member.model_fields[part].annotation
        if get_origin(member) is dict:
            return get_args(member)[1]
    return None


def _section(model: type[Section], location: tuple[str, ...]) -> type[Section] | None:
    """The section class at a dotted path, or None if it is a plain field."""
    here: Any = model
    for part in location:
        here = _inside(here, part)
    return next((member for member in members_of(here) if is_model(member)), None)


def _description(model: type[Section], location: tuple[str, ...]) -> str | None:
    """The description of the field, or of the field whose mapping it is part of."""
    for length in range(len(location), 0, -1):
        section = _section(model, location[: length - 1])
        if section and location[length - 1] in section.model_fields:
            return section.model_fields[location[length - 1]].description
    return None


def field_names(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted field of a recipe."""
    names = []
    for name in model.model_fields:
        section = _section(model, (name,))
        names += field_names(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return names


def did_you_mean(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:  # the right field in the wrong section
        close = [name for name in names if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f": did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
