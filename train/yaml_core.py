"""YAML 1.2 for recipes and profiles. A scalar keeps its source text beside its value, so that text stays as written.

PyYAML alone reads YAML 1.1, in which 0072 is 58, 12:00:00 is 43200 and `on` is true. Here it only parses; yamlcore has
the core schema of YAML 1.2; `settle` gives each field the text or the value, depending on its type.
"""

import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
import yamlcore
from pydantic import BaseModel

from powernap.model.errors import PowernapError

_TAG = "tag:yaml.org,2002:"
_KINDS = {
    yaml.MappingNode: {f"{_TAG}map"},
    yaml.SequenceNode: {f"{_TAG}seq"},
    yaml.ScalarNode: {_TAG + kind for kind in ("str", "int", "float", "bool", "null")},
}


class YamlError(PowernapError):
    """Text that is not YAML, or uses a YAML feature unsupported here: one line, with line and column if known."""


@dataclass(frozen=True)
class Scalar:
    """A value that is not text, and its source `text` in a file or on the command line: 0072, on, [a, b]."""

    text: str
    value: Any


def parse(text: str) -> Any:
    """Parse into mappings with text as keys, lists, text, and a Scalar for each number, boolean and null.

    Raises:
        YamlError: for anything else, or if a mapping has a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Scalar("", None) if node is None else _build(loader, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ": ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"not YAML ({_position(mark)}{' '.join(message.split())})") from None
    except yaml.YAMLError as error:
        message = " ".join(str(error).split()).replace('in "<unicode string>", ', "")
        raise YamlError(f"not YAML ({message})") from None


def parse_argument(text: str) -> Any:
    """The value of `key=value`: as in a file, but a text field takes all of it as written, # and * included.

    Invalid YAML is text, too: {a,b}/train.tar. The Scalar's value is then the error, for a field that takes no text.

    Raises:
        YamlError: if it holds control characters.
    """
    try:
        value = parse(text)
    except YamlError as error:
        if yaml.reader.Reader.NON_PRINTABLE.search(text):
            raise
        return Scalar(text, error)
    return value if text[:1] in ("'", '"') else Scalar(text, value.value if isinstance(value, Scalar) else value)


def settle(value: Any, annotation: Any = Any) -> Any:
    """Plain values: a Scalar becomes its text if the type `annotation` takes text but not its value, else its value.

    Raises:
        YamlError: for a Scalar that is not valid YAML, if the type takes no text.
    """
    members = members_of(annotation)
    if isinstance(value, Scalar):
        if _is_text(value.value, members):
            return value.text
        if isinstance(value.value, YamlError):
            raise YamlError(f"{value.text}: {value.value}")
        return settle(value.value, annotation)
    if isinstance(value, dict):
        for member in members:
            if is_model(member):
                fields = member.model_fields
                return {k: settle(v, fields[k].annotation if k in fields else Any) for k, v in value.items()}
            if get_origin(member) is dict:
                return {k: settle(v, get_args(member)[1]) for k, v in value.items()}
        return {k: settle(v) for k, v in value.items()}
    if isinstance(value, list):
        kinds = next((get_args(member) for member in members if get_origin(member) in (list, tuple)), (Any,))
        return [settle(v, kinds[min(i, len(kinds) - 1)]) for i, v in enumerate(value)]
    return value


def dump(*documents: Any) -> str:
    """YAML that readers of version 1.1, such as kubectl, and of version 1.2 understand alike."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)


class _Loader(yamlcore.CoreLoader):
    """Rejects aliases: `train: *.tar` is a glob without its quotes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            why = "aliases such as *name are not read: put text in quotes, write a value out, or derive with base:"
            raise yaml.MarkedYAMLError(problem=why, problem_mark=event.start_mark)  # type: ignore[arg-type]  # stubs
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # for human readers, repeat a value instead of aliasing it

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Lines as lines, such as a recipe in a ConfigMap."""
        return self.represent_scalar(f"{_TAG}str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)

# Quote text that is not text in either version.
for _first, _rules in yamlcore.CoreLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _build(loader: _Loader, node: yaml.Node, parents: str = "") -> Any:
    if node.tag not in _KINDS[type(node)]:
        tag = node.tag.replace(_TAG, "!!")
        raise yaml.MarkedYAMLError(problem=f"{tag:.60} is not read: write plain values", problem_mark=node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(loader, node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, parents) for item in node.value]
    mapping: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key_node.start_mark)
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in mapping:
            raise YamlError(f"line {line}: {parents}{key:.60} is given twice, first in line {lines[key]}: keep one")
        lines[key] = line
        mapping[key] = _build(loader, value_node, f"{parents}{key:.60}.")
    return mapping


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, IndexError):  # a tag that does not fit, or a number with thousands of digits
        kind = node.tag.removeprefix(_TAG)
        raise yaml.MarkedYAMLError(problem=f"'{node.value:.60}' is no {kind}", problem_mark=node.start_mark) from None
    if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
        return node.value  # 12e4567 overflows: keep it as text
    return value if isinstance(value, str) else Scalar(node.value, value)


def _is_text(value: Any, members: list[Any]) -> bool:
    """Whether a type with these members takes text, but no value of `value`'s type."""
    if str not in members:
        return False
    if isinstance(value, dict):
        return not any(get_origin(member) is dict or is_model(member) for member in members)
    if isinstance(value, list):
        return not any(get_origin(member) in (list, tuple) for member in members)
    return type(value) not in members or isinstance(value, str)


def is_model(member: Any) -> bool:
    """Whether a type is a section."""
    return isinstance(member, type) and issubclass(member, BaseModel)


def members_of(annotation: Any) -> list[Any]:
    """The member types of a union; the types of a Literal's choices."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members_of(part)]
    if origin is Literal:
        return [NoneType if choice is None else type(choice) for choice in get_args(annotation)]
    return [annotation]


def _position(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
