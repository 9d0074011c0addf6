"""Values that change over a run's steps, and lengths in tokens. Nothing here imports torch.

`sleep.passes: {0: 1, 2000: 2, 6000: 4}` is 1 in the first 2,000 steps, 2 in the 4,000 after them, then 4. A key may be tokens, as may
a number of steps: `2B tokens`; every step reads as many.
"""

import re
from collections.abc import Mapping
from typing import Any

from powernap.train.yaml_core import YamlError, parse, settle

FIELDS = (
    "sleep.passes",
    "sleep.pass_weights",
    "sleep.backprop_passes",
    "sleep.eviction",
    "model.window",
    "distillation.weight",
)
IN_STEPS = ("train.steps", "optimizer.warmup_steps")  # may be written in tokens

Values = Mapping[str, Any]  # a recipe's sections
Schedule = dict[str, dict[int, Any]]  # field -> steps done -> value from then on

_TOKENS = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) ?([kMBT]?) tokens?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def taken_out(values: Values) -> tuple[dict[str, Any], Schedule]:
    """A recipe's values without mappings by step and tokens: the last value of each field, and the mappings in steps.

    Raises:
        ValueError: in one line.
    """
    plain = {**values}
    for field in IN_STEPS:
        if isinstance(given := _get(plain, field), str) and "token" in given:
            plain = replaced(plain, field, _steps(given, field, plain))
    schedule: Schedule = {}
    for field in FIELDS:
        if not isinstance(given := _mapping(_get(plain, field)), Mapping):
            continue
        by_step = {_steps(key, field, plain): value for key, value in given.items()}
        if 0 not in by_step:
            raise ValueError(f"{field}={dict(given)}: write what it is in the first steps, too, as 0: VALUE")
        steps = _get(plain, "train.steps")
        if isinstance(steps, int) and (beyond := [step for step in by_step if step >= steps > 0]):
            raise ValueError(f"{field} changes after {beyond[0]} steps, but train.steps={steps}")
        schedule[field] = dict(sorted(by_step.items()))
        plain = replaced(plain, field, schedule[field][max(by_step)])
    return plain, schedule


def put_back(values: dict[str, Any], schedule: Schedule) -> dict[str, Any]:
    """The reverse of `taken_out`, in steps."""
    for field, by_step in schedule.items():
        values = replaced(values, field, dict(by_step))
    return values


def starts(schedule: Schedule) -> list[int]:
    """The steps after which some value changes, and 0."""
    return sorted({step for by_step in schedule.values() for step in by_step} | {0})


def value_after(by_step: Mapping[int, Any], done: int) -> Any:
    """The value of the step that follows `done` steps."""
    return by_step[max(step for step in by_step if step <= done)]


def replaced(values: Values, field: str, value: Any) -> dict[str, Any]:
    """`values` with another value of a field in one of its sections."""
    section, name = field.split(".")
    return {**values, section: {**values[section], name: value}}


def _get(values: Values, field: str) -> Any:
    section, name = field.split(".")
    inside = values.get(section)
    return inside.get(name) if isinstance(inside, Mapping) else None


def _mapping(given: Any) -> Any:
    """On the command line {0: hard} is text, as a field for text takes it."""
    if not (isinstance(given, str) and given.startswith("{")):
        return given
    try:
        return settle(parse(given))
    except YamlError:
        return given


def _steps(given: int | str, field: str, values: Values) -> int:
    """A number of steps, which may be written in tokens: the steps after which as many have been read."""
    if isinstance(given, int) or given.isdecimal():
        return int(given)
    found, batch, length = _TOKENS.fullmatch(given), _get(values, "train.global_batch_size"), _length(values)
    if not found:
        raise ValueError(f"{field}: {given} is neither a number of steps nor of tokens, such as 500M tokens")
    if not isinstance(batch, int) or not isinstance(length, int) or batch < 1 or length < 2:
        raise ValueError(
            f"{field}: {given} needs train.global_batch_size and data.sequence_length, which are not whole numbers"
        )
    return -(-round(float(found[1]) * _UNITS[found[2]]) // (batch * (length - 1)))


def _length(values: Values) -> Any:
    return _get(values, "data.sequence_length")
