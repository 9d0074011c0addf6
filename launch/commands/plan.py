"""powernap plan: what a layout costs, before any process starts."""

import argparse
import sys

from powernap.launch.commands.arguments import add_recipe, count, size


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory, bubble and FLOPs of a recipe's layout, or better layouts",
        description="The cost of a recipe's layout, before any process starts: parameters, bytes of every rank, live "
        "segments, FLOPs, the pipeline's bubble, and what each choice of train.recompute would cost; of values that change over "
        "the steps the part that takes most memory. With --suggest: other layouts, best first.",
        epilog="examples: powernap plan demo --memory 80GB; powernap plan demo --suggest --devices 64 --memory 80GB",
    )
    add_recipe(parser)
    parser.add_argument("--memory", type=size, metavar="SIZE", help="memory of a device, such as 80GB or 79GiB")
    parser.add_argument("--suggest", action="store_true", help="propose layouts for --devices")
    parser.add_argument("--devices", type=count, metavar="N", help="(default: as many as the recipe's layout has)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.parallel.planning.plan import plan_run
    from powernap.parallel.planning.suggest import suggest, suggestions_json, suggestions_text
    from powernap.train.data.check import epochs, predicting_windows
    from powernap.train.recipe_file import RecipeError, load_recipe

    if options.devices and not options.suggest:
        raise RecipeError("--devices needs --suggest: without it the recipe sets the number of devices")
    recipe = load_recipe(options.recipe, options.overrides)
    if options.suggest:
        devices, last = options.devices or recipe.parallel.world_size, recipe.phases[-1][1]
        predicts, probes = predicting_windows(last)
        layouts = suggest(last, devices, predicts, options.memory, probes)
        print(suggestions_json(layouts) if options.json else suggestions_text(layouts, devices))

        return 0
    result = plan_run(recipe, predicting_windows, options.memory)
    if note := epochs(recipe):
        result.notes.append(note)
    print(result.as_json() if options.json else result.text(colour=sys.stdout.isatty()))
    return 0
