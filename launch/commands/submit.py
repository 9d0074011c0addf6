"""powernap submit: a run, or a build of shards in parts, as jobs on this machine, SLURM or Kubernetes."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from powernap.launch.commands.arguments import add_recipe, count

if TYPE_CHECKING:
    from powernap.launch.jobs.job import Job
    from powernap.launch.jobs.submission import Submission


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "submit",
        help="train a recipe, or build shards, as a job: local, SLURM, Kubernetes",
        description="Train a recipe as a job that is restarted after preemption and failures. job.NAME=VALUE requests "
        "resources of the cluster; values separated by commas make a sweep. After a failure the same command resumes "
        "the run. A copy of everything submitted is kept in runs/NAME/jobs/. With --build the jobs are the parts of a build of shards, on "
        "this machine one after another, on SLURM an array, on Kubernetes a JobSet each; the part that ends last writes the manifest.",
        epilog="examples: powernap submit demo --on local run.name=mine; powernap submit demo --on slurm job.nodes=2 "
        "job.time=2h sleep.passes=1,2,4 run.seed=0,1; powernap submit --on slurm --parts 64 job.time=2h job.cpus_per_process=16 "
        "--build text /shared/text inputs=/shared/corpus",
    )
    add_recipe(parser, or_else=" (none with --build)")
    parser.add_argument(
        "--on", metavar="CLUSTER", required=True, help="a profile: clusters/CLUSTER.yaml, its file, or local"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, but do not submit it")
    parser.add_argument("--resume", action="store_true", help="continue a run that was started without submit")
    parser.add_argument("--json", action="store_true", help="print the submitted jobs as JSON")
    parser.add_argument("--parts", type=count, metavar="N", help="of a build: jobs that share it (default: 1)")
    parser.add_argument(
        "--build",
        nargs=argparse.REMAINDER,
        metavar="TASK FOLDER key=value",
        help="in place of a recipe, as the last option: what follows `powernap data build`. Submitted again, it builds what is missing",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, typed: list[str]) -> int:
    from powernap.launch.jobs.submission import submit_all

    submission = _prepare(options, typed)
    for note in dict.fromkeys(note for job in submission.jobs_to_start for note in _notes_on(job)):
        print(f"powernap: note: {note}", file=sys.stderr)
    if options.dry_run:
        for group, files in submission.rendered():
            folder = submission.folder_of(group).path
            if command := submission.backend.command(group, folder):
                print(f"# {shlex.join(command)}", file=sys.stderr)
            for name, text in files.items():
                print(f"# {folder / name}", file=sys.stderr, flush=True)
                print(text, end="" if text.endswith("\n") else "\n", flush=True)
        return 0
    records = submit_all(submission)
    for note in _notes(records[0].folder.path / "code.diff"):
        print(f"powernap: code.diff: {note}", file=sys.stderr)
    if options.json:
        print(json.dumps([{"run": record.run, "id": record.id} for record in records], indent=2))
        return 0
    for record in records:
        print(f"{record.run}: job {record.id} on {options.on}")
    name = submission.folder.name
    print(f"powernap status {name} shows its state, powernap logs -f {records[0].run} follows its output")

    return 0


def _prepare(options: argparse.Namespace, typed: list[str]) -> "Submission":
    from powernap.launch.jobs.cluster import find_cluster
    from powernap.launch.jobs.description import JobError
    from powernap.launch.jobs.submission import prepare_build, prepare_submission

    if options.build is None:
        if options.parts is not None:
            raise JobError("--parts without --build: a run has no parts; values separated by commas make a sweep")
        if options.recipe is None:
            raise JobError("RECIPE is missing, such as powernap submit demo --on local; or --build TASK FOLDER")
        return prepare_submission(options.recipe, options.overrides, options.on, options.resume, typed)
    from powernap.launch.cli import parse
    from powernap.launch.commands.data import source_of

    before = [*([options.recipe] if options.recipe else []), *options.overrides]
    for word in before:
        if not word.startswith("job."):
            raise JobError(f"{word:.60} with --build: write job.NAME=VALUE before it, and what is built after it")
    if options.resume:
        raise JobError("--resume with --build: the same command builds what is missing; leave it out")
    words = [word for word in options.build if not word.startswith("job.")]
    build = parse(["data", "build", *words])
    if build.part:
        raise JobError("--part in --build: each job gets its own; write --parts N before --build")
    overrides = [*before, *(word for word in options.build if word.startswith("job."))]
    source = source_of(build, find_cluster(options.on).files)
    return prepare_build(words, build.folder, source, options.parts or 1, overrides, options.on, typed)


def _notes_on(job: "Job") -> Iterator[str]:
    """What is allowed, and perhaps not meant."""
    from powernap.launch.jobs.job import TrainingJob
    from powernap.train.data.check import epochs

    if not isinstance(job, TrainingJob):
        return
    if job.recipe.train.precision == "bf16" and job.description.device == "cpu":
        yield "bf16 without a GPU: job.device=gpu requests one for each rank"
    if job.cluster.files != "elsewhere" and (read := epochs(job.recipe)):
        yield read


def _notes(patch: Path) -> list[str]:
    """Notes at the head of code.diff about the changes it leaves out."""
    lines = patch.read_bytes().splitlines() if patch.is_file() else []
    return [line[2:].decode(errors="replace") for line in takewhile(lambda line: line.startswith(b"# "), lines)]
