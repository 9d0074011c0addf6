"""Recipes as files: YAML, `base`, `key=value` overrides, and every mistake told in one line. config.py has the fields.

Nothing here imports torch.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from powernap.model.config import Section
from powernap.model.errors import PowernapError
from powernap.train.config import Recipe
from powernap.train.secrets import mask_values

MOST_NESTED = 50  # sections and lists; a recipe has four


class RecipeError(PowernapError):
    """A recipe that cannot run: one line, naming field, value and what to write instead."""


def load_recipe(name_or_path: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, apply `key=value` overrides (values are YAML), check everything that can be checked without data.

    `name_or_path` is a YAML file or the name of one in train/recipes/. A file that begins with `base: NAME_OR_PATH`, a path
    being relative to the file, says only what differs from that recipe.
    """
    return check(Recipe, parse_overrides(overrides, into=_read_recipe(find_recipe(name_or_path))))


def parse_overrides(overrides: list[str], into: dict[str, Any] | None = None) -> dict[str, Any]:
    """Set every `dotted.key=value` in nested sections; values are YAML."""
    values = {} if into is None else into
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"'{override}' is no override: write key=value, such as train.steps=100")
        _set(values, key, _parse_value(key, text))
    return values


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe: every field, in order; secrets masked."""
    path.write_text(yaml.safe_dump(mask_values(recipe.model_dump(mode="json")), sort_keys=False))


def find_recipe(name_or_path: str, folder: Path = Path(".")) -> Path:
    """A file, seen from `folder`, or a shipped recipe by its name, such as depo or depo/deeper."""
    if (path := folder / name_or_path).is_file():
        return path
    shipped = shipped_recipes()
    if found := shipped.get(name_or_path.removesuffix(".yaml")):
        return found
    names = ", ".join(name for name in shipped if "/" not in name)
    raise RecipeError(
        f"no recipe '{name_or_path}': give a YAML file or one of {names}, or a baseline such as depo/deeper"
        + _did_you_mean(name_or_path, list(shipped))
    )


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe in train/recipes/."""
    folder = Path(str(resources.files("powernap.train.recipes")))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def check(model: type[Section], values: dict[str, Any]) -> Any:
    """Validate `values`, turning pydantic's report into one line a finding, the first five."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        by_field: dict[str, list[dict[str, Any]]] = {}
        for finding in error.errors():
            by_field.setdefault(".".join(_place(model, finding)), []).append(finding)
        raise RecipeError("; ".join(_explain(model, findings) for findings in list(by_field.values())[:5])) from None


def _read_recipe(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's sections with what its base has where it says nothing; `derived`: the files that led here.

    A field is taken whole: a mixture of datasets replaces that of the base.
    """
    derived = (*derived, path)
    values = read_sections(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base={base}: write one recipe's name or path")
    try:
        found = find_recipe(base, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: base={base}: {error}") from None
    if any(found.samefile(file) for file in derived):
        raise RecipeError(f"{path}: base={base}: its base in turn is {path}: one of them must stand alone")
    inherited = _read_recipe(found, derived)
    for section, own in values.items():
        both = isinstance(own, dict) and isinstance(inherited.get(section), dict)
        inherited[section] = inherited[section] | own if both else own
    return inherited


def read_sections(path: Path) -> dict[str, Any]:
    """What a recipe's file says, unchecked."""
    try:
        values = _parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as model: and train:")
    return values


def _parse_yaml(text: str) -> Any:
    """Plain values.

    Raises:
        yaml.YAMLError: if it is anything else.
    """
    try:
        _check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of many kinds where a value is not of its tag: of `!!bool x` a KeyError
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _check_yaml(text: str) -> None:
    """No aliases, ten lines of which print as gigabytes, and no depth in which PyYAML loses itself."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases such as *name are not read: write the value out, or derive with base:")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise yaml.YAMLError("nested too deeply")


def _parse_value(key: str, text: str) -> Any:
    try:
        value = _parse_yaml(text) if text else None
    except yaml.YAMLError:
        raise RecipeError(f"{key}={text}: the value is not YAML") from None
    if value == text.strip():  # without quotes; YAML 1.1 reads 1e-3 as text: it wants 1.0e-3
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key}: '{section}' is a value, not a section")
    values[field] = value


def _place(model: type[Section], finding: dict[str, Any]) -> list[str]:
    """The dotted field a finding is about, without pydantic's notes on which member of a union it tried."""
    location = [str(part) for part in finding["loc"]]
    fields: list[str] = []
    for part in location:
        section = _section(model, fields)
        if section is None or part not in section.model_fields:
            break
        fields.append(part)
    return fields if finding["type"] not in ("extra_forbidden", "missing") else location


def _explain(model: type[Section], findings: list[dict[str, Any]]) -> str:
    """Pydantic's findings about one field as `field=value: what is allowed`."""
    fields, kind, value = _place(model, findings[0]), findings[0]["type"], findings[0]["input"]
    field, description = ".".join(fields), _description(model, fields)
    if kind == "extra_forbidden":
        names = [".".join([*fields[:-1], name]) for name in _section(model, fields[:-1]).model_fields]
        everywhere = names if fields[:-1] else [*names, *field_names(model)]
        return f"unknown key {field}" + (_did_you_mean(field, everywhere) or f": allowed are {', '.join(names)}")
    if kind == "missing":
        return f"{field} is missing" + (f" ({description})" if description else "")
    message = findings[0]["msg"].removeprefix("Value error, ")
    if len(findings) > 1:  # one for each member of a union: none of them alone is the rule
        message = "not allowed"
    elif not message[:2].isupper():
        message = message[0].lower() + message[1:]
    if isinstance(value, dict) or not fields:  # a rule between fields names them itself
        return f"{field}: {message}" if field else message
    return f"{field}={_show(value)}: {message}" + (f" ({description})" if description else "")


def _section(model: type[Section], location: list[str]) -> type[Section] | None:
    """The section class at a dotted place, or None if a value stands there."""
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        annotation = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if model is None:
            return None
    return model


def _description(model: type[Section], location: list[str]) -> str | None:
    section = _section(model, location[:-1]) if location else None
    field = section.model_fields.get(location[-1]) if section else None
    return field.description if field else None


def field_names(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted field of a recipe."""
    names = []
    for name in model.model_fields:
        section = _section(model, [name])
        names += field_names(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return names


def _did_you_mean(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:  # the right field in the wrong section
        close = [name for name in names if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f": did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
