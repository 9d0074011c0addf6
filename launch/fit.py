"""Training from Python: `powernap.fit`. The command runs the same checks and the same trainer."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from powernap.train.config import Recipe
from powernap.train.home import provide_home
from powernap.train.run.folder import RunFolder

if TYPE_CHECKING:
    from powernap.model.loss_terms import LossTerm
    from powernap.train.callbacks import Callback


def fit(
    recipe: Recipe,
    callbacks: Sequence["Callback"] = (),
    loss_terms: Sequence["LossTerm"] = (),
    *,
    resume: bool = False,
    detect_anomaly: bool = False,
) -> bool:
    """Train a recipe in this process; under torchrun or srun, with the others that were started. As `powernap train` does.

    Args:
        recipe: of `load_recipe`.
        callbacks: called at the places that `Callback` names.
        loss_terms: added to the loss of each loss token.
        resume: continue from the newest checkpoint of the run's folder.
        detect_anomaly: end the run at the first number that is not finite.

    Returns:
        whether the run is finished; False: a signal or a callback asked to stop, and `resume` continues.

    Raises:
        PowernapError: a mistake, in one line, before anything is computed.
    """
    import torch.distributed as dist

    from powernap.launch import torchrun
    from powernap.parallel.topology import shutdown_distributed
    from powernap.train.data.loader import readers_watched
    from powernap.train.run.signals import signal_handlers
    from powernap.train.trainer import train

    if threading.current_thread() is not threading.main_thread():
        raise torchrun.LaunchError("powernap.fit handles signals: call it from the main thread")
    provide_home()
    RunFolder(recipe.run_folder).check_start(recipe, resume)
    processes, joins = recipe.parallel.world_size, not dist.is_initialized()
    with _environment_as_before(), signal_handlers() as signals, readers_watched():
        if torchrun.already_started():
            torchrun.check_world_size(processes, recipe.parallel.grid)
        elif processes > 1:
            raise torchrun.LaunchError(
                f"{recipe.parallel.grid} needs {processes} processes, this script is one: start it by torchrun --nproc-per-node "
                f"{processes}, or change the layout"
            )
        else:
            check_sources(recipe, resume)
            torchrun.run_alone()
        try:
            return train(recipe, signals, resume, detect_anomaly, callbacks, loss_terms)
        finally:
            if processes == 1 and joins:  # after an error, too: a notebook continues
                shutdown_distributed()


def check_sources(recipe: Recipe, resume: bool) -> None:
    """What a run reads and where it writes, before any process starts. Raises PowernapError."""
    from powernap.parallel.checkpoint.manifest import checkpoints
    from powernap.train.data.check import check_data
    from powernap.train.distillation import check_teacher
    from powernap.train.outputs import check_folder
    from powernap.train.run import branch
    from powernap.train.run.start import Source

    folder = RunFolder(recipe.run_folder)
    check_folder(folder.path, f"run.root={recipe.run.root}:")
    check_data(recipe)
    if recipe.distillation.teacher:
        check_teacher(recipe)
    if resume and checkpoints(folder.checkpoints):
        return
    if recipe.train.start_from:
        Source.find(recipe).check(recipe)
    if recipe.train.branch_from:
        branch.find(recipe)


@contextmanager
def _environment_as_before() -> Iterator[None]:
    """A notebook trains several times: the next call must not take this one's variables for torchrun's."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*os.environ, *before}:
            if name not in before:
                del os.environ[name]
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]
