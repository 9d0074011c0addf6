"""Jobs on a real SLURM: what happens to them there, and that their losses are those of a run that nothing happened to."""

import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import psutil
import pytest

from powernap.launch import cli
from tests.helpers import runs
from tests.helpers.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.clusters
STEPS = 12


class Jobs:
    """`powernap` in a folder with a recipe, on a cluster."""

    def __init__(self, folder: Path, cluster) -> None:
        self.folder, self.cluster = folder, cluster

    def powernap(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Here, since libraries take seconds to import; a run that trains in a process of its own."""
        environment = {"SLURM_CONF": self.cluster.environment["SLURM_CONF"], "MLFLOW_TRACKING_URI": "", **environment}
        if arguments[0] == "train":
            return runs.powernap(*arguments, cwd=self.folder, **environment)
        out, error = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, environment),
            chdir(self.folder),
            redirect_stdout(out),
            redirect_stderr(error),
        ):
            code = cli.main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())

    def submit(
        self, name: str, *overrides: str, on: str = "slurm", recipe: str = "tiny.yaml", **environment: str
    ) -> str:
        """The job's id."""
        arguments = ["submit", recipe, "--on", on, f"run.name={name}", *overrides, "--json"]
        done = self.powernap(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]["id"]

    def status(self, name: str, **environment: str) -> dict:
        done = self.powernap("status", name, "--json", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]

    def wait(self, *names: str, timeout: str = "2m") -> int:
        return self.powernap("wait", *names, "--timeout", timeout).returncode

    def records(self, name: str) -> list[dict]:
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def unbroken(self, name: str, steps: int, *overrides: str) -> list[dict]:
        """What a run on this machine says of its first steps."""
        command = [sys.executable, "-m", "powernap.launch.cli", "train", "tiny.yaml", f"run.name={name}", *overrides]
        with subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL) as process:
            try:
                self.until(lambda: len(self.records(name)) >= steps or process.poll() is not None, 120)
            finally:
                process.terminate()
        return self.records(name)[:steps]

    def log(self, name: str) -> str:
        return self.powernap("logs", name).stdout

    def shown(self, id: str) -> str:
        return self.cluster.run("scontrol", "show", "job", "-o", id)

    def until(self, there, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (found := there()):
            assert time.monotonic() < end, self.cluster.run("scontrol", "show", "job", "-o")
            time.sleep(0.1)
        return found

    def started_again(self, id: str, restarts: int) -> None:
        self.until(lambda: f"Restarts={restarts} " in self.shown(id))
        self.cluster.run("scontrol", "update", f"JobId={id}", "TimeLimit=120")
        self.until(lambda: "JobState=RUNNING" in self.shown(id))

    def fake(self, name: str, script: str) -> str:
        """job.environment=...: a powernap that is a shell script, for what does not depend on training."""
        command = self.folder / name / "bin" / "powernap"
        command.parent.mkdir(parents=True)
        command.write_text(f"#!/bin/bash\n{script}\n")
        command.chmod(0o755)
        return f"job.environment={json.dumps(str(self.folder / name))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder's 100% #1 $HOME")
    runs.prepare(folder, train={"steps": STEPS}, checkpoint={"every": 20})
    (folder / "clusters").mkdir()
    return folder


@pytest.fixture(scope="module")
def jobs(folder, slurm):
    return Jobs(folder, slurm)


def losses(records: list[dict]) -> dict[int, tuple]:
    return {record["step"]: (record["loss"], record["grad_norm"], record["tokens"]) for record in records}


def test_two_nodes_by_two_ranks_train_as_four_local_processes(jobs):
    """The demo's recipe, in less time and in a layout that a head for each tensor rank allows."""
    shards = "data build depo demo nodes=8 max_hop=4 queries=18 names=ends --train-samples 256 --test-samples 64"
    assert jobs.powernap(*shards.split()).returncode == 0
    data = ["data.train=demo/train-*.tar", "data.test=demo/test-*.tar"]
    size = [f"train.steps={STEPS}", "train.global_batch_size=16", "optimizer.warmup_steps=4", "evaluation.samples=16"]
    layout = ["parallel.data=2", "parallel.tensor=2", "model.vocab_size=22", "model.attention.heads=2"]
    fields = [*data, *size, *layout]
    id = jobs.submit("four", *fields, "job.nodes=2", "job.device=gpu", "job.cpus_per_process=1", recipe="demo")
    assert "TresPerNode=gres:gpu:2" in jobs.shown(id) and "NumNodes=2" in jobs.shown(id)
    assert jobs.wait("four") == 0, jobs.log("four")
    row = jobs.status("four")
    assert (row["state"], row["step"], row["restarts"], row["exit_code"]) == ("succeeded", STEPS, 0, 0)
    assert row["nodes"] == "n[1-2]"
    local = jobs.powernap("train", "demo", "run.name=four-here", *fields)
    assert local.returncode == 0, local.stderr
    assert losses(jobs.records("four")) == losses(jobs.records("four-here")) and len(jobs.records("four")) == STEPS


