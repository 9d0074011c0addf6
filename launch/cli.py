"""The `powernap` command. Every import that costs time waits until its subcommand runs: help answers at once."""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

DESCRIPTION = "Train hybrid language models that sleep: fast weights written by recurrent passes over each window."
OVERRIDES = "fields of the recipe to change, such as train.steps=100 or sleep.passes=[1,2,4]"


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; return its exit code. A user's mistake is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Megatron-core warns of kernels that it does not find, and both libraries of what they themselves call.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    options = _parse(arguments)
    rank = os.environ.get("RANK", "0")
    who = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        return options.run(options, arguments) or 0
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_users_mistake(error):
            raise
        text = " ".join(str(error).split())
        who = "" if text.startswith(f"rank {rank} ") else who
        sys.stderr.write(f"powernap: error: {who}{text}\n")  # one write: several ranks may speak at once
        return 2
    except KeyboardInterrupt:
        if rank == "0":
            print("powernap: interrupted", file=sys.stderr, flush=True)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse takes key=value only before the options; here they may stand anywhere."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    given = getattr(options, "overrides", getattr(options, "fields", None))
    if wrong := [word for word in rest if given is None or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        given += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="powernap", description=DESCRIPTION)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe. Starts the local processes its layout needs, or joins those that torchrun or srun "
        "started. The run owns the folder runs/NAME: config.yaml, metrics.jsonl, checkpoints/, logs/.",
        epilog="example: powernap train demo run.name=mine train.steps=200 parallel.data=2",
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe such as demo")
    train.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of runs/NAME")
    train.set_defaults(run=_train)

    plan = commands.add_parser(
        "plan",
        help="memory, bubble and FLOPs of a recipe's layout, or better layouts",
        description="What a recipe's layout costs, before any process starts: parameters, bytes of every rank, live "
        "segments, FLOPs and the pipeline's bubble. With --suggest: other layouts, best first.",
        epilog="examples: powernap plan demo --memory 80GB; powernap plan demo --suggest --devices 64 --memory 80GB",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe such as demo")
    plan.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    plan.add_argument("--memory", type=_size, metavar="SIZE", help="memory of a device, such as 80GB or 79GiB")
    plan.add_argument("--suggest", action="store_true", help="propose layouts for --devices")
    plan.add_argument("--devices", type=_count, metavar="N", help="(default: as many as the recipe's layout has)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser(
        "eval",
        help="accuracy by depth and N of a run",
        description="Read a run's test shards with its newest checkpoint: accuracy by depth (hop or step) for each N, "
        "as a table, evaluation.json and evaluation.png in the run's folder, logged to its MLflow run.",
        epilog="example: powernap eval demo-N4 --passes 1,2,4,8",
    )
    evaluate.add_argument("run_name", metavar="RUN", help="a run's folder, or its name below runs/")
    evaluate.add_argument("--passes", type=_numbers, help="values of N, such as 1,2,4,8 (default: the trained ones)")
    evaluate.add_argument("--samples", type=int, help="test samples to read (default: the recipe's)")
    evaluate.set_defaults(run=_eval)

    data = commands.add_parser("data", help="build token shards", description="Work with token shards.")
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = data_commands.add_parser(
        "build",
        help="write WebDataset shards of a task or of text",
        description="Write train-*.tar, test-*.tar (held-out problems) and manifest.json into FOLDER, on all cores. "
        "The same command goes on where it was stopped.",
        epilog="tasks: depo (follow k edges of a cycle), rule110 (t steps of a cellular automaton), gsm (word problems of "
        "1 to 8 operations), text (any .txt, .jsonl or .parquet). examples: powernap data build depo data/depo nodes=8 "
        "max_hop=4 --train-samples 50000; powernap data build text data/text inputs=corpus tokenizer=bytes window=256",
    )
    build.add_argument("task", metavar="TASK", help="depo, rule110, gsm or text")
    build.add_argument("folder", metavar="FOLDER", type=Path, help="where the shards go")
    build.add_argument("fields", metavar="key=value", nargs="*", help="sizes of the task, such as nodes=75 max_hop=16")
    build.add_argument("--train-samples", type=int, default=20000, help="(default: %(default)s)")
    build.add_argument("--test-samples", type=int, default=1000, help="(default: %(default)s)")
    build.add_argument("--samples-per-shard", type=int, default=2500, help="(default: %(default)s)")
    build.add_argument(
        "--shard-size", type=_size, default=64_000_000, metavar="SIZE", help="text read for a shard (64MB)"
    )
    build.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    build.add_argument("--workers", type=_count, metavar="N", help="processes (default: one per core)")
    build.set_defaults(run=_data_build)
    inspect = data_commands.add_parser(
        "inspect",
        help="show samples and statistics of shards",
        description="Write out the first samples of SHARDS with their windows and loss tokens, and count all.",
        epilog="examples: powernap data inspect data/depo; powernap data inspect 'data/depo/test-*.tar' --samples 5",
    )
    inspect.add_argument("shards", metavar="SHARDS", help="a folder, or shards as a recipe names them")
    inspect.add_argument("--samples", type=int, default=2, help="samples to write out (default: %(default)s)")
    inspect.add_argument("--window", type=_count, metavar="L", help="(default: what the shards were built for)")
    inspect.set_defaults(run=_data_inspect)

    compare = commands.add_parser(
        "compare",
        help="compare two runs' metrics to the digit",
        description="Compare two runs' metrics to the digit. Exit code 0 if they agree exactly, 1 if not.",
    )
    compare.add_argument("runs", metavar="RUN", nargs=2, help="a run's folder, or its name below runs/")
    compare.set_defaults(run=_compare)

    ui = commands.add_parser("ui", help="show the runs in MLflow's pages", description="Serve the runs on 127.0.0.1.")
    ui.add_argument("--root", type=Path, default=Path("runs"), help="folder that holds the runs (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="(default: %(default)s)")
    ui.set_defaults(run=_ui)

    demo = commands.add_parser(
        "demo",
        help="train with and without sleep and compare, in minutes",
        description="Build Depo shards, train one small hybrid with N=4 passes of sleep and one without (N=1), test "
        "both on held-out cycles; writes runs/demo/results.json and runs/demo/demo.png.",
    )
    demo.add_argument("--seed", type=int, default=0, help="of data, weights and order (default: %(default)s)")
    demo.add_argument("--folder", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    demo.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    demo.set_defaults(run=_demo)
    return parser


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    from powernap.launch import local
    from powernap.train.config import load_recipe
    from powernap.train.run_folder import RunFolder

    recipe = load_recipe(options.recipe, options.overrides)
    RunFolder(recipe.run_folder).check_start(recipe, options.resume)
    joining = local.already_started()
    processes = recipe.parallel.world_size
    if joining:
        parallel = recipe.parallel
        grid = f"parallel.data={parallel.data} x tensor={parallel.tensor} x pipeline={parallel.pipeline}"
        local.check_world_size(processes, grid)
    else:
        from powernap.train.check_data import check_data

        check_data(recipe)
        if processes > 1:
            return local.start(arguments, processes)
        local.run_alone()

    from powernap.train.trainer import train

    train(recipe, resume=options.resume)
    return 0


def _plan(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.parallel.plan import plan
    from powernap.parallel.suggest import suggest, suggestions_json, suggestions_text
    from powernap.train.check_data import predicting_windows
    from powernap.train.config import RecipeError, load_recipe

    if options.devices and not options.suggest:
        raise RecipeError("--devices goes with --suggest: without it the recipe says how many")
    recipe = load_recipe(options.recipe, options.overrides)
    predicts = predicting_windows(recipe)
    if options.suggest:
        devices = options.devices or recipe.parallel.world_size
        found = suggest(recipe, devices, predicts, options.memory)
        print(suggestions_json(found) if options.json else suggestions_text(found, devices))
        return 0
    result = plan(recipe, predicts, options.memory)
    print(result.as_json() if options.json else result.text(colour=sys.stdout.isatty()))
    return 0


def _eval(options: argparse.Namespace, _: list[str]) -> int:
    folder = _run_folder(options.run_name)
    from powernap.launch import local

    local.run_alone()
    from powernap.train.evaluate import evaluate_run

    print(evaluate_run(folder, options.passes, options.samples))
    return 0


def _data_build(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.config import RecipeError, check, parse_overrides
    from powernap.train.data.shards import TextSource, build, build_task
    from powernap.train.data.text import Text
    from powernap.train.tasks import TASKS

    if options.task == "text":
        build(
            TextSource(check(Text, parse_overrides(options.fields)), options.shard_size),
            options.folder,
            options.workers,
        )
        return 0
    if options.task not in TASKS:
        raise RecipeError(f"no task '{options.task}': choose one of {', '.join(TASKS)}, or text")
    build_task(
        options.task,
        check(TASKS[options.task], parse_overrides(options.fields)),
        options.folder,
        train_samples=options.train_samples,
        test_samples=options.test_samples,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        workers=options.workers,
    )
    return 0


def _data_inspect(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.data.cache import ShardCache
    from powernap.train.data.inspect_shards import inspect_shards

    print(inspect_shards(options.shards, ShardCache(), options.samples, options.window))
    return 0


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.compare import compare

    report, equal = compare(*(_run_folder(run) for run in options.runs))
    print(report)
    return 0 if equal else 1


def _ui(options: argparse.Namespace, _: list[str]) -> int:
    import subprocess

    from powernap.train.tracking import ui_command

    return subprocess.call(ui_command(options.root, options.port))


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.launch.demo import demo

    return demo(options.folder, options.seed, options.overrides)


def _run_folder(name: str) -> Path:
    """A run by folder or by its name below runs/."""
    from powernap.train.config import RecipeError

    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file():
            return folder
    raise RecipeError(f"no run '{name}': give its folder, or its name below runs/")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': write whole numbers from 1, such as 1,2,4,8")
    return numbers


def _size(text: str) -> int:
    units = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([MGT]I?B)", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}': write a size such as 80GB or 79GiB")
    return int(float(match[1]) * units[match[2].upper()])


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': write a whole number from 1, such as 64")
    return int(text)


def _is_users_mistake(error: Exception) -> bool:
    """Our own errors name field or file in one line; a ValueError out of a library is a bug and keeps its traceback."""
    return type(error).__module__.startswith("powernap.") or type(error) in (FileNotFoundError, PermissionError)


if __name__ == "__main__":
    sys.exit(main())
