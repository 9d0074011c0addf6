"""powernap train: check a recipe, start its processes or join them, train."""

import argparse
import textwrap
from typing import TYPE_CHECKING

from powernap.launch.commands.arguments import add_recipe

if TYPE_CHECKING:
    from powernap.train.config import Recipe
    from powernap.train.run.signals import Signals


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe. Starts the local processes that its layout needs, or joins those that torchrun or srun "
        "started. The run owns the folder runs/NAME: config.yaml, metrics.jsonl, checkpoints/, logs/.",
        epilog="example: powernap train demo run.name=mine train.steps=200 parallel.data=2",
    )
    add_recipe(parser)
    resuming = parser.add_mutually_exclusive_group()
    resuming.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of runs/NAME")
    resuming.add_argument(
        "--auto-resume",
        action="store_true",
        help="the same if the run has begun, else start it: for schedulers that restart jobs",
    )
    parser.add_argument(
        "--detect-anomaly",
        action="store_true",
        help="stop at the first non-finite number and name the module that produced it; slow",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check recipe, data, weights and layout, say what would be done, and end"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    from powernap.train.run.signals import signal_handlers

    with signal_handlers(then_exits=True) as signals:  # from the start: imports take seconds
        return _run(options, arguments, signals)


def _run(options: argparse.Namespace, arguments: list[str], signals: "Signals") -> int:
    from powernap.launch import torchrun
    from powernap.launch.fit import check_sources
    from powernap.parallel.liveness import exit_codes
    from powernap.train.recipe_file import load_recipe
    from powernap.train.run.folder import RunFolder

    recipe = load_recipe(options.recipe, options.overrides)
    folder = RunFolder(recipe.run_folder)
    # All ranks see the same: the folder is created only after they have met.

    resume = options.resume or (options.auto_resume and folder.config.is_file())
    folder.check_start(recipe, resume)
    joining = torchrun.already_started()
    processes = recipe.parallel.world_size
    if joining:
        torchrun.check_world_size(processes, recipe.parallel.grid)
    else:
        torchrun.share_of_this_machine(processes)
        check_sources(recipe, resume)
        if options.dry_run:
            print("\n".join(_would_do(recipe, resume)))
            return 0
        if signals.stop:
            return exit_codes.PREEMPTED
        if processes > 1:
            return torchrun.start(arguments, recipe, signals)
        torchrun.set_threads(recipe)
        torchrun.run_alone()

    from powernap.train.data.loader import readers_watched
    from powernap.train.trainer import train

    with readers_watched():
        done = train(recipe, signals, resume=resume, detect_anomaly=options.detect_anomaly)
    if done:
        return 0
    return exit_codes.INTERRUPTED if signals.stop == "SIGINT" else exit_codes.PREEMPTED


def _would_do(recipe: "Recipe", resume: bool) -> list[str]:
    """What this command would do, in lines."""
    from powernap.parallel.checkpoint.manifest import checkpoints, step_of
    from powernap.parallel.planning.plan import in_bytes, in_units, plan_run
    from powernap.train.data.check import epochs, predicting_windows
    from powernap.train.lr_schedule import rate_in_words
    from powernap.train.tracking.about import story

    planned = plan_run(recipe, predicting_windows)
    saved = checkpoints(recipe.run_folder / "checkpoints") if resume else []
    after = f", from step {step_of(saved[-1]):,} on" if saved else ""
    fullest = max(stage.memory.total for stage in planned.stages)
    read, schedule = epochs(recipe), rate_in_words(recipe)
    return [
        *textwrap.wrap(f"would train: {story(recipe)}", 80, subsequent_indent=" " * 12),
        f"into        {recipe.run_folder}{after}",
        f"layout      {recipe.parallel.grid}",
        f"            ZeRO {recipe.zero.stage}, micro-batches: {planned.micro_batches} of {planned.micro_batch_size}",
        *textwrap.wrap(f"rate        {schedule}", 80, subsequent_indent=" " * 12),
        *(textwrap.wrap(f"reads       {read}", 80, subsequent_indent=" " * 12) if read else ()),
        f"costs       {in_units(planned.flops_of_run)}FLOP in all, {in_bytes(fullest)} on the fullest rank; more: powernap plan",
        "everything that can be checked before has been; nothing was written",
    ]
