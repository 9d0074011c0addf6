"""A build of shards as jobs: its parts, what is refused, and that submitting again builds what is missing."""

import json
import os
import shlex
import signal
from unittest.mock import Mock

import pytest
import yaml

from powernap.launch import cli
from powernap.launch.commands import data
from powernap.launch.commands.data import source_of
from powernap.launch.jobs.job import BuildJob
from powernap.launch.jobs.submission import Submission, prepare_build
from powernap.parallel.liveness.exit_codes import INTERRUPTED, PREEMPTED
from tests.helpers import runs

BUILD = [
    "text",
    "shards",
    "inputs=corpus",
    "tokenizer=bytes",
    "window=32",
    "--workers",
    "1",
    "--shard-size",
    "0.0008MB",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in "abc":
        (tmp_path / "corpus" / f"{name}.txt").write_text(f"{name} sleeps. " * 80)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "slurm.yaml").write_text("kind: slurm\npartition: cpu\njob: {cpus_per_process: 8}\n")
    (tmp_path / "clusters" / "boxed.yaml").write_text("kind: slurm\ncontainer: pyxis\njob: {image: a}\n")
    (tmp_path / "clusters" / "pods.yaml").write_text(
        "kind: kubernetes\nstorage: {claim: work, path: /work}\njob: {image: a, nodes: 4, device: gpu, mounts: ['/data:/data:ro']}\n"
    )
    return tmp_path


def submit(*words: str, on: str = "local", build: list[str] = BUILD) -> list[str]:
    return ["submit", "--on", on, *words, "--build", *build]


def prepared(parts: int) -> Submission:
    build = cli.parse(["data", "build", *BUILD])
    return prepare_build(BUILD, build.folder, source_of(build), parts, [], "local")


def jobs(parts: int) -> list[BuildJob]:
    return prepared(parts).jobs


def run(job: BuildJob) -> int:
    command = job.command()
    return cli.main(command[command.index("data") :])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (submit("demo"), ["demo with --build", "job.NAME=VALUE"]),
        (submit("--resume"), ["--resume with --build", "leave it out"]),
        (submit("job.nodes=2"), ["a part of a build needs 1 ranks", "1 x 1"]),
        (submit("--parts", "9"), ["--parts 9: 3 shards are to build", "--parts 3 or less"]),
        (submit(build=[*BUILD, "--part", "1/2"]), ["--part in --build", "--parts N before --build"]),
        (submit(build=[*BUILD, "inputs=nowhere"]), ["nowhere"]),
        (submit(build=[*BUILD, "widow=3"]), ["widow", "did you mean window?"]),
        (submit(build=[*BUILD, "inputs=https://me:pass@host/a.txt"]), ["inputs contains a credential", "job.secrets"]),
        (submit(build=["text", "corpus", *BUILD[2:]]), ["corpus", "not empty", "choose another folder"]),
        (submit(build=["text", "/proc/shards", *BUILD[2:]]), ["/proc/shards", "cannot be written"]),
        (
            submit(on="boxed", build=["text", "/far/shards", *BUILD[2:]]),
            ["/far/shards is not in the c", "job.mounts=[/far:"],
        ),
        (submit(on="pods", build=["text", "~/shards", *BUILD[2:]]), ["mean other folders here than in pods"]),
        (submit(on="pods", build=[*BUILD, "inputs=~/corpus"]), ["inputs=", "mean other folders here than in pods"]),
        (submit(on="pods", build=["text", "/data/shards", *BUILD[2:]]), ["/data/shards is not on the volume", "/work"]),
        (submit(on="pods", build=["text", "../shards", *BUILD[2:]]), ["../shards is not on the volume"]),
        (["submit", "--on", "local"], ["RECIPE is missing", "--build TASK FOLDER"]),
        (["submit", "demo", "--on", "local", "--parts", "3"], ["--parts without --build"]),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(here, capfd, command, words):
    runs.assert_refused(command, capfd, *words)
    assert {path.name for path in here.iterdir()} == {"corpus", "clusters"}


def test_on_slurm_the_parts_are_an_array(here, capfd):
    build = [*BUILD, "job.time=2h"]
    assert cli.main(submit("--parts", "3", "--dry-run", "job.memory=4GiB", on="slurm", build=build)) == 0
    script = capfd.readouterr().out
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    wanted = {"array=0-2", "nodes=1", "ntasks-per-node=1", "cpus-per-task=8", "mem=4096M", "partition=cpu"}
    assert wanted < options and any(option.startswith("time=") for option in options)
    for number in (1, 2, 3):
        assert f"runs/build-shards-part-{number}/jobs/1" in script
        assert f"{shlex.join(['data', 'build', *BUILD, '--part', f'{number}/3'])})\n" in script
    assert not (here / "runs").exists()


