"""Sweeps: `sleep.passes=1,2,4 run.seed=0,1` is six runs."""

import itertools
import re

from powernap.launch.jobs.description import JobError


def expand(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Every combination of the values that commas separate, outside brackets and quotes: (suffix of its name, overrides).

    Without such values a single one, without suffix.
    """
    choices = []
    for override in overrides:
        key, equals, text = override.partition("=")
        values = _split(text)
        if len(values) > 1 and key == "run.name":
            raise JobError(
                f"run.name={text}: give a sweep one name; its runs are told apart by the values they differ in"
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
    """At its commas; those inside brackets or quotes belong to one value."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1]:  # YAML quotes begin a value
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and not depth:
            values.append("")
            continue
        values[-1] += letter
    return values if all(values) else [text]