@pytest.mark.wide  # test_stopping.py stops runs
def test_whatever_stops_it_its_losses_are_those_of_an_unbroken_run(jobs):
    """A warning before the time limit, a preemption, a killed rank, a drained node: one job, five starts."""
    fields = ["parallel.data=2", "train.steps=100000", "checkpoint.every=100000"]
    id = jobs.submit("hard", *fields, "job.nodes=2", "job.time=2h", "job.grace=1s", "job.retries=1")

    def reach(more: int) -> None:
        goal = len(jobs.records("hard")) + more
        jobs.until(lambda: len(jobs.records("hard")) >= goal)

    reach(5)
    jobs.cluster.run("scontrol", "update", f"JobId={id}", "TimeLimit=1")
    jobs.started_again(id, 1)
    reach(5)
    jobs.cluster.run(*"srun --partition=urgent --nodes=3 --exclusive true".split())
    jobs.started_again(id, 2)
    reach(5)
    failures = jobs.folder / "runs/hard/jobs/1/failures"
    assert not failures.exists()
    jobs.cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        killed_at = len(jobs.records("hard"))
        rank_of(jobs.cluster, id, "1").kill()
        jobs.started_again(id, 3)
        assert failures.read_text() == "1\n" and jobs.status("hard")["nodes"] == "n[2-3]"
        jobs.until(lambda: len(jobs.records("hard")) > killed_at + 5)
    finally:
        jobs.cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert jobs.powernap("cancel", "hard").returncode == 0
    assert jobs.wait("hard") == 3 and jobs.status("hard")["restarts"] == 3
    log = jobs.log("hard")
    assert log.count("continue with --resume") == 3 and "exit code 137: restarting" in log
    found = jobs.records("hard")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    assert losses(found) == losses(jobs.unbroken("hard-here", len(found), *fields))


def rank_of(cluster, id: str, number: str) -> psutil.Process:
    """The process of powernap itself, below the shell that srun started."""
    for process in cluster.processes():
        try:
            environment = process.environ()
            ours = environment.get("SLURM_JOB_ID") == id and environment.get("SLURM_PROCID") == number
            if ours and "SLURM_STEP_NODELIST" in environment and "powernap.launch.cli" in process.cmdline():
                if process.cmdline()[0] != "/bin/sh":
                    return process
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {number}")


