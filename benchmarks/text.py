"""Does sleep help a small model of language? Bits per byte by window of the document, fast weights carried through it.

The prose is Perl's manual (Debian's package perl-doc): 207 documents of 16 kB in the median, 9 MB in all, a byte a token.
Shards and runs are kept in a folder: when stopped, the same command continues; finished runs are only read. The page of
the seeds that are done so far can be written at any time with --page.
"""

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import common, study
from benchmarks.common import ROOT, table, write
from benchmarks.study import Model, Run, Study, interval_over_seeds
from powernap.parallel.planning.plan import in_units
from powernap.train.evaluation.pictures import new_figure
from powernap.train.run.folder import RunFolder

PROSE = Path("/usr/share/perl")
N1, N4 = ("sleep.passes=1",), ("sleep.passes=4",)
TEXT = Study(
    name="text",
    title="Perl's manual, a byte a token, windows of 64, fast weights carried to the end of each document",
    recipe="prose",
    task="text",
    sizes=("tokenizer=bytes", "window=64", "windows=4", "documents=whole", "test_share=0.1", "--shard-size=0.5MB"),
    train_samples=None,
    test_samples=0,
    longer=(),
    models=(
        Model("N=2"),
        Model("N=1, as many bytes", N1, cost=None),
        Model("N=1, as many FLOPs", N1),
        Model("N=4, as many bytes", N4, cost=None),
        Model("N=4, as many FLOPs", N4),
        Model("N=2, nothing carried", ("sleep.carry=false",), cost=None),
    ),
    claims=(),
    about=(
        "Every window is read once awake, with the loss, and then slept on; the last window of a document too. A tenth of the",
        "documents is held out. Loss tokens are the bytes and one end of each document; a bit per byte is a loss of ln 2.",
    ),
)
CLAIMS = (  # sentence, the better model, the other
    ("N=2 is better than N=1 after as many bytes", "N=2", "N=1, as many bytes"),
    ("... and after as many FLOPs", "N=2", "N=1, as many FLOPs"),
    ("N=4 is better than N=2 after as many bytes", "N=4, as many bytes", "N=2"),
    ("... and after as many FLOPs", "N=4, as many FLOPs", "N=2"),
    ("what is carried helps", "N=2", "N=2, nothing carried"),
)
WHOLE = "all"  # windows


@dataclass(frozen=True, kw_only=True)
class Trained(Run):
    """A model of a seed, trained and evaluated at its own N."""

    bytes: int  # read in training
    bits: dict[str, float]  # windows of the document -> bits per byte


def main(options: argparse.Namespace, command: str) -> None:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            gather((ROOT / "train").rglob("*.py"), Path(folder))
            small = of_folder(Path(folder), "--shard-size=0.005MB")
            study.measure(small, Path(folder), seeds=1, jobs=options.jobs, steps=2)
            print("\n".join(describe(study.finished(TEXT, Path(folder), read))))
        return
    home = (options.folder or study.FOLDER) / TEXT.name
    if not options.page:
        files = sorted(PROSE.glob("*/pod/*.pod"))
        if not files:
            sys.exit(f"no {PROSE}/*/pod/*.pod: apt-get install perl-doc")
        gather(files, home)
        study.measure(of_folder(home), home, study.SEEDS, options.jobs)
    trained = study.finished(TEXT, home, read)
    draw(trained, common.RESULTS / "text.png")
    write("text", command, {"trained": [asdict(one) for one in trained]}, describe(trained), clock="no times")


def gather(files: Iterable[Path], home: Path) -> None:
    """Copy the documents to home/prose as .txt, which `data build` reads."""
    prose = home / "prose"
    prose.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, prose / f"{file.stem}.txt")


def of_folder(home: Path, *sizes: str) -> Study:
    """The study of the documents in `home`, with other sizes of `data build`."""
    return replace(TEXT, sizes=(f"inputs={home}/prose", *TEXT.sizes, *sizes))


def read(path: Path, seed: int, model: Model) -> Trained:
    """The results in a finished run's folder."""
    run, evaluation = study.run_of(path, seed, model)
    recipe, passes = RunFolder(path).recipe(), str(run.passes)
    losses = {WHOLE: evaluation["loss"][passes], **evaluation["loss_by_window"][passes]}
    return Trained(
        **asdict(run),
        bytes=run.steps * recipe.train.global_batch_size * (recipe.data.sequence_length - 1),
        bits={windows: loss / math.log(2) for windows, loss in losses.items()},
    )


def by_model(trained: list[Trained]) -> dict[str, list[Trained]]:
    return {m.name: same for m in TEXT.models if (same := [one for one in trained if one.model == m.name])}


def describe(trained: list[Trained]) -> list[str]:
    """The page: everything in it is from TEXT and `trained` alone."""
    seeds = list(dict.fromkeys(one.seed for one in trained))
    rows, costs = [], []
    for name, same in by_model(trained).items():
        means = [statistics.fmean(one.bits[windows] for one in same) for windows in same[0].bits]
        rows.append([name if len(same) == len(seeds) else f"{name} ({len(same)} of {len(seeds)} seeds)", *means])
        one = same[0]
        costs.append(
            [name, one.passes, in_units(one.parameters), one.steps, in_units(one.bytes), f"{one.flops / 1e12:.2f}"]
        )
    commits = ", ".join(sorted({one.commit for one in trained}))
    return [
        f"**{TEXT.title}**",
        "",
        f"Recipe `{TEXT.recipe}`, shards `text {' '.join(TEXT.sizes)}`. Seeds {', '.join(map(str, seeds))}, drawn after the "
        "sizes were fixed." + (" One seed is a pilot." if len(seeds) == 1 else ""),
        "",
        *TEXT.about,
        "",
        *claims_table(trained),
        "![Bits per byte by window of the document, a line for each model](text.png)",
        "",
        "## Bits per held-out byte, by window of the document",
        "",
        *table(["", *trained[0].bits], [[row[0], *(f"{value:.3f}" for value in row[1:])] for row in rows], left=1),
        "",
        "## Cost",
        "",
        *table(["model", "N", "parameters", "steps", "bytes", "training TFLOPs"], costs, left=1),
        "",
        f"Commits of the runs: {commits}.",
        "",
    ]  # fmt: skip


def claims_table(trained: list[Trained]) -> list[str]:
    """How many bits each claim's better model is below the other, by seed."""
    found = {(one.seed, one.model): one.bits[WHOLE] for one in trained}
    rows = []
    for sentence, better, other in CLAIMS:
        bits = [
            found[seed, other] - found[seed, better]
            for seed, model in found
            if model == better and (seed, other) in found
        ]
        if bits:
            shown = ", ".join(f"{value:+.3f}" for value in bits)
            rows.append([sentence, shown, interval_over_seeds(bits, 3), "yes" if min(bits) > 0 else "NO"])
    columns = ["claim", "bits per byte saved, by seed", "mean, 95 % (t)", "in every seed"]
    return ["## Claims", "", *table(columns, rows, left=1), ""] if rows else []


def draw(trained: list[Trained], to: Path) -> None:
    """The mean of the seeds over the windows of a document."""
    figure, axes = new_figure()
    for name, same in by_model(trained).items():
        windows = [name for name in same[0].bits if name != WHOLE]
        axes.plot(windows, [statistics.fmean(one.bits[w] for one in same) for w in windows], "o-", ms=3, label=name)
    axes.set_xlabel("window of the document")
    axes.set_ylabel("bits per held-out byte")
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(to, dpi=120)
