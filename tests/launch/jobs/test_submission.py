"""What is refused before anything is written, and what is written."""

import json
import os
import stat
import subprocess

import pytest
import yaml

from powernap.launch.jobs.backends.local import Local
from powernap.launch.jobs.description import JobDescription, JobError, UnknownOutcomeError
from powernap.launch.jobs.job import newest_record
from powernap.launch.jobs.secret_values import read_secret_file
from powernap.launch.jobs.submission import prepare_submission, status_of
from powernap.launch.jobs.sweep import expand
from powernap.launch.jobs.units import format_duration, parse_duration, parse_size
from powernap.train.recipe_file import RecipeError
from tests.helpers import runs, warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submission")
    runs.prepare(folder, train_samples=64, database=False, data={"lanes": 1})
    clusters = folder / "clusters"
    clusters.mkdir()
    (clusters / "gpus.yaml").write_text("kind: local\ndevice_memory: 1MB\njob: {device: gpu, retries: 7}\n")
    (clusters / "nokind.yaml").write_text("partition: a\n")
    (clusters / "typo.yaml").write_text("kind: slurm\npartiton: a\n")
    (clusters / "injection.yaml").write_text("kind: slurm\npartition: 'a; rm -rf /'\n")
    (clusters / "nostorage.yaml").write_text("kind: kubernetes\n")
    (clusters / "key.yaml").write_text("kind: local\nsecrets: {TOKEN: nowhere/token}\njob: {secrets: [TOKEN]}\n")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("on", "overrides", "words"),
    [
        ("nowhere", [], ["no cluster 'nowhere'", "local", "clusters/nowhere.yaml"]),
        ("nokind", [], ["clusters/nokind.yaml", "kind=None", "local, slurm, kubernetes"]),
        ("typo", [], ["clusters/typo.yaml", "partiton", "did you mean partition?"]),
        ("injection", [], ["clusters/injection.yaml", "partition=a; rm -rf /"]),
        ("nostorage", [], ["clusters/nostorage.yaml", "storage is missing", "the volume that holds runs"]),
        ("local", ["job.nods=2"], ["job.nods", "did you mean job.nodes?"]),
        ("local", ["job.nodes=2"], ["job.nodes=2", "1 x 1"]),
        ("local", ["job.nodes=2", "parallel.data=2"], ["job.nodes=2 on this machine"]),
        ("local", ["job.time=soon"], ["job.time=soon", "12h"]),
        ("local", ["job.memory=lots"], ["job.memory=lots", "80GB"]),
        ("local", ["job.retries=-1"], ["job.retries=-1"]),
        ("local", ["job.image=powernap"], ["job.image", "leave it out"]),
        ("local", ["job.mounts=[data]"], ["job.mounts", "/source:/target"]),
        ("local", ["job.env.RANK=3"], ["RANK is set by the launcher"]),
        ("local", ["job.env={A B: c}"], ["'A B' is not a valid name"]),
        ("local", ["job.env.MY_TOKEN=abcdefgh"], ["job.env.MY_TOKEN looks like a secret", "job.secrets=[MY_TOKEN]"]),
        ("local", ["job.secrets=[NOT_SET_HERE]"], ["NOT_SET_HERE", "or set it here"]),
        ("key", [], ["nowhere/token, the profile's file for TOKEN", "cannot be read"]),
        ("gpus", [], ["needs", "of a GPU's 1MB", "powernap plan --suggest"]),
        ("local", ["model.patern=AG"], ["did you mean model.pattern?"]),
        ("local", ["data.train=nowhere/*.tar"], ["nowhere/*.tar"]),
        ("local", ["run.root=tiny.yaml/runs"], ["run.root=tiny.yaml/runs", "is no folder: choose another one"]),
        ("local", ["run.root=/proc/runs"], ["run.root=/proc/runs", "/proc cannot be written", "choose another folder"]),
        ("local", ["run.name=a,b"], ["run.name=a,b", "one name"]),
        ("local", ["run.seed=1,1"], ["two runs of the sweep tiny would have the same name"]),
        ("local", ["train.steps=9,none"], ["train.steps=none"]),
        ("local", ["data.train='https://me:pass@host/a.tar'"], ["data.train contains a credential", "job.secrets"]),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(here, capfd, on, overrides, words):
    runs.assert_refused(["submit", "tiny.yaml", "--on", on, *overrides], capfd, *words)
    assert not (here / "runs").exists()


def test_a_profile_fills_in_what_the_command_line_leaves_open(here, capfd):
    from powernap.launch import cli

    assert cli.main(["submit", "tiny.yaml", "--on", "gpus", "job.device=cpu", "--dry-run"]) == 0
    printed = capfd.readouterr()
    assert yaml.safe_load(printed.out)["retries"] == 7 and "runs/tiny/jobs/1/local.yaml" in printed.err
    assert "supervisor runs/tiny/jobs/1" in printed.err
    assert not (here / "runs").exists()


def test_the_command_is_kept_as_typed_without_secrets(here):
    typed = ["submit", "tiny.yaml", "run.name=a b", "https://me:hunter2@host/a"]
    (job,) = prepare_submission("tiny.yaml", [], "local", typed=typed).jobs
    assert job.submitted_as == "powernap submit tiny.yaml 'run.name=a b' https://***@host/a"
    assert job.record(None).submitted_as == job.environment["POWERNAP_SUBMITTED_AS"] == job.submitted_as


def test_a_run_that_exists_is_not_taken_over(here, capfd):
    config = here / "runs" / "old" / "config.yaml"
    config.parent.mkdir(parents=True)
    try:
        config.write_text("")
        runs.assert_refused(["submit", "tiny.yaml", "--on", "local", "run.name=old"], capfd, "old exists", "--resume")
        assert os.listdir(config.parent) == ["config.yaml"]
    finally:
        config.unlink()
        config.parent.rmdir()
        config.parent.parent.rmdir()


@pytest.mark.faults
def test_two_that_submit_at_once_start_one(tmp_path):
    runs.prepare(tmp_path, train_samples=64, data={"lanes": 1}, train={"steps": 2})
    command = [warm.python(), *runs.COMMAND[1:], "submit", "tiny.yaml", "--on", "local"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) == [0, 2, 2], ends
    assert [path.name for path in (tmp_path / "runs/tiny/jobs").glob("*/")] == ["1"]
    assert runs.powernap("wait", "tiny", "--timeout", "1m", cwd=tmp_path).returncode == 0


@pytest.mark.wide  # a process that waits for its end
def test_submitting_that_was_cut_off_is_found_again_or_lost(tmp_path):
    runs.prepare(tmp_path, train_samples=64, data={"lanes": 1}, train={"steps": 2})
    assert runs.powernap("submit", "tiny.yaml", "--on", "local", cwd=tmp_path).returncode == 0
    assert runs.powernap("wait", "tiny", "--timeout", "1m", cwd=tmp_path).returncode == 0
    record = tmp_path / "runs/tiny/jobs/1/record.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"id": None}))
    row = json.loads(runs.powernap("status", "tiny", "--json", cwd=tmp_path).stdout)[0]
    assert (row["state"], row["id"]) == ("succeeded", values["id"])
    record.write_text(json.dumps(values | {"id": None, "submission_id": "another"}))
    row = json.loads(runs.powernap("status", "tiny", "--json", cwd=tmp_path).stdout)[0]
    assert row["state"] == "lost" and "interrupted" in row["reason"]
    record.write_text("{")
    runs.assert_one_line(runs.powernap("status", "tiny", cwd=tmp_path), "record.json: cannot be read")


def test_a_scheduler_that_does_not_answer_may_have_the_job_so_it_is_looked_for(tmp_path, monkeypatch, capfd):
    runs.prepare(tmp_path, train_samples=64, data={"lanes": 1})
    monkeypatch.chdir(tmp_path)

    def silence(*_):
        raise UnknownOutcomeError("nobody answers")

    monkeypatch.setattr(Local, "submit", silence)
    runs.assert_refused(["submit", "tiny.yaml", "--on", "local"], capfd, "nobody answers", "powernap status tiny")
    looked_for = []
    monkeypatch.setattr(Local, "find", lambda self, record: looked_for.append(record.submission_id))
    record, status = status_of(newest_record(tmp_path / "runs/tiny"))
    assert status.state == "lost" and looked_for == [record.submission_id]


def test_what_was_submitted_can_be_repeated(tmp_path, monkeypatch):
    """The patch in the folder turns the commit into the code that ran."""
    from powernap.train.run import provenance

    root = tmp_path / "code"
    (root / "train" / "run").mkdir(parents=True)
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)  # noqa: E731
    (root / "train/run/provenance.py").write_text("before\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "first")
    monkeypatch.setattr(provenance, "ROOT", root)
    assert provenance.code_changes() == b"" and not provenance.commit()["uncommitted_changes"]
    (root / "train/run/provenance.py").write_text("after\n")
    (root / "train/new.py").write_text("new\n")
    patch = provenance.code_changes()
    git("stash", "-u")
    (tmp_path / "patch").write_bytes(patch)
    git("apply", str(tmp_path / "patch"))
    assert (root / "train/run/provenance.py").read_text() == "after\n" and (
        root / "train/new.py"
    ).read_text() == "new\n"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [("", [])]),
        (["a.b=1"], [("", ["a.b=1"])]),
        (["a.b=1,2"], [("-b1", ["a.b=1"]), ("-b2", ["a.b=2"])]),
        (["a.b=[1,2]"], [("", ["a.b=[1,2]"])]),
        (["a.b=[1,2],3"], [("-b_1_2_", ["a.b=[1,2]"]), ("-b3", ["a.b=3"])]),
        (["d.t=x-{0..3}.tar"], [("", ["d.t=x-{0..3}.tar"])]),
        (["d.t=x-{a,b}.tar"], [("", ["d.t=x-{a,b}.tar"])]),
        (["d.t='a,b'"], [("", ["d.t='a,b'"])]),
        (["a.b=,"], [("", ["a.b=,"])]),
        (["a.b=1,2", "c.d=3,4"], [(f"-b{b}-d{d}", [f"a.b={b}", f"c.d={d}"]) for b in (1, 2) for d in (3, 4)]),
    ],
)
def test_commas_outside_brackets_and_quotes_make_a_sweep(overrides, expected):
    assert expand(overrides) == expected


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({}, 4, (1, 4)),
        ({"processes_per_node": 8}, 16, (2, 8)),
        ({"processes_per_node": 8}, 4, (1, 4)),
        ({"nodes": 2}, 4, (2, 2)),
        ({"nodes": 2, "processes_per_node": 2}, 4, (2, 2)),
        ({"processes_per_node": 3}, 4, None),
        ({"nodes": 3}, 4, None),
        ({"nodes": 2, "processes_per_node": 4}, 4, None),
    ],
)
def test_nodes_and_processes_make_the_layout(given, ranks, expected):
    description = JobDescription(**given)
    if expected is None:
        with pytest.raises(JobError, match=f"needs {ranks} ranks.*1 x {ranks}"):
            description.resolved(ranks, "the layout")
    else:
        found = description.resolved(ranks, "the layout")
        assert (found.nodes, found.processes_per_node) == expected