def test_cancel_saves_leaves_no_process_and_the_same_submit_goes_on(jobs):
    before = jobs.cluster.processes()
    fields = ["parallel.data=2", "train.steps=100000", "job.nodes=2"]
    id = jobs.submit("stopped", *fields)
    follower = subprocess.Popen(
        [sys.executable, "-m", "powernap.launch.cli", "logs", "-f", "stopped"],
        cwd=jobs.folder, env=jobs.cluster.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    jobs.until(lambda: len(jobs.records("stopped")) > 2)
    assert jobs.status("stopped")["state"] == "running"
    runs.assert_one_line(
        jobs.powernap("submit", "tiny.yaml", "--on", "slurm", "run.name=stopped"), "stopped is running as job"
    )
    assert jobs.powernap("cancel", "stopped").returncode == 0
    assert jobs.powernap("cancel", "stopped").returncode == 0
    assert jobs.wait("stopped") == 3
    row = jobs.status("stopped")
    assert (row["state"], row["exit_code"], row["restarts"]) == ("cancelled", 75, 0)
    assert "continue with --resume" in follower.communicate(timeout=60)[0]
    left = jobs.cluster.processes() - before
    assert not psutil.wait_procs(left, timeout=20)[1], [(p, cmdline(p)) for p in left if p.is_running()]
    assert jobs.cluster.run("squeue", "--noheader", "--jobs", id, check=False).strip() == ""
    reached = len(jobs.records("stopped"))
    jobs.submit("stopped", *fields)
    jobs.until(lambda: len(jobs.records("stopped")) > reached)
    assert jobs.status("stopped")["attempt"] == 2
    assert [r["step"] for r in jobs.records("stopped")][: reached + 1] == list(range(1, reached + 2))
    assert jobs.powernap("cancel", "stopped").returncode == 0
    assert jobs.wait("stopped") == 3


def test_a_sweep_is_one_array_with_a_log_for_each(jobs):
    sweep = ["submit", "tiny.yaml", "--on", "slurm", "run.name=sweep", "sleep.passes=1,2", "train.steps=2"]
    done = jobs.powernap(*sweep, "--json")
    assert done.returncode == 0, done.stderr
    ids = [row["id"] for row in json.loads(done.stdout)]
    assert [id.partition("_")[2] for id in ids] == ["0", "1"] and len({id.partition("_")[0] for id in ids}) == 1
    record = jobs.folder / "runs/sweep-passes2/jobs/1/record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"id": None}))  # as if cut off
    assert jobs.status("sweep-passes2")["id"] == ids[1]
    assert jobs.wait("sweep") == 0
    for passes in (1, 2):
        assert f"passes: {passes}\n" in (jobs.folder / f"runs/sweep-passes{passes}/config.yaml").read_text()
        assert "powernap: succeeded" in jobs.log(f"sweep-passes{passes}")
    runs.assert_one_line(jobs.powernap(*sweep), "all 2 runs of the sweep sweep have succeeded already")


def test_a_part_of_a_build_that_is_asked_to_leave_goes_on_and_counts_no_failure(jobs):
    shards = "nodes=8 max_hop=4 queries=18 names=ends --train-samples 8000 --test-samples 20 --samples-per-shard 250 --workers 1"
    build = ["submit", "--on", "slurm", "--parts", "2", "--json", "--build", "depo", "built", *shards.split()]
    done = jobs.powernap(*build)
    assert done.returncode == 0, done.stderr
    first, second = (job["id"] for job in json.loads(done.stdout))
    assert second == first.replace("_0", "_1")
    jobs.until(lambda: (jobs.folder / ".built.unfinished" / "000000.done").exists())
    jobs.cluster.run("scancel", "--signal=USR1", first)  # as SLURM before the time limit
    jobs.started_again(first, 1)
    assert jobs.wait("build-built") == 0
    assert jobs.status("build-built-part-1")["restarts"] == 1
    assert not (jobs.folder / "runs/build-built-part-1/jobs/1/failures").exists()
    assert "asked to stop: the same command goes on" in jobs.log("build-built-part-1")
    assert jobs.powernap("data", "verify", "built").returncode == 0
    assert json.loads((jobs.folder / "built" / "manifest.json").read_text())["splits"]["train"]["shards"] == 32


def test_an_element_that_is_started_again_leaves_the_others_alone(jobs):
    """The last element's own number is that of the whole array."""
    script = 'echo "$SLURM_ARRAY_TASK_ID" >>starts; [ "$SLURM_ARRAY_TASK_ID" = 0 ] && sleep 3 || exit $((SLURM_RESTART_COUNT ? 0 : 75))'
    environment = jobs.fake("element", script)
    jobs.powernap("submit", "tiny.yaml", "--on", "slurm", "run.name=pair", "run.seed=1,2", environment)
    assert jobs.wait("pair") == 0
    assert sorted((jobs.folder / "starts").read_text().split()) == ["0", "1", "1"]
    rows = json.loads(jobs.powernap("status", "pair", "--json").stdout)
    assert [row["restarts"] for row in rows] == [0, 1]


@pytest.mark.parametrize(("exits", "restarts", "reason"), [(1, 1, "after 2 failed starts"), (2, 0, "would not help")])
def test_what_fails_for_good_is_not_tried_for_ever(jobs, exits, restarts, reason):
    name = f"fatal{exits}"
    environment = jobs.fake(name, f"[ $SLURM_PROCID = 1 ] && exit {exits}; exec sleep 60")
    jobs.submit(name, "parallel.data=2", "job.retries=1", environment)
    assert jobs.wait(name) == 1
    row = jobs.status(name)
    assert (row["state"], row["exit_code"], row["restarts"]) == ("failed", exits, restarts) and reason in row["reason"]


def test_no_cancelled_job_rises_again(jobs):
    """scancel alone, which the script is not told of, while ranks ask to be started again."""
    script = "trap 'exit 75' TERM USR1; echo up; for _ in {1..600}; do sleep 0.1; done"
    id = jobs.submit("raw", jobs.fake("raw", script))
    jobs.until(lambda: "up" in jobs.log("raw"))
    jobs.cluster.run("scancel", id)
    assert jobs.wait("raw") == 3
    time.sleep(1)
    assert jobs.status("raw")["state"] == "cancelled" and "Restarts=0" in jobs.shown(id)


def test_what_does_not_save_in_time_is_ended(jobs):
    script = "trap '' TERM USR1; echo up; for _ in {1..600}; do sleep 0.1; done"
    jobs.submit("deaf", jobs.fake("deaf", script), "job.grace=1s")
    jobs.until(lambda: "up" in jobs.log("deaf"))
    before = time.monotonic()
    assert jobs.powernap("cancel", "deaf").returncode == 0
    assert jobs.status("deaf")["state"] == "stopping"
    assert jobs.wait("deaf") == 3
    assert time.monotonic() - before < 30
    jobs.until(lambda: not re.search("deaf", " ".join(" ".join(cmdline(p)) for p in jobs.cluster.processes())))


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_states_before_a_job_starts(jobs):
    (jobs.folder / "clusters/held.yaml").write_text("kind: slurm\ndirectives: [--hold]\n")
    id = jobs.submit("held", jobs.fake("held", "exit 0"), on="held")
    row = jobs.status("held")
    assert (row["state"], row["reason"], row["exit_code"]) == ("pending", "JobHeldUser", None)
    assert jobs.log("held") == ""
    record = jobs.folder / "runs/held/jobs/1/record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"id": None}))
    assert jobs.status("held")["id"] == id
    record.write_text(json.dumps(json.loads(record.read_text()) | {"submission_id": "0" * 16}))
    assert jobs.status("held")["state"] == "lost"  # the number is another job's
    record.write_text(json.dumps(json.loads(record.read_text()) | {"submission_id": submission_id(jobs.shown(id))}))
    assert jobs.powernap("cancel", "held").returncode == 0
    assert jobs.status("held")["state"] == "cancelled"


def submission_id(shown: str) -> str:
    return re.search("Comment=powernap:([0-9a-f]+)", shown)[1]


def test_a_value_that_is_secret_is_nowhere_but_in_the_job(jobs):
    private = jobs.folder / "private"
    private.write_text("from-a-file-53c237\n")
    private.chmod(0o600)
    (jobs.folder / "clusters/keys.yaml").write_text(f"kind: slurm\nsecrets: {{FILED: {json.dumps(str(private))}}}\n")
    script = (
        '[ "$FILED $SHELLS" = "from-a-file-53c237 from-a-shell-53c237" ] && [ -z "$NOT_NAMED" ] && echo right; sleep 3'
    )
    environment = jobs.fake("keys", script)
    values = {"SHELLS": "from-a-shell-53c237", "NOT_NAMED": "1", "SBATCH_PARTITION": "nowhere"}
    id = jobs.submit("keys", environment, "job.secrets=[FILED,SHELLS]", on="keys", **values)
    jobs.until(lambda: "right" in jobs.log("keys"))
    lines = [" ".join(cmdline(process)) for process in psutil.process_iter()]
    assert any("keys/bin/powernap" in line for line in lines)
    shown = jobs.shown(id) + jobs.cluster.run("squeue", "--json") + "\n".join(lines)
    assert jobs.wait("keys") == 0
    written = "".join(path.read_text() for path in (jobs.folder / "runs/keys").rglob("*") if path.is_file())
    assert "53c237" not in shown + written and "FILED" in written


@pytest.mark.parametrize(
    ("profile", "overrides", "words"),
    [
        ("partition: nowhere", [], ["Invalid partition", "partition=nowhere in the cluster's profile"]),
        ("constraint: h100", [], ["Invalid feature", "constraint=h100"]),
        ("gpu_type: h100", ["job.device=gpu"], ["SLURM rejected the job"]),
        ("reservation: none", [], ["reservation=none"]),
        (
            "kind: slurm",
            ["parallel.data=9", "train.global_batch_size=18", "job.nodes=9"],
            ["SLURM", "never", "job.nodes"],
        ),
        (
            "kind: slurm",
            ["job.cpus_per_process=99"],
            ["SLURM", "job.cpus_per_process=99", "of partition main has 8 CPUs"],
        ),
        (
            "partition: urgent",
            ["job.memory=100GiB"],
            ["job.memory=100GiB: the largest node of partition urgent has 8000 MiB"],
        ),
    ],
)
def test_what_slurm_refuses_is_told_in_one_line_and_leaves_nothing(jobs, profile, overrides, words):
    (jobs.folder / "clusters/refused.yaml").write_text(
        f"kind: slurm\n{profile}\n".replace("kind: slurm\nkind: slurm", "kind: slurm")
    )
    arguments = ["submit", "tiny.yaml", "--on", "refused", "run.name=refused", *overrides]
    runs.assert_one_line(jobs.powernap(*arguments), *words)
    assert not (jobs.folder / "runs/refused").exists()
    assert "refused" not in jobs.cluster.run("squeue", "--noheader", "--format=%j %T")


def test_a_cluster_that_cannot_be_reached_is_told_in_one_line(jobs):
    arguments = ["submit", "tiny.yaml", "--on", "slurm", "run.name=away"]
    missing = jobs.powernap(*arguments, SLURM_CONF="/nowhere/slurm.conf")
    runs.assert_one_line(missing, "SLURM_CONF=/nowhere/slurm.conf")
    down = jobs.folder / "down.conf"
    text = Path(jobs.cluster.environment["SLURM_CONF"]).read_text()
    down.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1", text))
    runs.assert_one_line(jobs.powernap(*arguments, SLURM_CONF=str(down)), "Unable to contact slurm controller")
    runs.assert_one_line(jobs.powernap(*arguments, PATH=os.path.dirname(sys.executable)), "sbatch is not here")
    assert not (jobs.folder / "runs/away").exists()


class NamesOfAllKinds(SlurmCluster):
    """Nodes that are not in the order of the alphabet."""

    def _configure(self) -> None:
        super()._configure()
        for name in ("slurm.conf", "gres.conf"):
            path = self.folder / name
            path.write_text(path.read_text().replace("n[1-3]", "b7,a[1-2]"))

    def _node_names(self) -> list[str]:
        return ["b7", "a1", "a2"]


def test_ranks_meet_on_the_node_of_rank_0(folder, slurm):
    first = 'export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    (folder / "clusters/names.yaml").write_text(f"kind: slurm\nsetup: [{json.dumps(first)}]\n")
    with NamesOfAllKinds() as cluster:
        jobs = Jobs(folder, cluster)
        environment = jobs.fake("names", 'echo "$SLURM_PROCID $SLURMD_NODENAME $FIRST $MASTER_ADDR"')
        more = ["parallel.data=6", "train.global_batch_size=18", "data.lanes=1"]
        id = jobs.submit("names", environment, "job.nodes=3", *more, on="names")
        assert jobs.wait("names", timeout="30s") == 0, jobs.shown(id) + jobs.log("names")
        lines = sorted(line.split() for line in jobs.log("names").splitlines() if line[0].isdigit())
    assert [line[0] for line in lines] == list("012345")
    nodes = [line[1] for line in lines]
    assert sorted(nodes[::2]) == ["a1", "a2", "b7"] and nodes[::2] == nodes[1::2]
    assert {(line[2], line[3]) for line in lines} == {(nodes[0], "127.0.0.1")}


def test_accounting_and_the_script_itself_know_jobs_that_slurm_has_forgotten(folder, slurm_with_accounting, tmp_path):
    jobs = Jobs(folder, slurm_with_accounting)
    jobs.submit("old", jobs.fake("old", "exit 2"))
    assert jobs.wait("old") == 1
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    forgotten = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert "would not help" in jobs.status("old", **forgotten)["reason"]
    (folder / "runs/old/jobs/1/state.json").unlink()
    jobs.until(lambda: jobs.status("old", **forgotten)["state"] == "failed", 20)
    assert jobs.status("old", **forgotten)["exit_code"] in (2, None)  # 22.05 takes it for 0
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    row = jobs.status("old", **forgotten)
    assert row["state"] == "lost" and "no longer knows job" in row["reason"]
