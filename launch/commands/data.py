"""powernap data build, inspect, stats, verify: token shards."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from powernap.launch.commands.arguments import count, part, path, seed, shards, size, terminal_width, whole
from powernap.parallel.liveness import exit_codes

if TYPE_CHECKING:
    from powernap.train.data.sample_sources import Source

OF_TASKS = {"train_samples": 20_000, "test_samples": 1000, "samples_per_shard": 2500, "seed": 0}
SHARD_SIZE = 64_000_000  # bytes


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "data", help="build, inspect, count and verify token shards", description="Work with token shards."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_build(commands)
    _add_inspect(commands)
    _add_stats(commands)
    _add_verify(commands)


def _add_build(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "build",
        add_help=False,
        help="write WebDataset shards of a task or of text",
        description="Write train-*.tar, test-*.tar (held-out problems) and manifest.json into FOLDER, on all cores. "
        "The same command resumes a build that was stopped, also after the input was fixed; another one begins anew while no shard "
        "is finished. Samples of a task are compared with its sizes.",
        epilog="tasks: depo (follow k edges of a cycle), rule110 (t steps of a cellular automaton), automata (any elementary "
        "one, advanced window by window), track (products of permutations, window by window), program (arithmetic, window "
        "by window), gsm (word problems of 1 to 8 operations), gsm_infinite (GSM-Infinite's published .jsonl or .parquet), text (.txt, .jsonl, .parquet, .arrow, also .gz, .zst or .bz2, "
        "Megatron's .bin, datatrove's .ds, .tar; folders, globs, URLs; on_error=skip leaves out documents "
        "that cannot be used), or one of another package, by its entry point or as package.module:Class. examples: powernap "
        "data build depo data/depo nodes=8 max_hop=4 --train-samples 50000; powernap data build text data/text "
        "inputs=corpus tokenizer=bytes window=256; powernap data build text data/mine inputs=s3://bucket/corpus text_field=meta.text "
        "tokenizer=tokenizer.json; powernap data build text data/mine inputs=megatron_text_document.bin tokenizer=ids:50257",
    )
    parser.add_argument(
        "-h", "--help", action=_Help, nargs=0, help="show this help message, with a TASK its fields, and exit"
    )
    parser.add_argument(
        "task",
        metavar="TASK",
        help="depo, rule110, automata, track, program, gsm, gsm_infinite, text, or package.module:Class",
    )
    parser.add_argument("folder", metavar="FOLDER", type=_new_folder, help="the folder to write shards to")
    parser.add_argument(
        "fields", metavar="key=value", nargs="*", default=[], help="fields of the task, such as nodes=75 max_hop=16"
    )
    of_tasks = parser.add_argument_group("options of tasks")
    of_tasks.add_argument("--train-samples", type=whole(0), help=f"(default: {OF_TASKS['train_samples']})")
    of_tasks.add_argument("--test-samples", type=whole(0), help=f"(default: {OF_TASKS['test_samples']})")
    of_tasks.add_argument("--samples-per-shard", type=count, help=f"(default: {OF_TASKS['samples_per_shard']})")
    of_tasks.add_argument("--seed", type=seed, help=f"(default: {OF_TASKS['seed']})")
    of_text = parser.add_argument_group("options of text, gsm_infinite")
    of_text.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help=f"size of the text in a shard (default: {SHARD_SIZE // 10**6}MB)",
    )
    parser.add_argument("--workers", type=count, metavar="N", help="cores to use (default: all)")
    parser.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="build every N-th shard alone, from the I-th, such as 3/64; powernap submit --parts has a cluster build all. The part that "
        "ends last writes the manifest; without --part, the same command builds what is missing",
    )
    parser.set_defaults(run=run_build)


def _new_folder(text: str) -> Path:
    """FOLDER of a build."""
    if re.match(r"[a-z_]+=", text):
        raise argparse.ArgumentTypeError(f"'{text:.60}': write the folder first, such as data/mine {text:.60}")
    return path(text)


class _Help(argparse.Action):
    """Of a task named before it the fields."""

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, *_: object) -> None:
        if options.task:
            from powernap.train.data.corpora import CORPORA
            from powernap.train.fields import fields_of
            from powernap.train.tasks import task_kind

            entries = fields_of(CORPORA.get(options.task) or task_kind(options.task))
            parser.epilog = None  # of all tasks
            usage, heading, arguments = parser.format_help().partition("\npositional arguments:")
            fields = "".join(f"{entry.text(terminal_width())}\n" for entry in entries)
            print(f"{usage}\nfields of {options.task}:\n{fields}{heading}{arguments}", end="")
        else:
            parser.print_help()
        parser.exit()


def run_build(options: argparse.Namespace, arguments: list[str]) -> int:
    from powernap.train.data.build import build

    with _left_when_asked():
        build(source_of(options), options.folder, options.workers, options.part, _typed(arguments))
    return 0


@contextmanager
def _left_when_asked() -> Iterator[None]:
    """As a job before its time limit, or in the way of another: the same command goes on, so nothing is lost but a shard."""

    def leave(*_: object) -> None:
        os.write(2, b"powernap: asked to stop: the same command goes on\n")  # a signal may come while print prints
        os._exit(exit_codes.PREEMPTED)

    asked = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, leave) for number in asked]
    try:
        yield
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)


def source_of(options: argparse.Namespace, files: str | None = None) -> "Source":
    """What a build's arguments say, checked. `files`: where the files are of the cluster that builds (train/paths.py)."""
    from powernap.train.data.build import task_source
    from powernap.train.data.corpora import CORPORA
    from powernap.train.data.sample import DataError
    from powernap.train.data.sample_sources import CorpusSource
    from powernap.train.recipe_file import check, parse_overrides
    from powernap.train.tasks import task_kind

    fields = parse_overrides(options.fields)
    given = {name: value for name in OF_TASKS if (value := getattr(options, name)) is not None}
    if corpus := CORPORA.get(options.task):
        for name in given:
            raise DataError(
                f"--{name.replace('_', '-')}: {options.task} is read whole; --shard-size divides it into shards"
            )
        return CorpusSource(check(corpus, fields, files=files), options.shard_size or SHARD_SIZE)
    if options.shard_size is not None:
        raise DataError(f"--shard-size: {options.task} is drawn; --samples-per-shard divides it into shards")
    return task_source(options.task, check(task_kind(options.task), fields), **OF_TASKS | given)


