"""The command: fast help, mistakes answered in one line before any process starts."""

import ast
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powernap.launch import cli, torchrun
from powernap.model.errors import PowernapError
from tests.helpers import runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    runs.prepare(folder, train_samples=64)
    return folder


COMMANDS = [
    "",
    "train",
    "plan",
    "submit",
    "status",
    "logs",
    "wait",
    "cancel",
    "list",
    "eval",
    "report",
    "generate",
    "import",
    "data",
    "data build",
    "data inspect",
    "compare",
    "sync",
    "ui",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_under_a_second_and_80_columns(tmp_path, command):
    with runs.seconds_of_commands_below(1.0):
        result = runs.powernap(*command.split(), "--help", cwd=tmp_path, COLUMNS="80")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: powernap {command}".rstrip())
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_checking_a_recipe_does_not_import_torch():
    code = "import sys; from powernap.train.recipe_file import load_recipe; load_recipe('demo'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.patern=AG"], ["model.patern", "did you mean model.pattern?"]),
        (["passes=4"], ["passes", "did you mean sleep.passes?"]),
        (["trian.steps=4"], ["trian", "did you mean train"]),
        (["train.steps=many"], ["train.steps=many", "integer"]),
        (["train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
        (["train.steps"], ["train.steps", "key=value"]),
        (["sleep.passes=0"], ["sleep.passes=0", "N, passes over a consolidation window"]),
        (["sleep.passes=[]"], ["sleep.passes=[]"]),
        (["model.pattern=AX"], ["model.pattern=AX", "use only the letters A, G", "A attention, G gated delta net"]),
        (["optimizer.name=lino"], ["no optimizer 'lino'", "adamw, muon"]),
        (["optimizer.schedule=cos"], ["no schedule 'cos'", "wsd"]),
        (["model.attention.heads=5"], ["attention.heads=5", "hidden_size=32"]),
        (["sleep.loop_range=[0,3]"], ["loop_range=[0, 3]", "2"]),
        (["sleep.loop_range=[0,1]"], ["loop_range=[0, 1]", "block with fast weights (G"]),
        (["model.vocab_size=10"], ["model.vocab_size", "15"]),
        (["data.sequence_length=20"], ["data.sequence_length=20", "24"]),
        (["model.window=7"], ["model.window=7", "12"]),
        (["data.train=nowhere/*.tar"], ["nowhere/*.tar"]),
        (["data.train=[]"], ["data.train"]),
        (["data.lanes=4"], ["data.lanes", "1"]),
        (["parallel.data=2", "train.global_batch_size=3"], ["train.global_batch_size=3", "parallel.data=2"]),
        (["train.micro_batch_size=3"], ["train.micro_batch_size=3", "16"]),
        (["parallel.tensor=4"], ["attention.heads=2", "parallel.tensor=4", "4 would be"]),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "model.window=11"],
            ["model.window=11", "parallel.tensor=2", "12 would be"],
        ),
        (["parallel.data=2", "zero.stage=3", "optimizer.name=muon"], ["optimizer.name=muon", "zero.stage=2", "adamw"]),
        (["parallel.pipeline=3"], ["parallel.pipeline=3", "use at most 2"]),
        (["parallel.pipeline=2", "parallel.pipeline_layout=A|GG"], ["parallel.pipeline_layout=A|GG", "write A|G"]),
        (["parallel.pipeline=2", "train.micro_batch_size=16"], ["train.micro_batch_size=16", "1, 2, 4, 8 would do"]),
        (["parallel.pipeline=2", "train.global_batch_size=15"], ["parallel.pipeline=2", "train.global_batch_size=16"]),
        (["parallel.pipeline=2", "zero.stage=2"], ["zero.stage=2", "use zero.stage=1"]),
        (["parallel.pipeline=2", "zero.stage=3"], ["zero.stage=3", "use zero.stage=1"]),
        (["zero.stage=0"], ["zero.stage=0", "use 1"]),
        (["train.recompute=layers"], ["train.recompute=layers", "nested"]),
        (
            ["train.recompute=none", "train.offload_inputs=true"],
            ["offload_inputs=true", "recompute=none", "train.recompute=segment"],
        ),
        (["train.recompute=selective", "zero.stage=3"], ["train.recompute=selective", "zero.stage=3", "blocks"]),
        (["optimizer.betas=[0.9,1.5]"], ["optimizer.betas", "[0, 1)"]),
        (["run.name=a/b"], ["run.name=a/b"]),
        (["run.experiment=" + 501 * "x"], ["run.experiment=", "at most 500 characters"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(folder, capfd, monkeypatch, overrides, words):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    runs.assert_refused(["train", "tiny.yaml", "data.lanes=1", *overrides], capfd, *words)
    assert sorted(folder.rglob("*")) == before  # nothing written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "demmo"], ["demmo", "did you mean demo?"]),
        (["train", "tiny.yaml", "--resume"], ["nothing to resume"]),
        (["eval", "nobody"], ["no run 'nobody'"]),
        (["generate", "nobody", "--prompt", "a"], ["no run 'nobody'"]),
        (["compare", "nobody", "nobody"], ["no run 'nobody'"]),
        (["sync", "nobody"], ["no run 'nobody'"]),
        (["ui", "--root", "nowhere"], ["--root nowhere: no such folder"]),
        (["data", "build", "depot", "x"], ["no task 'depot'", "depo, gsm, program, rule110"]),
        (["data", "build", "depo", "x", "nods=8"], ["nods", "did you mean nodes?"]),
        (["data", "build", "depo", "x", "--seed", "1", "nods=8"], ["nods", "did you mean nodes?"]),
        (
            ["data", "build", "text", "x", "inputs=y", "--seed", "1"],
            ["--seed: text is read whole; --shard-size divides"],
        ),
        (["data", "build", "depo", "x", "--shard-size", "1MB"], ["--shard-size: depo is drawn; --samples-per-shard"]),
        (["data", "inspect", "nowhere"], ["SHARDS=nowhere: no such file"]),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_other_commands_too(folder, capfd, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    runs.assert_refused(arguments, capfd, *words)


def test_a_damaged_metrics_file_is_a_mistake_and_no_difference(folder, capfd, monkeypatch):
    """Exit code 1 of compare means that two runs differ."""
    monkeypatch.chdir(folder)
    for name in ("damaged", "other"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnothing\n{"step": 3}\n')
    runs.assert_refused(["compare", "damaged", "other"], capfd, "metrics.jsonl, line 2: not a JSON object")


def test_an_error_of_an_extension_is_one_line_too(capfd, monkeypatch):
    class OtherPeoplesError(PowernapError):
        exit_code = 17

    def fail(*_):
        raise OtherPeoplesError("their.field=3:\nwrite 4")

    monkeypatch.setattr("powernap.launch.commands.list_jobs.run", fail)
    assert cli.main(["list"]) == 17
    assert capfd.readouterr().err == "powernap: error: their.field=3: write 4\n"


def test_every_error_of_ours_has_the_one_base():
    """Found in the source: importing all modules takes long. The names with an underscore never leave their module."""
    errors = {
        f"{path.name}: {node.name}": [ast.unparse(base) for base in node.bases]
        for room in ("model", "parallel", "train", "launch")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_")
    }
    known = {"PowernapError", *(name.split(": ")[1] for name in errors)}
    assert len(errors) > 15
    assert [name for name, bases in errors.items() if not known & {*bases}] == ["errors.py: PowernapError"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *((["generate", "x", "--prompt", "a", option, value], [option, f"'{value}'", "write a"]) for option, value in (
            ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.1"),
            ("--seed", str(2**64)), ("--seed", "-1"), ("--max-tokens", "-1"), ("--passes", "1025"),
        )),
        *((["data", "build", "depo", "x", option, value], [option, f"'{value}'"]) for option, value in (
            ("--seed", str(2**32)), ("--train-samples", "-1"), ("--workers", "9" * 5000), ("--shard-size", "9" * 400 + "GB"),
        )),
        (["demo", "--seed", str(2**64)], ["--seed", "from 0 to 4294967295"]),
        (["ui", "--port", "65536"], ["--port", "from 1 to 65535"]),
        (["plan", "demo", "--devices", "1e3"], ["--devices", "'1e3'"]),
        (["plan", "demo", "--memory", "9" * 400 + "GB"], ["--memory", "such as 80GB"]),
        (["eval", "x", "--passes", "1,1025"], ["--passes", "from 1 to 1024"]),
        (["wait", "x", "--timeout", "9" * 400 + "d"], ["--timeout", "such as 90m"]),
        (["data", "inspect", "x", "--samples", "-1"], ["--samples", "'-1'"]),
        (["train"], ["required: RECIPE, such as powernap train demo run.name=mine"]),
        (["data", "build"], ["required: TASK, FOLDER, such as powernap data build depo data/depo"]),
        (["data", "build", "text"], ["required: FOLDER, such as powernap data build text data/text inputs=corpus"]),
        (["data", "build", "text", "inputs=a"], ["'inputs=a': write the folder first, such as data/mine inputs=a"]),
    ],
    ids=lambda value: " ".join(word[:20] for word in value),
)  # fmt: skip
def test_options_out_of_bounds_and_missing_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in said and len(said) < 300
    for word in words:
        assert word[:60] in said


@pytest.mark.parametrize("command", ["list", "--help"])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        (">/dev/full", "No space left on device: 'standard output'"),
        (">&-", "standard output is closed: write >/dev/null"),
    ],
)
def test_a_stdout_that_takes_nothing_is_told(tmp_path, command, where, words):
    shell = f"exec {shlex.join([*runs.COMMAND, command])} {where}"
    result = subprocess.run(["sh", "-c", shell], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr.startswith("powernap: error: "), result.stderr
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_a_closed_stderr_or_stdin_takes_no_file_for_its_own(tmp_path):
    """A file that is opened then would get its number, and with it what is printed there."""
    code = "import os, sys; from powernap.launch import cli; assert cli._open_closed_streams(); print(os.open('x', os.O_CREAT))"
    shell = f"exec {shlex.join([sys.executable, '-c', code])} <&- 2>&-"
    assert int(subprocess.check_output(["sh", "-c", shell], cwd=tmp_path, text=True)) > 2


def test_a_broken_recipe_file_is_named(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "broken.yaml").write_text("run: [unclosed\nmodel: {")
    runs.assert_refused(["train", "broken.yaml"], capfd, "error: broken.yaml: not YAML")


def test_a_dry_run_checks_says_and_writes_nothing(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", "tiny.yaml", "run.name=dry", "data.lanes=1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        said.startswith("would train: Task depo (nodes=6 ")
        and " 22,964 parameters" in " ".join(said.split())
        and "parallel.data=1 x tensor=1 x pipeline=1" in said
    )
    assert max(map(len, said.splitlines())) <= 80 and "of warm-up, constant to step" in said
    assert cli.main(["train", "tiny.yaml", "run.name=dry", "data.train=nowhere.tar", "--dry-run"]) == 2
    assert sorted(folder.rglob("*")) == before


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(folder):
    run = ("train", "tiny.yaml", "data.lanes=1", "train.steps=2", "run.name=kept")
    assert runs.warm_powernap(*run, cwd=folder).returncode == 0
    metrics = (folder / "runs" / "kept" / "metrics.jsonl").read_bytes()
    runs.assert_one_line(runs.powernap(*run, cwd=folder), "runs/kept exists", "--resume")
    changed = runs.powernap(*run, "optimizer.lr=0.1", "--resume", cwd=folder)
    runs.assert_one_line(changed, "optimizer.lr=0.1", "0.005")
    assert (folder / "runs" / "kept" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.faults
def test_a_shard_that_breaks_during_the_run_ends_every_process(folder):
    """The check at the start reads the ends of shards, not every sample: a bad sample turns up in the middle."""
    import io
    import tarfile

    import numpy as np

    bad = folder / "bad"
    bad.mkdir()
    for shard in range(2):
        with tarfile.open(bad / f"train-{shard}.tar", "w") as tar:
            for index in range(40):
                length = 23 if (shard, index) == (1, 30) else 24
                loss_mask = np.arange(length) >= 14
                values = {"tokens": np.ones(length, np.int32), "loss_mask": loss_mask, "answers": [[14, 15, 1]]}
                for name, value in values.items():
                    buffer = io.BytesIO()
                    np.save(buffer, np.asarray(value, dtype=bool if name == "loss_mask" else np.int32))
                    member = tarfile.TarInfo(f"{index:04}.{name}.npy")
                    member.size = buffer.tell()
                    tar.addfile(member, io.BytesIO(buffer.getvalue()))
    start = time.monotonic()
    result = runs.warm_powernap(
        "train", "tiny.yaml", "run.name=bad", "data.train=bad/train-*.tar", "data.shuffle_buffer=1", "parallel.data=2",
        "train.steps=100", cwd=folder,
    )  # fmt: skip
    assert time.monotonic() - start < 60
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert any("train-1.tar" in line and "data.sequence_length" in line for line in errors), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_says_so_and_leaves_nothing_running(folder, processes):
    name = f"stopped{processes}"
    command = [*runs.COMMAND, "train", "tiny.yaml", f"run.name={name}", "train.steps=9999", "checkpoint.every=9999"]
    command += ["data.lanes=1", "data.workers=1", f"parallel.data={processes}"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends on Ctrl-C
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.count("stopping after this step, with a checkpoint; Ctrl-C again stops at once") == 1
    assert "continue with --resume" in errors and "Traceback" not in errors, errors
    assert len(list((folder / "runs" / name / "checkpoints").glob("step_*"))) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_srun_is_recognised(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "POWERNAP_RENDEZVOUS")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert not torchrun.already_started()
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
             "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,n[03-04]", "SLURM_STEP_ID": "7",
             "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_JOB_ID": "12345"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert torchrun.already_started()
    assert [os.environ[name] for name in names] == ["3", "4", "1", "2", "localhost", "12345.7.0"]
    torchrun.check_world_size(4, "parallel.data=4")
    with pytest.raises(torchrun.LaunchError, match=r"parallel.data=2 needs 2 processes, 4 were started"):
        torchrun.check_world_size(2, "parallel.data=2")


@pytest.mark.wide  # make test-clusters does it with pods
def test_two_machines_train_as_one(folder):
    """Each is a command of its own, as in the pods of a job."""
    port = str(runs.free_port())
    environment = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    train = ["train", "tiny.yaml", "parallel.data=2", "train.steps=3", "data.lanes=1"]
    machines = [
        subprocess.Popen(
            [*runs.COMMAND, *train, "run.name=machines"],
            cwd=folder,
            env=os.environ | environment | {"PET_NODE_RANK": rank},
        )
        for rank in "10"
    ]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert runs.powernap(*train, "run.name=one-machine", cwd=folder).returncode == 0
    assert runs.powernap("compare", "machines", "one-machine", cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PET_NNODES": "two"}, ["PET_NNODES=two"]),
        ({"PET_NNODES": "2"}, ["PET_NODE_RANK=", "0 to 1"]),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "2"}, ["PET_NODE_RANK=2", "0 to 1"]),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, ["PET_MASTER_ADDR is missing"]),
        (
            {"PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1"},
            ["2 processes cannot be shared equally by PET_NNODES=3"],
        ),
    ],
)
def test_machines_that_cannot_meet_say_so(folder, environment, words):
    result = runs.powernap("train", "tiny.yaml", "parallel.data=2", "run.name=never", cwd=folder, **environment)
    runs.assert_one_line(result, *words)
    assert not (folder / "runs" / "never").exists()
