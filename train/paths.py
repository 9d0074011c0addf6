"""Expand ~ and $NAME in paths in files and after a `=`, where no shell does. Nothing here imports torch."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from powernap.model.errors import PowernapError
from powernap.train.home import substitute_home

CACHE = "~/.cache/powernap"  # of data.cache
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
# A URL or command, also inside braces: these have rules of their own, and a command runs in its own shell.
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*:|://|pipe:")


class PathError(PowernapError):
    """A path that cannot be expanded, in one line."""


def expand(path: str) -> str:
    """Expand ~, ~USER, $NAME and ${NAME} as a shell does; a path with a $ that exists as written is kept.

    Raises:
        PathError: if there is no such user or variable, or no home.
    """
    if "$" in path and "\0" not in path and os.path.lexists(path):
        return path
    expanded = re.sub(r"^~[^/]*", lambda match: _home(match[0]), path)
    expanded = _VARIABLE.sub(lambda match: _value(match[1] or match[2]), expanded)
    if "${" in path and not _VARIABLE.search(path):
        raise PathError("only $NAME and ${NAME} are expanded")
    return expanded


def expand_shards(spec: str) -> str:
    """`expand` for a recipe's shards, inside brace lists too; URLs and commands are left unchanged."""
    if _URL.search(spec):
        return spec
    return expand(re.sub(r"(?<=[{,])~[^/,{}]*(?=/)", lambda match: _home(match[0]), spec))


def is_expanded(path: str) -> bool:
    """Whether no shell would change `path`: neither ~ at its start nor a variable."""
    return not path.startswith("~") and not re.search(r"\$[\w{]", path)


def expanded_path(path: str) -> Path:
    return Path(expand(path))


def cache_folder(path: str = CACHE) -> Path:
    """`path` expanded; without a home the default is below the substitute."""
    try:
        return expanded_path(path)
    except PathError:
        if path != CACHE:
            raise
    return substitute_home() / CACHE.removeprefix("~/")


def _home(word: str) -> str:
    """The home folder for ~ or ~USER."""
    home = os.path.expanduser(word)
    if home not in (word, str(substitute_home())):
        return home
    if word == "~":
        raise PathError("~ is nobody's folder, since HOME is not set: set it, or write the whole path")
    raise PathError(f"there is no user {word[1:]:.60}: write ./{word:.60} for a file of that name")


def _value(name: str) -> str:
    if value := os.environ.get(name):
        return value
    raise PathError(f"${name:.60} is not set here: set it, or write the whole path")


def _at_once(expand_one: Any) -> Any:
    def validate(path: str, info: ValidationInfo) -> str:
        elsewhere = (info.context or {}).get("files") == "elsewhere"
        if elsewhere and not _URL.search(path) and not is_expanded(path):
            raise PathError("~ and $NAME mean other folders here than in pods: write the path as the pods see it")
        return expand_one(path)

    return AfterValidator(validate)


def _when_used(path: str, info: ValidationInfo) -> str:
    if (info.context or {}).get("files") not in ("shared", "elsewhere"):
        cache_folder(path)
    return path


# Expanded when the recipe is read, so that it means the same to every later reader. Refused for Kubernetes pods whose
# volume is not mounted here: it would mean something else there.
SharedPath = Annotated[str, _at_once(expand)]
Shards = Annotated[str, _at_once(expand_shards)]
# A cache on the machine that uses it: expanded there.
CachePath = Annotated[str, AfterValidator(_when_used)]
