"""Every example of docs/ and examples/ is run: written to files, installed as a package, used by the commands."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.decoder import Decoder
from powernap.model.sleep import sleep_and_predict
from powernap.train.data.build import build_task
from powernap.train.data.loader import evaluation_batches
from powernap.train.generation.generate import load_run
from powernap.train.recipe_file import load_recipe
from powernap.train.run.folder import RunFolder
from powernap.train.tasks import TASKS
from tests.helpers import runs, warm

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.M | re.S)


def examples(page: str) -> dict[str, str]:
    return dict(FENCE.findall((ROOT / "docs" / page).read_text()))


def install(folder: Path, files: dict[str, str], **groups: dict[str, str]) -> None:
    """As pip leaves a package: modules, and metadata that names the entry points."""
    for name, text in files.items():
        (folder / name).write_text(text)
    metadata = folder / "example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    lines = [
        line
        for group, points in groups.items()
        for line in [f"[powernap.{group}]", *(f"{n} = {v}" for n, v in points.items())]
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def python(folder: Path, *arguments: str, cwd: Path | None = None, **options):
    """Python with `folder` among its packages; a module's process has its libraries when it begins."""
    executable = warm.python() if arguments[0] == "-m" else sys.executable
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [executable, *arguments], cwd=cwd or folder, env=environment, text=True, capture_output=True, **options
    )


def powernap(folder: Path, *arguments: str, cwd: Path | None = None) -> str:
    result = python(folder, "-m", "powernap.launch.cli", *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


TINY = [
    "model.pattern=AG", "model.hidden_size=16", "model.mlp.ffn_hidden_size=16", "model.attention.heads=1",
    "model.gdn={heads: 1, key_dim: 8, value_dim: 8}", "train.steps=2", "train.global_batch_size=4",
    "train.micro_batch_size=null", "optimizer.warmup_steps=1", "evaluation.samples=8", "evaluation.every=null",
    "parallel.data=1", "data.lanes=1", "checkpoint.every=2",
]  # fmt: skip


@pytest.mark.wide  # test_walks.py has a task in the current folder
def test_a_task_in_a_package_of_its_own(tmp_path):
    """examples/parity_task: installed by pip, built, trained, evaluated, generated from in words."""
    source, packages = tmp_path / "source", tmp_path / "packages"
    shutil.copytree(ROOT / "examples" / "parity_task", source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(packages), str(source)], check=True)
    sizes = ["--train-samples", "40", "--test-samples", "16"]
    powernap(packages, "data", "build", "parity", "data", *sizes, "--workers", "1", cwd=tmp_path)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["task"] == "parity" and manifest["fields"] == {"rows": 2, "width": 8}
    shards = ["data.train=data/train-*.tar", "data.test=data/test-*.tar", "data.sequence_length=19"]
    sizes = ["model.vocab_size=11", "model.window=8", "model.pad_token_id=0"]
    powernap(packages, "train", "demo", "run.name=parity", *TINY, *shards, *sizes, cwd=tmp_path)
    powernap(packages, "eval", "runs/parity", cwd=tmp_path)
    powernap(packages, "report", "runs/parity", cwd=tmp_path)
    assert re.search(r"right at \d bits", (tmp_path / "runs" / "report" / "report.md").read_text())
    said = powernap(
        packages, "generate", "runs/parity", "--prompt", "0 1 1 0 1 0 0 1", "--max-tokens", "3", cwd=tmp_path
    )
    assert re.search(r"(\[bits \d\]|[01]|\[pad\])( (\[bits \d\]|[01]|\[pad\])){2}", said)
    # Without the package the run's tokens are numbers, and its data can still be looked at.
    shown = powernap(tmp_path, "data", "inspect", "data", "--samples", "1", cwd=tmp_path)
    assert "tokens are shown as numbers: manifest.json: no task 'parity'" in shown
    # By its path instead of its entry point.
    (tmp_path / "plain").mkdir()
    shutil.copy(source / "parity_task.py", tmp_path / "plain")
    powernap(
        tmp_path / "plain", "data", "build", "parity_task:Parity", "by_path", "rows=1",
        "--train-samples", "8", "--test-samples", "8", "--workers", "1", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "by_path" / "manifest.json").read_text())["task"] == "parity_task:Parity"


