"""A new run that continues another from one of its checkpoints, as --resume would, and leaves it as it is: train.branch_from.

Branches of one plateau of the learning rate share its steps: each decays from another checkpoint of it, or over another
number of steps (warm-up, stable, decay: arXiv 2404.06395).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from powernap.train.config import Recipe
from powernap.train.recipe_file import RecipeError
from powernap.train.run.folder import RunFolder
from powernap.train.run.resume import Past
from powernap.train.run.start import checkpoint_in, folder_of

if TYPE_CHECKING:
    from powernap.parallel.checkpoint.reader import Checkpoint
    from powernap.parallel.topology import Topology

# Fields that need not be the source's.
OWN = {"run.name", "train.branch_from", "train.start_from", "train.insert", "train.start_optimizer"}


def find(recipe: Recipe) -> Past:
    """The past of the new run: its source up to a checkpoint; of a run the newest.

    Raises:
        RecipeError, CheckpointError: if there is none, or it is not the past of this recipe.
    """
    given = recipe.train.branch_from
    assert given is not None
    checkpoint = checkpoint_in(folder_of(given, recipe), f"train.branch_from={given}")
    if checkpoint is None:
        raise RecipeError(
            f"train.branch_from={given}: no run below run.root={recipe.run.root}, and no folder of a run or of a checkpoint"
        )
    past = Past.of_checkpoint(*checkpoint)
    past.check(recipe, "in a branch", OWN)
    return past


def open_together(recipe: Recipe, topology: "Topology") -> "Checkpoint":
    """The source's checkpoint, found by the main rank and verified by all."""
    from powernap.parallel.checkpoint.reader import Checkpoint, verify_together

    found: list[Path] = []
    topology.raise_together(lambda: found.append(find(recipe).place))
    folder = topology.broadcast_object(found[0] if found else None)
    assert isinstance(folder, Path)
    return Checkpoint(folder, verify_together(folder, topology))


def copy_records(checkpoint: Path, folder: RunFolder) -> None:
    """Copy the source's metrics and skipped steps; RunLog and SkippedSteps cut what comes after the checkpoint."""
    source = RunFolder(checkpoint.parent.parent)
    folder.path.mkdir(parents=True, exist_ok=True)
    for there, here in ((source.metrics, folder.metrics), (source.skipped_steps, folder.skipped_steps)):
        if there.is_file():
            shutil.copyfile(there, here)