def _typed(arguments: list[str]) -> str:
    """The command line, without --part: whichever part ends last says what built all."""
    from powernap.train.run.secrets import as_typed

    words = iter(arguments)
    kept = []
    for word in words:
        if word == "--part":
            next(words, None)
        elif not word.startswith("--part="):
            kept.append(word)
    return as_typed(kept)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show samples and statistics of shards",
        description="Print the first samples of SHARDS with their windows and loss tokens, and statistics of all.",
        epilog="examples: powernap data inspect data/depo; powernap data inspect 'data/depo/test-*.tar' --samples 5",
    )
    parser.add_argument("shards", metavar="SHARDS", type=shards, help="a folder, or shards as a recipe names them")
    parser.add_argument("--samples", type=whole(0), default=2, help="samples to print (default: %(default)s)")
    parser.add_argument(
        "--window", type=count, metavar="L", help="(default: the window that the shards were built for)"
    )
    parser.add_argument(
        "--sequence-length", type=count, metavar="T", help="of documents (default: what the build suggested)"
    )
    parser.set_defaults(run=run_inspect)


def run_inspect(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.data.cache import ShardCache
    from powernap.train.data.inspect import inspect_shards

    print(inspect_shards(options.shards, ShardCache(), options.samples, options.window, options.sequence_length))
    return 0


def _add_stats(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "stats",
        help="count documents, tokens, and what is cut and padded, by source",
        description="A column for each of SHARDS: documents and their lengths, loss tokens, and what cutting them into sequences of T "
        "tokens cuts and pads. Tokens are not read, of documents only their lengths.",
        epilog="examples: powernap data stats data/text --sequence-length 4097; powernap data stats 'web-*.tar' data/books --documents "
        "whole --picture lengths.png",
    )
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        type=shards,
        help="folders, or shards as a recipe names them; each is a source",
    )
    parser.add_argument(
        "--sequence-length", type=whole(2), metavar="T", help="(default: what the build of the first ones suggested)"
    )
    parser.add_argument(
        "--window", type=count, metavar="L", help="(default: what the build of the first ones suggested)"
    )
    parser.add_argument(
        "--documents",
        choices=["packed", "separate", "whole"],
        default="packed",
        help="as data.documents (default: packed)",
    )
    parser.add_argument(
        "--picture", type=path, metavar="FILE", help="draw the lengths of documents, as .png, .svg or .pdf"
    )
    parser.set_defaults(run=run_stats)


def run_stats(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.train.data.cache import ShardCache
    from powernap.train.data.inspect import suggested_sizes
    from powernap.train.data.sample import DataError
    from powernap.train.data.sequences import Cutting
    from powernap.train.data.stats import draw_lengths, stats_of, table

    length, window, pad = suggested_sizes(options.shards[0])
    length, window = options.sequence_length or length, options.window or window
    if options.documents == "separate" and (length - 1) % window:
        raise DataError(
            f"--documents separate: write a --sequence-length of one more than a multiple of {window}, or another --window"
        )
    cutting = Cutting(length, options.documents, pad, window=window)
    found = {spec: stats_of(spec, ShardCache(), cutting, window) for spec in options.shards}
    print(table(found))
    if options.picture:
        draw_lengths(found, length, options.picture)
        print(f"{options.picture} written")
    return 0


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="read every byte of shards and compare with their manifest",
        description="Read every byte of the shards in FOLDER and compare sizes, SHA-256 and counts with the manifest.json "
        "of `powernap data build`; report missing and additional shards. Exit code 1 if anything differs.",
        epilog="example: powernap data verify data/depo",
    )
    parser.add_argument("folder", metavar="FOLDER", type=path, help="the folder of the shards")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from powernap.train.data.verify import verify

    folder = options.folder
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=folder.name, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        result = verify(folder, bar.update)
    for file, problem in result.problems:
        print(f"{folder / file}  BROKEN  {problem}")
    if not result.problems:
        print(f"{folder}  whole  {result.samples:,} samples, {result.bytes:,} bytes in {result.shards:,} shards")
    return 1 if result.problems else 0
