"""Mask passwords and tokens in shards' URLs and commands where others can read: MLflow, config.yaml, logs, errors."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_QUERY_FIELD = r"[\w.\-]*(?:token|secret|signature|password|passwd|credential)[\w.\-]*|[\w.\-]*key(?:id)?|sig|pwd|auth(?:orization)?"
_HEADER = r"(?:proxy-)?authorization|cookie|(?:private|job)-token|x-[\w\-]*(?:token|key|secret|auth)[\w\-]*"
_OPTION = r"--(?:[\w\-]*-)?(?:password|passwd|token|secret|api-key|access-key|secret-key|oauth2-bearer)"
_VARIABLE = r"\b[A-Z0-9_]*(?:SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY)[A-Z0-9_]*="
_WORD = r"(?:\"[^\"]*\"|'[^']*'|[^\s\"']+)"  # of a shell

# Each keeps its first group and masks the rest of the match.
_SECRETS = [
    re.compile(pattern)
    for pattern in (
        r"(?i)(\bhttps?://)[^/?#\s\"']+(?=@)",  # a user name alone may be a token, too
        r"(\w://)[^/?#\s\"':@]*:(?!\d+/)[^?#\s\"'@]+(?=@)",  # user:password, S3's of which may hold a slash; not host:80/a@b
        rf"(?i)([?&](?:{_QUERY_FIELD})=)[^&#\s\"']+",
        rf"(?i)((?<![\w\-])(?:{_HEADER}):\s*)[^\"'\n]+",
        r"(?i)(\bbearer\s+)[\w.~+/=\-]{8,}",
        rf"({_VARIABLE}){_WORD}",
        rf"({_OPTION}[= ]\s*){_WORD}",
        r"((?<!\S)(?:-u|--user|--proxy-user)[= ]?\s*[\"']?)[^\s\"':]+:[^\s\"']+",  # curl's
        r"(\b)(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # an AWS access key
    )
]


def mask_secrets(text: str) -> str:
    """`text` with MASK in place of every credential: in URLs, HTTP headers, options and variables of a command.

    A secret is detected by its context or its name; a bare one is not. Masking is idempotent.
    """
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def as_typed(words: Sequence[str]) -> str:
    """The command `powernap WORDS` as a shell takes it, without its credentials."""
    return mask_secrets(shlex.join(["powernap", *words]))


def mask_values(values: Any) -> Any:
    """The same structure of mappings and lists, with every string in it masked."""
    if isinstance(values, str):
        return mask_secrets(values)
    if isinstance(values, Mapping):
        return {key: mask_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [mask_values(value) for value in values]
    return values
