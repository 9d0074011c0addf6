"""`powernap` itself: setup.py gives this folder that name, and model/, parallel/, train/ and launch/ theirs below it.

Its public names are those of `__all__`. Each is imported when it is first asked for: some need torch, `--help` does not.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same as _MODULES, for editors and type checkers
    from powernap.launch.fit import fit
    from powernap.model.config import ModelConfig, SleepConfig
    from powernap.model.errors import PowernapError
    from powernap.model.loss_terms import LossTerm
    from powernap.model.part import Mixer, Weight
    from powernap.model.section import Section
    from powernap.model.sleep import sleep_and_predict
    from powernap.model.stage import HybridStage
    from powernap.parallel.planning.plan import plan
    from powernap.train.callbacks import Callback
    from powernap.train.config import Recipe
    from powernap.train.data.build import build_task
    from powernap.train.data.task import Task
    from powernap.train.generation.generate import load_run
    from powernap.train.recipe_file import load_recipe
    from powernap.train.tasks.sample import Sample, draw_problem

_MODULES = {
    "Callback": "train.callbacks",
    "HybridStage": "model.stage",
    "LossTerm": "model.loss_terms",
    "Mixer": "model.part",
    "ModelConfig": "model.config",
    "PowernapError": "model.errors",
    "Recipe": "train.config",
    "Sample": "train.tasks.sample",
    "Section": "model.section",
    "SleepConfig": "model.config",
    "Task": "train.data.task",
    "Weight": "model.part",
    "build_task": "train.data.build",
    "draw_problem": "train.tasks.sample",
    "fit": "launch.fit",
    "load_recipe": "train.recipe_file",
    "load_run": "train.generation.generate",
    "plan": "parallel.planning.plan",
    "sleep_and_predict": "model.sleep",
}

__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

__version__ = version("powernap")

if not TYPE_CHECKING:  # or a wrong name would be of any type

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'powernap' has no attribute {name!r}")
        return getattr(import_module(f"powernap.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return __all__
