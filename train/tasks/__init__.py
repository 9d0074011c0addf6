"""Tasks by name: Powernap's own, and those of other packages. Nothing here imports torch.

train/data/task.py defines the protocol. Powernap's own tasks are synthetic and need several steps of reasoning over
evicted context.
"""

import importlib.util
import inspect
import os
import sys
from typing import Any

from powernap.model.plugins import PluginError, plugins
from powernap.model.section import Section
from powernap.train.tasks.automata import Automata
from powernap.train.tasks.depo import Depo
from powernap.train.tasks.gsm import Gsm
from powernap.train.tasks.program import Program
from powernap.train.tasks.rule110 import Rule110
from powernap.train.tasks.track import Track

TASKS: dict[str, type[Any]] = {
    "depo": Depo,
    "gsm": Gsm,
    "program": Program,
    "rule110": Rule110,
    "automata": Automata,
    "track": Track,
}
REQUIRED = ("vocab_size", "sequence_length", "context_length", "window", "sample", "token_name")


def task_kind(name: str) -> type[Any]:
    """The class of a task.

    Args:
        name: Powernap's own, an entry point of `powernap.tasks`, or `package.module:Class`, which is installed, or lies in the
            current folder, which is searched last.

    Raises:
        PluginError: if there is none, or it is not a task.
    """
    if name in TASKS:
        return TASKS[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            _search_current_folder_for(module)
            kind = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # third-party code may raise anything
            raise PluginError(
                f"task {name}: cannot be imported ({type(error).__name__}: {error}); run the command in the folder of its "
                "module, install its package, or name its folder in PYTHONPATH"
            ) from error
    else:
        offered = plugins("tasks")
        if name not in offered:
            raise PluginError(
                f"no task '{name}': choose one of {', '.join([*TASKS, *offered])}, text or gsm_infinite, or write package.module:Class"
            )
        kind = offered[name]
    if not (inspect.isclass(kind) and issubclass(kind, Section)):
        raise PluginError(f"task {name}: {kind!r} is no class derived from powernap.model.section.Section")
    if missing := [part for part in REQUIRED if not hasattr(kind, part) and part not in kind.model_fields]:
        raise PluginError(f"task {name}: {kind.__name__} has no {missing[0]}, which every task has (docs/extending.md)")
    return kind


def _search_current_folder_for(module: str) -> None:
    """Let Python, here and in processes that this one starts, find a module in the current folder."""
    if importlib.util.find_spec(module.partition(".")[0]) is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def task_name(task: object) -> str:
    """The name by which `task_kind` finds the task's class."""
    for name, kind in (TASKS | plugins("tasks")).items():
        if type(task) is kind:
            return name
    return f"{type(task).__module__}:{type(task).__qualname__}"
