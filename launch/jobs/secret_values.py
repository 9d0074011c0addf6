"""Secrets by name: the sources of their values. The values themselves are never stored."""

import os
import re
import stat
from collections.abc import Mapping

from powernap.launch.jobs.description import JobError
from powernap.train.config import Recipe
from powernap.train.paths import expanded_path
from powernap.train.recipe_file import flatten
from powernap.train.run.secrets import MASK, mask_values

_REFERENCE = re.compile(r"\$\w+|\$\{\w+\}")  # in a command, which reads its environment


def check_sources(names: list[str], files: Mapping[str, str]) -> None:
    """Raise JobError unless each secret has a value, in its file or in this process's environment."""
    for name in names:
        if name in files:
            read_secret_file(name, files[name])
        elif not os.environ.get(name):
            raise JobError(
                f"job.secrets={name}: no value: add a file for it under secrets in the cluster's profile, or set it here"
            )


def read_secret_file(name: str, file: str) -> str:
    """The value in a file that only its owner may read."""
    path = expanded_path(file)
    try:
        mode = path.stat().st_mode
        value = path.read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise JobError(f"{file}, the profile's file for {name}: cannot be read ({reason})") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise JobError(f"{file}, the profile's file for {name}: readable by others: chmod 600 {file}")
    if not value or "\n" in value or "\0" in value:
        raise JobError(f"{file}, the profile's file for {name}: write only the value, in one line")
    return value


def refuse_secrets(recipe: Recipe) -> None:
    """Raise JobError if a field contains a credential: a job's files would show it."""
    values = flatten(recipe.model_dump(mode="json"))
    for field, value in values.items():
        bare = _without_references(value)
        if mask_values(bare) != bare:
            raise JobError(
                f"{field} contains a credential, which a job's files would show: add its variable to job.secrets and use "
                'that in a command, such as pipe:curl -H "Authorization: Bearer $TOKEN" ...'
            )


def refuse_secrets_in_words(words: list[str]) -> None:
    """Raise JobError if a word of a command contains a credential."""
    for word in words:
        if mask_values(word) != word:
            raise JobError(
                f"{word.partition('=')[0]:.40} contains a credential, which a job's files would show: give it by a variable of "
                "job.secrets, or a file that the nodes have"
            )


def _without_references(value: object) -> object:
    if isinstance(value, str):
        return _REFERENCE.sub(MASK, value)
    return [_without_references(part) for part in value] if isinstance(value, list) else value
