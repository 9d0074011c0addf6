"""powernap checkpoint: list, verify and export a run's checkpoints."""

import argparse
import sys
from pathlib import Path

from powernap.launch.commands.arguments import RUN, count, path, run_folder


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="list, verify, export checkpoints",
        description="A run's checkpoints: list them, verify every byte, export the model alone.",
        epilog="examples: powernap checkpoint inspect mine; powernap checkpoint verify mine; powernap checkpoint export "
        "mine exported && powernap generate exported --prompt 'the cat'",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, text in (
        ("inspect", inspect, "list a run's checkpoints; with --step, the contents of one"),
        ("verify", verify, "read every file and compare size and SHA-256; exit code 1 if one is damaged"),
        ("export", export, "write the whole model as safetensors with a config.json, for powernap generate and others"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("run_name", metavar="RUN", help=RUN)
        action.add_argument("--step", type=count, metavar="N", help="only the checkpoint of this step")
        if name == "export":
            action.add_argument("to", metavar="FOLDER", type=path, help="a new folder")
            action.add_argument(
                "--ema", action="store_true", help="the running mean of the weights, of a run with train.ema"
            )
            action.add_argument(
                "--format",
                choices=("powernap", "hf"),
                default="powernap",
                help="hf: a folder that transformers, vLLM and others load; they do not sleep (default: %(default)s)",
            )
            action.add_argument(
                "--remote-code",
                action="store_true",
                help="with hf: any model, with code for trust_remote_code=True, so that it sleeps in transformers, too",
            )
            action.add_argument(
                "--like",
                metavar="SOURCE",
                type=path,
                help="with hf: the folder that training started from: keep its config, tokenizer, precision, other tensors",
            )
            action.add_argument(
                "--register",
                metavar="MODEL",
                help="then copy it to MLflow, as a new version of this registered model",
            )
        action.set_defaults(run=run)


def inspect(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.parallel.checkpoint.manifest import CheckpointError, read_manifest

    folders = _checkpoints(options)
    if options.step:
        print("\n".join(_describe(read_manifest(folders[0]))))
        return 0
    print(f"{'step':>9} {'written (UTC)':20} {'bytes':>15} {'files':>5}  layout")
    for folder in folders:
        try:
            content = read_manifest(folder)
        except CheckpointError as error:
            print(f"{folder.name[5:].lstrip('0'):>9} BROKEN: {error}")
            continue
        size = sum(file["bytes"] for file in content["files"].values())
        written = content["written"][:19].replace("T", " ")
        print(f"{content['step']:9,} {written:20} {size:15,} {len(content['files']):5}  {_layout(content)}")
    print(f"{folders[0].parent}: sizes as recorded; powernap checkpoint verify reads the files")
    return 0


def verify(options: argparse.Namespace, _: list[str]) -> int:
    from tqdm import tqdm

    from powernap.parallel.checkpoint.manifest import CheckpointError
    from powernap.parallel.checkpoint.manifest import verify as read_all

    broken = 0
    for folder in _checkpoints(options):
        with tqdm(unit="B", unit_scale=True, desc=folder.name, leave=False, disable=not sys.stderr.isatty()) as bar:
            try:
                content, problem = read_all(folder, bar.update), None
            except CheckpointError as error:
                problem = str(error)
        if problem:
            broken += 1
            print(f"{folder.name}  BROKEN  {problem}")
        else:
            size = sum(file["bytes"] for file in content["files"].values())
            print(f"{folder.name}  whole   {size:,} bytes in {len(content['files'])} files")
    return 1 if broken else 0


def export(options: argparse.Namespace, _: list[str]) -> int:
    from powernap.parallel.checkpoint.reader import Checkpoint
    from powernap.train.generation.export import ExportError, check_new_folder
    from powernap.train.generation.export import export as write
    from powernap.train.run.folder import RunFolder

    folder = RunFolder(run_folder(options.run_name))
    check_new_folder(options.to)
    for option, given in (("--like", options.like), ("--remote-code", options.remote_code)):
        if given and options.format != "hf":
            raise ExportError(f"{option} is for --format hf")
    if options.like and options.remote_code:
        raise ExportError("--like keeps the source's class, which does not sleep: leave out --like or --remote-code")
    checkpoint = Checkpoint.open(_checkpoints(options)[0]) if options.step else folder.newest_checkpoint()
    registry = None
    if options.register is not None:
        from powernap.train.tracking.registry import Registry

        registry = Registry(folder.path, options.register)
    if options.ema:
        checkpoint = checkpoint.averaged()
    if options.remote_code:
        from powernap.train.hugging_face.with_code import export_with_code

        export_with_code(checkpoint, folder.recipe(), options.to)
    elif options.format == "hf":
        from powernap.train.hugging_face.export import export_hugging_face

        export_hugging_face(checkpoint, folder.recipe(), options.to, options.like)
    else:
        write(checkpoint, folder.recipe(), options.to)
    size = sum(file.stat().st_size for file in options.to.iterdir())
    print(f"{options.to}: the model after step {checkpoint.step:,}, {size:,} bytes")
    if registry:
        print(f"MLflow: {options.register}, version {registry.add(options.to, checkpoint.step)}")
    return 0


def _checkpoints(options: argparse.Namespace) -> list[Path]:
    """The folders of the run's checkpoints, or of the one of --step; at least one."""
    from powernap.parallel.checkpoint.manifest import CheckpointError, checkpoints, step_of
    from powernap.train.run.folder import RunFolder

    parent = RunFolder(run_folder(options.run_name)).checkpoints
    folders = checkpoints(parent)
    if not folders:
        raise CheckpointError(f"{parent}: no checkpoint yet")
    if options.step is None:
        return folders
    by_step = {step_of(folder): folder for folder in folders}
    if options.step not in by_step:
        raise CheckpointError(f"{parent}: none of step {options.step}: there are {', '.join(map(str, by_step))}")
    return [by_step[options.step]]


def _layout(content: dict) -> str:
    short = {"parallel.data": "DP", "parallel.tensor": "TP", "parallel.pipeline": "PP", "zero.stage": "ZeRO"}
    return " ".join(f"{short[name]}{size}" for name, size in content["layout"].items())


def _describe(content: dict) -> list[str]:
    import textwrap
    from math import prod

    parameters = content["parameters"]
    versions = ", ".join(f"{name} {version[:12]}" for name, version in content["versions"].items())
    states = sorted({kind for group in content["groups"] for kind in group["kinds"]})
    lanes = content.get("lanes")
    lines = [
        f"step        {content['step']:,}, written {content['written']}",
        f"layout      {_layout(content)}",
        *textwrap.wrap(f"versions    {versions}", 80, subsequent_indent=" " * 12, drop_whitespace=True),
        f"parameters  {len(parameters)} tensors, {sum(prod(entry['shape']) for entry in parameters.values()):,} numbers",
        f"optimizer   float32 master weights, {', '.join(states) or 'no states yet'}",
        f"lanes       {lanes['count']} with fast weights of blocks {', '.join(lanes['blocks'])}"
        if lanes
        else "lanes       none",
    ]
    for name, entry in parameters.items():
        split = f", split along {entry['split'][0]}" if entry["split"] else ""
        lines.append(f"  {name:50} {' x '.join(map(str, entry['shape']))}{split}")
    for name, entry in content["files"].items():
        lines.append(f"  {name:28} {entry['bytes']:>14,} bytes  sha256 {entry['sha256'][:16]}...")

    return lines
