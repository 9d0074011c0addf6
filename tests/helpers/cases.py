"""Named cases that a fixture computes together, since processes take longer to start than a case to compute."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def names(cases: Iterable[object], wide: Iterable[object] = ()) -> list[Any]:
    """For pytest.mark.parametrize: `cases`, then the others of `wide` with that mark."""
    fast = list(cases)
    return [*fast, *(pytest.param(name, marks=pytest.mark.wide) for name in wide if name not in fast)]


def asked_for(request: pytest.FixtureRequest, cases: Mapping[str, Any], *always: str) -> dict[str, Any]:
    """Of `cases` those that a selected test of this file has as a parameter, and `always`, which tests name themselves."""
    asked = set(always)
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            asked.update(value for value in item.callspec.params.values() if isinstance(value, str))
    return {name: case for name, case in cases.items() if name in asked}
