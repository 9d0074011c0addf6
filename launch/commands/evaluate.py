"""powernap eval: accuracy by depth and N of a run."""

import argparse

from powernap.launch.commands.arguments import RUN, count, numbers, run_folder, shards


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy by depth and N of a run",
        description="Evaluate a run's newest checkpoint on its test shards: accuracy by depth (hop or step) for each N, "
        "as a table, as evaluation.json and evaluation.png in the run's folder, and in its MLflow run.",
        epilog="example: powernap eval demo-N4 --passes 1,2,4,8",
    )
    parser.add_argument("run_name", metavar="RUN", help=RUN)
    parser.add_argument("--passes", type=numbers, help="values of N, such as 1,2,4,8 (default: the trained ones)")
    parser.add_argument("--samples", type=count, help="test samples to read (default: the recipe's)")
    parser.add_argument(
        "--test",
        nargs="+",
        type=shards,
        metavar="SHARDS",
        help="data.test with its passwords and tokens, which are not stored with a run",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        type=shards,
        metavar="SHARDS",
        help="other shards in place of data.test, also of other lengths: prints their table, writes nothing",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    folder = run_folder(options.run_name)
    from powernap.launch import torchrun
    from powernap.train.run.folder import RunFolder

    torchrun.set_threads(RunFolder(folder).recipe())
    torchrun.run_alone()
    from powernap.train.evaluation.evaluate import evaluate_run

    print(evaluate_run(folder, options.passes, options.samples, options.test, options.shards))
    return 0
