"""Records as conversations: turns of a user and an assistant, whose words bear the loss. No torch here."""

import json
from typing import Any, NamedTuple

from powernap.train.data.sample import DataError

ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT}  # other names of roles
TEMPLATES = {
    "plain": "{role}: {content}\n",
    "chatml": "<|im_start|>{role}\n{content}<|im_end|>\n",
}


class Turn(NamedTuple):
    role: str
    content: str


def turns_of(value: Any, where: object) -> list[Turn]:
    """A list of {role, content}, or {from, value}. Raises DataError unless an assistant says something in it."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} has no conversation, a list of {{role, content}}, but {json.dumps(value, default=str)[:40]}"
        )
    turns = []
    for turn in value:
        role, content = (
            next((turn[name] for name in names if name in turn), None) if isinstance(turn, dict) else None
            for names in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: a turn must have a role and a content, both text, not {json.dumps(turn, default=str)[:60]}"
            )
        turns.append(Turn(ROLES.get(role, role), content))
    if not any(turn.role == ASSISTANT and turn.content for turn in turns):
        raise DataError(f"{where}: nothing that an assistant says: there is nothing to learn from")
    return turns


def around(template: str, role: str) -> tuple[str, str]:
    """What stands before and after the content of a turn."""
    before, after = TEMPLATES.get(template, template).split("{content}")
    return before.replace("{role}", role), after.replace("{role}", role)