def test_a_mixer_of_another_package_holds_what_every_mixer_must(tmp_path):
    install(
        tmp_path,
        {"retention.py": examples("extending.md")["retention.py"]},
        mixers={"retention": "retention:Retention"},
    )
    tests = str(ROOT / "tests" / "model" / "mixers" / "test_every_mixer.py")
    result = python(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "test_holds and R]", cwd=ROOT
    )
    assert result.returncode == 0 and "8 passed" in result.stdout, result.stdout[-3000:]


def test_a_tracker_of_another_package_follows_a_run(tmp_path):
    files = {
        "csv_tracker.py": examples("extending.md")["csv_tracker.py"],
        "broken_tracker.py": "def Broken(*_):\n    raise OSError('no route to the server')\n",
    }
    install(tmp_path, files, trackers={"csv": "csv_tracker:CsvTracker", "broken": "broken_tracker:Broken"})
    runs.prepare(tmp_path, train_samples=128, train={"steps": 3, "global_batch_size": 4, "log_every": 1})
    said = powernap(tmp_path, "train", "tiny.yaml", "run.trackers=[csv, broken]", "checkpoint.every=3")
    rows = (tmp_path / "runs" / "tiny" / "losses.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
    assert said.count("tracker broken failed, the run continues: OSError: no route to the server") == 1
    result = python(tmp_path, "-m", "powernap.launch.cli", "train", "tiny.yaml", "run.trackers=[cvs]")
    assert (
        result.returncode == 2
        and "run.trackers=['cvs']: no tracker 'cvs': installed are mlflow, broken, csv" in result.stderr
    )


@pytest.mark.wide  # two layouts; docs/extending.md is walked too
def test_an_optimizer_and_a_schedule_of_another_package_train_in_every_layout(tmp_path):
    """Lion under a schedule of its own, on two ranks with ZeRO 1; resumed on one it ends with the same numbers as there alone."""
    page = examples("extending.md")
    install(
        tmp_path, {name: page[name] for name in ("lion.py", "halving.py")},
        optimizers={"lion": "lion:Lion"}, schedules={"halving": "halving:halving"},
    )  # fmt: skip
    runs.prepare(
        tmp_path, train_samples=128, train={"steps": 4, "global_batch_size": 4, "log_every": 1}, checkpoint={"every": 2},
        optimizer={"name": "lion", "schedule": "halving", "lr": 1e-4},
    )  # fmt: skip
    powernap(tmp_path, "train", "tiny.yaml", "run.name=alone")
    powernap(tmp_path, "train", "tiny.yaml", "run.name=two", "parallel.data=2")
    losses, rates = {}, {}
    for name in ("alone", "two"):
        rows = [json.loads(row) for row in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses[name], rates[name] = [row["loss"] for row in rows], [row["lr"] for row in rows]
    assert losses["alone"] == pytest.approx(losses["two"], rel=1e-5) and len(set(losses["alone"])) == 4
    assert rates["alone"] == pytest.approx([1e-4 * min(1, step / 2) * 0.5 ** (step - 1) for step in (1, 2, 3, 4)])
    shutil.rmtree(tmp_path / "runs" / "two" / "checkpoints" / "step_00000004")
    powernap(tmp_path, "train", "tiny.yaml", "run.name=two", "--resume")
    again = [json.loads(row)["loss"] for row in (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()]
    assert again == pytest.approx(losses["alone"], rel=1e-5)
    counted = [
        json.loads(powernap(tmp_path, "plan", "tiny.yaml", f"optimizer.name={name}", "--json"))["stages"][0]["memory"]
        for name in ("lion", "adamw")
    ]
    assert counted[0]["optimizer"] / counted[1]["optimizer"] == pytest.approx(1 / 2, rel=0.01)


def test_a_cluster_of_another_package_takes_jobs(tmp_path):
    install(
        tmp_path, {"spool_cluster.py": examples("extending.md")["spool_cluster.py"]}, clusters={"spool": "spool_cluster:SpoolCluster"}
    )  # fmt: skip
    runs.prepare(tmp_path, train_samples=128)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "mine.yaml").write_text("kind: spool\nfolder: queue\n")
    refused = python(tmp_path, "-m", "powernap.launch.cli", "submit", "tiny.yaml", "--on", "mine")
    assert refused.returncode == 2 and "folder=queue: not there: start the daemon first" in refused.stderr
    (tmp_path / "queue").mkdir()
    powernap(tmp_path, "submit", "tiny.yaml", "--on", "mine")
    (job,) = (tmp_path / "queue").glob("*.job")
    assert "train" in job.read_text() and "--auto-resume" in job.read_text()
    assert "waiting" in powernap(tmp_path, "status", "tiny")
    job.with_suffix(".state").write_text("running\n")
    assert "running" in powernap(tmp_path, "status", "tiny")
    powernap(tmp_path, "cancel", "tiny")
    assert "cancelled" in powernap(tmp_path, "status", "tiny")


@pytest.mark.parametrize(
    ("run", "script", "command"),
    [
        pytest.param("mine", "write_shards.py", "train.sh", marks=pytest.mark.wide),
        pytest.param("documents", "write_documents.py", "train_documents.sh", marks=pytest.mark.wide),
    ],
)
def test_shards_of_ones_own(tmp_path, run, script, command):
    files = examples("data.md")
    (tmp_path / script).write_text(files[script])
    assert python(tmp_path, script).returncode == 0
    command = files[command].replace("\\\n", " ")
    (tmp_path / "powernap").write_text(f'#!/bin/sh\nexec {warm.python()} -m powernap.launch.cli "$@"\n')
    (tmp_path / "powernap").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert len((tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("files", "groups", "message"),
    [
        ({"a.py": "import nowhere"}, {"mixers": {"a": "a:A"}}, "entry point a = a:A in powernap.mixers (package example): cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ({"a.py": "A = 3"}, {"mixers": {"a": "a:A"}}, "entry point a of powernap.mixers: 3 is no class derived from powernap.model.part.Mixer"),
        (
            {"a.py": "from powernap.model.mixers.attention import Attention\nclass A(Attention):\n    section = 'other'"},
            {"mixers": {"a": "a:A"}},
            "letter A and section other must differ from those of attention (A, attention)",
        ),
        (
            {"a.py": "from powernap.model.part import Mixer\nclass A(Mixer):\n    letter, title, section = 'Z', 'a', 'a'"},
            {"mixers": {"a": "a:A"}},
            "entry point a of powernap.mixers: A lacks activation_bytes, decode, flops, forward, split_sizes, weights, "
            "state_shape, which has_fast_weights needs",
        ),
        ({"a.py": "A = 3"}, {"clusters": {"slurm": "a:A"}}, "entry point slurm of powernap.clusters: must be a new name"),
    ],
)  # fmt: skip
def test_a_package_that_does_not_fit_is_named(tmp_path, files, groups, message):
    install(tmp_path, files, **groups)
    runs.prepare(tmp_path, train_samples=128)
    result = python(tmp_path, "-m", "powernap.launch.cli", "submit", "tiny.yaml", "--on", "local", "--dry-run")
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def load_example(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_each_pass_reads_and_writes(tmp_path, topology, monkeypatch, capsys):
    """On weights that were drawn and not trained; and the classifier on what it can and cannot decode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    inside = load_example(ROOT / "examples" / "inside" / "inside.py")
    inside.WORDS = 80
    (tmp_path / "train-0.tar").touch()
    run = RunFolder(tmp_path / "runs" / "mine")
    run.create(load_recipe("track", ["run.name=mine", "data.train=train-0.tar", "data.test=null"]))
    runs.write_drawn(run, topology)
    inside.main([run.path])
    said = capsys.readouterr().out
    assert "mine: which of the six permutations?" in said and (tmp_path / "inside.png").exists()
    other = RunFolder(tmp_path / "runs" / "other")
    other.create(
        load_recipe("track", ["run.name=other", "data.train=train-0.tar", "data.test=null", "model.vocab_size=14"])
    )
    runs.write_drawn(other, topology)
    with pytest.raises(SystemExit, match="other: write a run of task track with group=s3 moves=1"):
        inside.main([other.path])
    places = [line[:24].strip() for line in said.splitlines()[2:6]]
    assert places == [f"pass {n}, {what}" for n in (1, 2) for what in ("hidden states", "fast weights")]
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=4000)
    seen = np.eye(6)[labels] @ rng.normal(size=(6, 12)) + 0.1 * rng.normal(size=(4000, 12))
    assert inside.decoded(seen, labels) > 0.99 and inside.decoded(rng.normal(size=(4000, 12)), labels) < 0.25
    task = inside.Track(asked="each", windows=8, min_windows=8)
    tokens, _, probes, permutations = inside.words(task, seed=1)
    assert len(probes) == 8 and permutations.shape == (80, 9) and permutations.max() == 5
    answers = tokens[:, [stop - 1 for _, stop in probes]] - task.first_element
    asked = tokens[:, [start for start, _ in probes]] - task.first_question
    for window in range(1, 9):  # the same permutation and question have the same answer
        pairs = {
            (int(p), int(q)): int(a)
            for p, q, a in zip(permutations[:, window], asked[:, window - 1], answers[:, window - 1], strict=True)
        }
        assert all(
            pairs[int(p), int(q)] == int(a)
            for p, q, a in zip(permutations[:, window], asked[:, window - 1], answers[:, window - 1], strict=True)
        )


def drawn_run(folder: Path, topology, name: str, sizes: dict, *overrides: str) -> RunFolder:
    """Shards of a task, and a run of recipe track with weights that were drawn and not trained."""
    task = TASKS[name](**sizes)
    shards = {"train_samples": 1, "test_samples": 6, "samples_per_shard": 6, "seed": 0, "workers": 1}
    build_task(name, task, folder / "data", **shards)
    run = RunFolder(folder / "runs" / "mine")
    data = [f"data.{split}={folder}/data/{split}-*.tar" for split in ("train", "test")]
    length = f"data.sequence_length={task.sequence_length}"
    run.create(load_recipe("track", ["run.name=mine", *data, length, *overrides]))
    runs.write_drawn(run, topology)
    return run


@contextmanager
@torch.no_grad()
def remembering(decoder):
    """Decoder.forgetting, broken: what is read inside stays."""
    if decoder._is_full(0):
        decoder._sleep(range(decoder.batch))
    yield


@pytest.mark.parametrize(("asked", "broken"), [("each", False), ("end", False), ("each", True)])
def test_watching_a_sleep(tmp_path, topology, monkeypatch, capsys, asked, broken):
    """What is read from the states after the last pass is what evaluation reads; not so if a probe leaves a trace."""
    watch = load_example(ROOT / "examples" / "watch" / "watch.py")
    sizes = {"windows": 5, "min_windows": 2, "asked": asked}
    run = drawn_run(tmp_path, topology, "track", sizes, "model.pattern=GAG")
    recipe, model = run.recipe(), load_run(run.path)
    if broken:
        monkeypatch.setattr(Decoder, "forgetting", remembering)
    task, windows = watch.read_word(run.path, 3)
    moments = {(moment.window, moment.passes): moment for moment in watch.watch(model, task, windows)}

    *_, batch = evaluation_batches(recipe.data, batch_size=1, vocab_size=10, rank=0, world_size=1, limit=4)
    (tokens,), (answers,) = batch.tokens.tolist(), batch.answers
    assert 2 <= len(windows) < 5, "a word with pads"
    different = 0.0
    for passes in (1, 2, 3):
        plan = plan_segments(batch.tokens, batch.loss_mask, recipe.model, recipe.sleep, passes, batch.probes)
        with torch.no_grad():
            output = sleep_and_predict(model.stage, plan, batch.tokens, batch.loss_mask, predict=True)
        for start, _, depth in answers.tolist():
            if passes != 2 and depth > 1:  # N passes go on to the next window
                continue
            element, moment = tokens[start - 1] - task.first_question, moments[depth - 1, passes]
            assert moment.right[element] == task.token_name(tokens[start])
            different += abs(moment.shares[element] - float((-output.token_losses[0, start]).exp()))
            if not broken:
                assert moment.answers[element] == task.token_name(int(output.predictions[0, start]))
    assert (different > 1e-5) == broken, different
    if broken:
        return

    for window in range(1, len(windows)):
        before, left = moments[window, 0], moments[window - 1, 2]
        assert all(torch.equal(before.states[block], left.states[block]) for block in (0, 2))
        assert before.shares != moments[window, 2].shares and before.moved == {}
        new = moments[window, 1].states[0]
        assert moments[window, 1].moved[0] == pytest.approx(float((new - before.states[0]).norm() / new.norm()))
    capsys.readouterr()
    watch.main([str(run.path), "--to", str(tmp_path / "watch.png")])
    answered, *others = capsys.readouterr().out.split("\n\n")
    assert "mine, N=2, sample 3 of the test" in answered
    assert [table[:8] for table in others] == ["Block 0:", "Block 2:", "Picture:"]
    rows = answered.strip().splitlines()[2:]
    assert len(rows) == len(windows)
    for number, row in enumerate(rows):
        moment = moments[number, 2]
        assert f"{' '.join(moment.answers)} {np.mean(moment.shares):6.1%}" in row and row.startswith(f"{number + 1} ")
    assert (tmp_path / "watch.png").stat().st_size > 10_000


def test_what_is_watched_is_counted(monkeypatch, capsys):
    """Two samples: the old places before; after pass 1 the new ones in the second sample alone; after pass 2 in both."""
    watch = load_example(ROOT / "examples" / "watch" / "watch.py")
    places = [["1", "2"], ["2", "1"], ["1", "2"]]

    def moments(_, sample):
        written = 2 - sample  # the pass that writes the new places
        return [
            watch.Moment(
                window, passes, [], right, right if passes >= written else places[window - 1], [], {}, {0: passes / 4}
            )
            for window, right in enumerate(places)
            for passes in range(3)
        ]

    for name, stand_in in {"load_run": str, "read_word": lambda _, sample: (sample,), "watch": moments}.items():
        monkeypatch.setattr(watch, name, stand_in)
    monkeypatch.setitem(sys.modules, "watch", watch)
    load_example(ROOT / "examples" / "watch" / "many.py").main(Path("mine"), 2)
    assert capsys.readouterr().out.splitlines() == [
        "pass 0: new places 0%, old ones 100%, moved by 0%, 4 windows",
        "pass 1: new places 50%, old ones 50%, moved by 25%, 4 windows",
        "pass 2: new places 100%, old ones 0%, moved by 50%, 4 windows",
    ]


def test_what_cannot_be_watched_is_one_line(tmp_path, topology):
    watch = load_example(ROOT / "examples" / "watch" / "watch.py")
    none = drawn_run(tmp_path / "none", topology, "track", {}, "model.pattern=AA", "sleep.passes=1")
    other = drawn_run(
        tmp_path / "other", topology, "depo", {"nodes": 6, "max_hop": 2, "queries": 1}, "model.vocab_size=40"
    )
    run = drawn_run(tmp_path / "run", topology, "track", {})
    for arguments, message in [
        ([tmp_path / "nowhere"], "nowhere: no run there"),
        ([none.path], "write a run with fast weights and model.window=2"),
        ([other.path], "write a run of task track with data.test, such as runs/demo/sleep"),
        ([run.path, "--sample=6"], "--sample 6: the test has no such sample; they count from 0"),
        ([run.path, "--sample=-1"], "--sample -1: the test has no such sample"),
        ([run.path, f"--to={tmp_path}/nowhere/watch.png"], "no folder .*nowhere: make it first"),
        ([run.path, "--to=watch.txt"], "--to watch.txt: write a name that ends in .png"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            watch.main([str(argument) for argument in arguments])
        assert "\n" not in str(error.value)