def test_durations_and_sizes():
    texts = {"90s": 90, "30m": 1800, "12h": 43200, "1d12h": 129600, "1-12:00:00": 129600, "02:03:04": 7384}
    assert {text: parse_duration(text) for text in texts} == texts
    assert [format_duration(seconds) for seconds in (90, 129600, 7384)] == ["00:01:30", "1-12:00:00", "02:03:04"]
    for wrong in ("", "5", "0s", "1:2", "h", "1h2d", "-1h"):
        with pytest.raises(ValueError, match="write a time"):
            parse_duration(wrong)
    assert parse_size("1.5GiB") == 1.5 * 2**30


def test_a_secret_file_must_be_private_and_hold_one_line(tmp_path):
    path = tmp_path / "token"
    path.write_text("value\n")
    path.chmod(0o644)
    with pytest.raises(JobError, match="chmod 600"):
        read_secret_file("TOKEN", str(path))
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert read_secret_file("TOKEN", str(path)) == "value"
    path.write_text("two\nlines\n")
    with pytest.raises(JobError, match="one line"):
        read_secret_file("TOKEN", str(path))


def test_fields_of_profiles_are_words_for_a_shell():
    from powernap.launch.jobs.cluster import parse_cluster

    for field, value in {
        "partition": "a b",
        "constraint": "h100$(reboot)",
        "directives": ["--comment='x y'"],
        "account": "`id`",
        "qos": "",
    }.items():
        with pytest.raises(RecipeError, match=field):
            parse_cluster({"kind": "slurm", field: value})
    assert parse_cluster({"kind": "slurm", "constraint": "h100&nvlink", "directives": ["--switches=1@12:00"]})


