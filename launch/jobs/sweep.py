"""Sweeps: `sleep.passes=1,2,4 run.seed=0,1` is six runs."""

import itertools
import re

from powernap.launch.jobs.description import JobError

# From one comma to the next: (a quoted string with its commas, the rest). As in YAML, only a quote at the start quotes.

_PART = re.compile(r"""(?:^|,)('[^']*'?|"[^"]*"?|)([^,]*)""")


def expand(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Every combination of the values separated by commas, as (suffix of the run's name, overrides).

    Commas inside brackets or quotes do not separate. Without several values, one combination with an empty suffix.
    """
    choices = []
    for override in overrides:
        key, equals, text = override.partition("=")
        values = _split(text)
        if len(values) > 1 and key == "run.name":
            raise JobError(
                f"run.name={text}: give a sweep one name; the names of its runs get the values they differ in as suffix"
            )
        label = key.rpartition(".")[2]
        choices.append(
            [
                (f"-{label}{re.sub(r'[^A-Za-z0-9_.]', '_', value)}" if len(values) > 1 else "", f"{key}{equals}{value}")
                for value in values
            ]
        )
    return [
        ("".join(suffix for suffix, _ in combination), [override for _, override in combination])
        for combination in itertools.product(*choices)
    ]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes; a text with an empty value is not a list and stays whole."""
    values: list[str] = []
    depth = 0
    for quoted, rest in _PART.findall(text):
        if depth:
            values[-1] += f",{quoted}{rest}"
        else:
            values.append(quoted + rest)
        depth += sum(map(rest.count, "[{(")) - sum(map(rest.count, "]})"))
    return values if all(values) else [text]
