"""Third-party code: the entry points that installed packages register for Powernap. Nothing here imports torch."""

import functools
from importlib.metadata import entry_points
from typing import Any

from powernap.model.errors import PowernapError


class PluginError(PowernapError):
    """An installed package whose entry point cannot be used, in one line."""


def offered_by(group: str) -> list[str]:
    """The names of the entry points of `powernap.<group>`; nothing is imported."""
    return sorted({point.name for point in entry_points(group=f"powernap.{group}")})


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """Name -> object of every entry point of `powernap.<group>`.

    Raises:
        PluginError: if one cannot be imported, or two share a name.
    """
    objects: dict[str, Any] = {}
    for point in entry_points(group=f"powernap.{group}"):
        package = point.dist.name if point.dist else "?"
        label = f"entry point {point.name} = {point.value} in powernap.{group} (package {package})"
        if point.name in objects:
            raise PluginError(f"{label}: another installed package has this name, too; uninstall one of them")
        try:
            objects[point.name] = point.load()
        except Exception as error:  # third-party code may raise anything
            raise PluginError(f"{label}: cannot be imported ({type(error).__name__}: {error})") from error
    return objects