def test_records_and_profiles_of_before_the_renaming_are_read(tmp_path):
    """Fields had other names: of a job's files token and work, of a profile together, spread, fabric and keep."""
    from powernap.launch.jobs.backends.kubernetes_objects import SUBMISSION_LABEL
    from powernap.launch.jobs.cluster import find_cluster
    from powernap.launch.jobs.job import read_json, read_record

    profile = "kind: kubernetes\nstorage: {claim: c}\n"
    profile += "together: rack\nspread: host\nfabric: {rdma/hca: 2}\nkeep: 3d\n"
    (tmp_path / "old.yaml").write_text(profile)
    old = find_cluster(str(tmp_path / "old.yaml"))
    assert (old.exclusive_topology, old.spread_by, old.device_resources, old.ttl) == (
        "rack",
        "host",
        {"rdma/hca": 2},
        "3d",
    )
    record = {
        "run": "mine", "run_folder": "runs/mine", "work": "/work", "cluster": yaml.safe_load(profile), "description": {},
        "token": "0123456789abcdef", "attempt": 1, "id": "mine-1",
    }  # fmt: skip
    (tmp_path / "record.json").write_text(json.dumps(record))
    read = read_record(tmp_path / "record.json")
    assert (read.submit_dir, read.submission_id, read.profile) == ("/work", "0123456789abcdef", old)
    (tmp_path / "array.json").write_text('{"token": "0123456789abcdef", "index": 1}')
    assert read_json(tmp_path / "array.json") == {"submission_id": "0123456789abcdef", "index": 1}
    assert SUBMISSION_LABEL == "powernap.io/token"  # pods that were submitted before are found by it
    (tmp_path / "wrong.yaml").write_text(profile.replace("3d", "ever"))
    with pytest.raises(JobError, match="ttl=ever: write a time"):
        find_cluster(str(tmp_path / "wrong.yaml"))
    (tmp_path / "both.yaml").write_text(f"{profile}ttl: 4d\n")
    with pytest.raises(JobError, match="unknown key keep"):
        find_cluster(str(tmp_path / "both.yaml"))