def test_on_kubernetes_each_part_is_a_job_of_its_own(here):
    """Inputs are where the pods are: nothing is looked for here."""
    words = ["text", "shards", "inputs=/work/elsewhere", "tokenizer=mine.json"]
    build = cli.parse(["data", "build", *words])
    source = source_of(build, files="elsewhere")
    submission = prepare_build(words, build.folder, source, 3, ["job.cpus_per_process=2"], "pods")
    for number, (_, files) in enumerate(submission.rendered(), 1):
        body = yaml.safe_load(files["jobset.yaml"])
        assert body["metadata"]["name"] == f"build-shards-part-{number}-1"
        (container,) = body["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"cpu": "2"}  # no GPU, which the profile's runs get
        # A pod sees all cores of its node.
        assert container["command"] == ["powernap", "data", "build", *words, "--workers", "2", "--part", f"{number}/3"]
    assert number == 3


def test_one_part_on_this_machine_is_a_plain_job(here, capfd):
    assert cli.main(submit("job.retries=5", "--dry-run")) == 0
    plan = yaml.safe_load(capfd.readouterr().out)
    assert plan["retries"] == 5 and plan["command"][-len(BUILD) - 4 :] == ["data", "build", *BUILD, "--part", "1/1"]


def test_a_part_that_fails_leaves_no_manifest_and_submitting_again_builds_what_is_missing(here, capfd):
    first, _, last = jobs(3)
    assert run(first) == run(last) == 0
    printed = capfd.readouterr()
    assert not (here / "shards").exists() and "1 of 3 shards are missing" in printed.out + printed.err
    before = {path.name: path.stat().st_mtime_ns for path in (here / ".shards.unfinished").glob("*.tar")}
    assert [job.part for job in prepared(2).jobs_to_start] == [(2, 2)]  # in another number of parts, too
    (job,) = prepared(3).jobs_to_start
    assert job.part == (2, 3) and run(job) == 0
    assert "1 of 1 shards of this part\n" in capfd.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (here / "shards").glob("*.tar")}
    assert before and before.items() < after.items()
    assert json.loads((here / "shards" / "manifest.json").read_text())["splits"]["train"]["shards"] == 3
    capfd.readouterr()
    runs.assert_refused(submit("--parts", "3"), capfd, "shards is finished: nothing is left to build")


def test_a_build_of_which_only_the_manifest_is_missing_takes_one_part(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("powernap.train.data.build._finish", Mock(side_effect=KeyboardInterrupt))
        assert [run(job) for job in jobs(3)] == [0, 0, INTERRUPTED]
    (job,) = prepared(3).jobs_to_start
    assert run(job) == 0 and (here / "shards" / "manifest.json").exists()


def test_parts_that_are_under_way_are_waited_for(here, capfd, monkeypatch):
    """Also by a build in another number of parts, which would write the same shards."""
    for job in (made := jobs(2)):
        job.folder.path.mkdir(parents=True)
        job.record("7").save()
    (here / "runs" / "build-shards").mkdir()
    (here / "runs/build-shards/sweep.json").write_text(json.dumps([str(job.run_folder) for job in made]))
    status = type("Status", (), {"is_over": False, "state": "running"})
    monkeypatch.setattr("powernap.launch.jobs.submission.status_of", lambda record: (record, status))
    runs.assert_refused(submit("--parts", "3"), capfd, "build-shards-part-1 is running", "powernap cancel build-shards")
    status.is_over = True
    assert [job.attempt for job in jobs(2)] == [2, 2]
    runs.assert_refused(submit(), capfd, "submitted as several parts", "--parts 2 or more")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_build_that_is_asked_to_stop_may_be_started_again(monkeypatch, number):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = signal.getsignal(number)
    with data._left_when_asked():
        os.kill(os.getpid(), number)
    assert codes == [PREEMPTED] and signal.getsignal(number) is before


@pytest.mark.faults
def test_on_this_machine_parts_run_in_turn_and_the_last_writes_the_manifest(here):
    assert runs.powernap(*submit("--parts", "2"), cwd=here).returncode == 0
    assert runs.powernap("wait", "build-shards", "--timeout", "3m", cwd=here).returncode == 0
    assert runs.powernap("status", "build-shards", cwd=here).stdout.count("succeeded") == 2
    assert runs.powernap("data", "verify", "shards", cwd=here).returncode == 0
    assert "model.window=32" in runs.powernap("logs", "build-shards-part-2", cwd=here).stdout
