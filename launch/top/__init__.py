"""`powernap` itself: setup.py gives this folder that name, and model/, parallel/, train/ and launch/ theirs below it."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("powernap")
