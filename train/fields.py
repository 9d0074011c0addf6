"""The fields of a recipe, a job, a profile or a task, in words and as JSON schema for editors. Nothing here imports torch."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from powernap.model.section import Section
from powernap.train import by_step
from powernap.train.recipe_file import RecipeError, did_you_mean

Schema = Mapping[str, Any]
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class FieldEntry:
    """One field of a section."""

    name: str  # dotted
    type: str
    default: str | None  # as a recipe writes it; None: it must be given
    meaning: str

    def text(self, width: int) -> str:
        """Two lines or more, for a terminal."""
        default = "must be given" if self.default is None else f"default {self.default}"
        body = textwrap.wrap(self.meaning, width, initial_indent="    ", subsequent_indent="    ")
        return "\n".join([*textwrap.wrap(f"{self.name}: {self.type}; {default}", width, subsequent_indent="  "), *body])

    def row(self) -> str:
        """Of a Markdown table."""
        cells = (f"`{self.name}`", self.type, "" if self.default is None else f"`{self.default}`", self.meaning)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def fields_of(model: type[Section], prefix: str = "") -> list[FieldEntry]:
    """Every field of `model` and of its sections, in their order."""
    schema = model.model_json_schema()
    return list(_walk(schema, schema.get("$defs", {}), prefix))


def chosen(entries: Sequence[FieldEntry], name: str) -> list[FieldEntry]:
    """The field `name`, or all of the section `name`.

    Raises:
        RecipeError: if there is none, with the nearest.
    """
    found = [entry for entry in entries if entry.name == name or entry.name.startswith(f"{name}.")]
    if not found:
        names = [entry.name for entry in entries]
        sections = {n.rsplit(".", depth)[0] for n in names for depth in range(1, n.count(".") + 1)}
        raise RecipeError(f"no field or section {name}" + did_you_mean(name, [*sorted(sections), *names]))
    return found


def markdown(entries: Sequence[FieldEntry]) -> str:
    """A table for each section."""
    lines: list[str] = []
    section = None
    for entry in entries:
        if (own := entry.name.rpartition(".")[0]) != section:
            section = own
            lines += ["", f"## {section}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        lines.append(entry.row())
    return "\n".join(lines).strip()


def recipe_schema(model: type[Section]) -> dict[str, Any]:
    """JSON schema of a recipe's file: `base` says what a file leaves out, and some fields may change over the steps."""
    schema = model.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)  # a base may have it
    for field in (*by_step.FIELDS, *by_step.IN_STEPS):
        section, name = field.split(".")
        fields = _resolved(schema["properties"][section], schema["$defs"])["properties"]
        plain = {key: value for key, value in fields[name].items() if key not in ("description", "default", "title")}
        in_tokens = {"type": "string", "pattern": "tokens?$"}
        other = in_tokens if field in by_step.IN_STEPS else {"type": "object", "additionalProperties": plain}
        rest = {key: value for key, value in fields[name].items() if key in ("description", "default")}
        fields[name] = {"anyOf": [plain, other], **rest}
    schema["properties"]["base"] = {"type": "string", "description": "a recipe, by name or path, that this one changes"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Powernap recipe"}


def _walk(schema: Schema, definitions: Mapping[str, Schema], prefix: str) -> Iterator[FieldEntry]:
    for name, field in schema.get("properties", {}).items():
        inner = _section(field, definitions)
        if inner is not None:
            yield from _walk(inner, definitions, f"{prefix}{name}.")
        else:
            default = None if name in schema.get("required", ()) else as_written(field.get("default"))
            yield FieldEntry(prefix + name, _in_words(field, definitions), default, field.get("description", ""))


def _section(field: Schema, definitions: Mapping[str, Schema]) -> Schema | None:
    """The section that a field is, null or not; None for a plain value."""
    for member in field.get("anyOf", [field]):
        if "properties" in (resolved := _resolved(member, definitions)):
            return resolved
    return None


def _resolved(field: Schema, definitions: Mapping[str, Schema]) -> Any:
    return definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def as_written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _in_words(field: Schema, definitions: Mapping[str, Schema]) -> str:
    """Type and limits: "whole number, 1 or more, or null"."""
    field = _resolved(field, definitions)
    if "anyOf" in field:
        return ", or ".join(dict.fromkeys(_in_words(member, definitions) for member in field["anyOf"]))
    if choices := field.get("enum", [field["const"]] if "const" in field else []):
        return " | ".join(map(str, choices))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(_in_words(item, definitions) for item in field['prefixItems'])}]"
        return f"list of: {_in_words(field.get('items', {}), definitions)}"
    if field.get("type") == "object" or "properties" in field:
        values = field.get("additionalProperties")
        inner = ", ".join(_resolved(values, definitions).get("properties", ())) if isinstance(values, Mapping) else ""
        if isinstance(values, Mapping) and not inner:
            inner = _in_words(values, definitions)
        return f"mapping of: {inner}" if inner else "mapping"
    return WORDS.get(field.get("type", ""), "any value") + _limits(field)


def _limits(field: Schema) -> str:
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f", {low:,} to {high:,}"
    words = [
        "" if low is None else f"{low:,} or more",
        "" if above is None else f"above {above:,}",
        "" if high is None else f"{high:,} at most",
        "" if below is None else f"below {below:,}",
        "" if "maxLength" not in field else f"{field['maxLength']} characters at most",
    ]
    return "".join(f", {word}" for word in words if word)
