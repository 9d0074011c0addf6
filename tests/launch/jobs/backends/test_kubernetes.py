"""Jobs on a real Kubernetes API server, through the command; kube_controllers.py plays controllers and nodes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import kubernetes.watch
import pytest
import yaml
from kubernetes import client

from powernap.launch.jobs.job import newest_record
from tests.helpers import runs
from tests.helpers.cases import names
from tests.helpers.kube_cluster import NAMESPACE
from tests.helpers.kube_controllers import JobSetController
from tests.helpers.runs import wait_for

pytestmark = pytest.mark.clusters

STEPS = 12
JOBSETS = ("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where jobs are submitted from: recipes and profiles, no shards."""
    folder = tmp_path_factory.mktemp("submit")
    recipe = {**runs.RECIPE, "train": {**runs.RECIPE["train"], "steps": STEPS}, "checkpoint": {"every": 1}}
    recipe["data"] = {**recipe["data"], "lanes": 4}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    clusters = folder / "clusters"
    clusters.mkdir()
    profile = {
        "kind": "kubernetes",
        "namespace": NAMESPACE,
        "storage": {"claim": "work"},
        "job": {"image": "powernap:test", "nodes": 2, "grace": "30s"},
    }
    (clusters / "kube.yaml").write_text(yaml.safe_dump(profile))
    (clusters / "trainer.yaml").write_text(yaml.safe_dump(profile | {"form": "trainjob"}))
    (clusters / "queued.yaml").write_text(yaml.safe_dump(profile | {"queue": "gpus"}))
    (clusters / "elsewhere.yaml").write_text(yaml.safe_dump(profile | {"namespace": "elsewhere"}))
    (clusters / "huge.yaml").write_text(yaml.safe_dump(profile | {"device_resources": {"rdma/hca": 1}}))
    return folder


@pytest.fixture(scope="module")
def nodes(kube, tmp_path_factory):
    """Whatever is created runs."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": "",
        **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
    }
    with JobSetController(kube, tmp_path_factory.mktemp("nodes"), environment) as nodes:
        work = nodes.claims / "work"
        work.mkdir(parents=True)
        runs.prepare(work)
        yield nodes


@pytest.fixture(scope="module")
def local(nodes, folder):
    """The losses of the same recipe without any cluster."""
    done = runs.powernap(
        "train", str(folder / "tiny.yaml"), "parallel.data=4", "run.name=local", cwd=nodes.claims / "work"
    )
    assert done.returncode == 0, done.stderr
    return numbers(nodes.claims / "work", "local")


@pytest.fixture
def command(kube, folder):
    def run(*arguments: str, user: str = "submitter", timeout: float = 200, **environment: str):
        environment = {"KUBECONFIG": str(kube.kubeconfigs[user])} | environment
        return runs.powernap(*arguments, cwd=folder, timeout=timeout, **environment)

    return run


@pytest.fixture
def submit(command, nodes, kube):
    """Submit tiny.yaml on 2 nodes x 2 processes; deleted at the end, whatever happens."""
    submitted = []

    def run(name: str, *overrides: str, on: str = "kube"):
        done = command("submit", "tiny.yaml", "--on", on, f"run.name={name}", "parallel.data=4", *overrides, "--json")
        assert done.returncode == 0, done.stderr
        (job,) = json.loads(done.stdout)
        submitted.append(name)
        return job["id"]

    yield run
    for name in submitted:
        command("cancel", name)


def numbers(where: Path, name: str) -> list[tuple]:
    """What each step's record says of it; of a step that was done again, the last time."""
    lines = (where / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    return [(step, records[step]["loss"], records[step]["samples"]) for step in sorted(records)]


def row(command, name: str) -> dict:
    done = command("status", name, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[0]


def steps(nodes, name: str) -> int:
    path = nodes.claims / "work" / "runs" / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def pods(kube, name: str) -> list[str]:
    core = client.CoreV1Api(kube.clients())
    found = core.list_namespaced_pod(NAMESPACE, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}").items
    return [pod.metadata.name for pod in found]


def objects(kube) -> int:
    """Job sets and ConfigMaps."""
    api = kube.clients()
    sets = client.CustomObjectsApi(api).list_namespaced_custom_object(*JOBSETS)["items"]
    return len(sets) + len(client.CoreV1Api(api).list_namespaced_config_map(NAMESPACE).items)


@pytest.mark.parametrize("form", names(["kube"], ["trainer"]))
def test_a_job_trains_like_a_local_run_through_a_preemption(form, submit, command, kube, nodes, local, folder):
    name = f"preempted-{form}"
    id = submit(name, on=form)
    again = command("submit", "tiny.yaml", "--on", form, f"run.name={name}", "parallel.data=4")
    runs.assert_one_line(again, f"{name} is", f"powernap cancel {name}")
    follower = subprocess.Popen(
        [*runs.COMMAND, "logs", "-f", name],
        cwd=folder, env=os.environ | {"KUBECONFIG": str(kube.kubeconfigs["submitter"])}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: steps(nodes, name) > 2)
    if form == "kube":
        nodes.evict(pods(kube, id)[1])
    else:  # of which Kubernetes knows nothing but the exit code
        nodes.kubelet.processes[pods(kube, id)[1]].terminate()
    done = command("wait", name, "--timeout", "3m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(nodes.claims / "work", name) == local
    found = row(command, name)
    assert (found["state"], found["restarts"], found["exit_code"]) == ("succeeded", 1, 0)
    status = client.CustomObjectsApi(kube.clients()).get_namespaced_custom_object(*JOBSETS, id)["status"]
    assert status.get("restartsCountTowardsMax", 0) == 0
    log = follower.communicate(timeout=20)[0]
    assert "asked to stop" in log and f"step {STEPS}/{STEPS}" in log


@pytest.mark.wide  # test_kube_cluster.py counts crashes
def test_a_crash_is_counted_and_the_last_one_fails_the_job(submit, command, kube, nodes, local):
    id = submit("crashed", "job.retries=1", "train.steps=100000")
    for restarts in (0, 1):
        wait_for(lambda n=restarts: len(pods(kube, id)) == 2 and row(command, "crashed")["restarts"] == n)
        before = steps(nodes, "crashed")
        wait_for(lambda n=before: steps(nodes, "crashed") > n)
        (pod,) = [pod for pod in pods(kube, id) if "-0-1-" in pod]
        os.kill(nodes.kubelet.processes[pod].pid, 9)
        wait_for(lambda pod=pod: pod not in pods(kube, id) or row(command, "crashed")["state"] == "failed")
    assert command("wait", "crashed", "--timeout", "1m").returncode == 1
    found = row(command, "crashed")
    assert found["state"] == "failed" and found["restarts"] == 1 and "ReachedMaxRestarts" in found["reason"]


@pytest.mark.wide  # test_slurm.py cancels
def test_cancel_saves_and_leaves_nothing_also_where_a_finalizer_holds_on(submit, command, kube, nodes):
    id = submit("stopped", "train.steps=100000")
    wait_for(lambda: steps(nodes, "stopped") > 2)
    custom = client.CustomObjectsApi(kube.clients())
    custom.patch_namespaced_custom_object(*JOBSETS, id, {"metadata": {"finalizers": ["example.com/hold"]}})
    processes = [nodes.kubelet.processes[pod] for pod in pods(kube, id)]
    assert command("cancel", "stopped").returncode == 0
    assert row(command, "stopped")["state"] == "stopping"
    wait_for(lambda: all(process.poll() is not None for process in processes))
    assert [process.returncode for process in processes] == [75, 75]
    assert row(command, "stopped")["state"] == "stopping"
    custom.patch_namespaced_custom_object(*JOBSETS, id, {"metadata": {"finalizers": []}})
    assert command("wait", "stopped", "--timeout", "1m").returncode == 3
    reached = steps(nodes, "stopped")
    newest = max((nodes.claims / "work/runs/stopped/checkpoints").iterdir())
    assert newest.name == f"step_{reached:08d}"
    assert submit("stopped", "train.steps=100000") != id  # goes on
    wait_for(lambda: steps(nodes, "stopped") > reached)


@pytest.mark.wide  # test_kube_cluster.py restarts a server
def test_waiting_and_following_survive_a_server_that_restarts_and_forgets(submit, command, kube, nodes, folder, local):
    submit("patient")
    ends = {}

    def wait():
        ends["wait"] = command("wait", "patient", "--timeout", "3m")

    def follow():
        ends["logs"] = command("logs", "-f", "patient")

    threads = [threading.Thread(target=run) for run in (wait, follow)]
    for thread in threads:
        thread.start()
    wait_for(lambda: steps(nodes, "patient") > 4)
    kube.restart()
    kube.forget_history()
    for thread in threads:
        thread.join()
    assert ends["wait"].returncode == 0, ends["wait"].stderr
    assert ends["logs"].returncode == 0 and f"step {STEPS}/{STEPS}" in ends["logs"].stdout
    assert numbers(nodes.claims / "work", "patient") == local


def test_a_watch_tells_a_change_and_outlives_whatever_ends_it(kube, folder, submit, monkeypatch):
    id = submit("watched", on="queued")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfigs["submitter"]))
    record = newest_record(Path("runs/watched"))
    backend = record.profile.backend()
    custom = client.CustomObjectsApi(kube.clients())

    def time_waited(seconds: float, change=lambda: None) -> float:
        """How long it took, if `change` is made after a second: here, since a server ends with the thread that starts it."""
        ends = []
        thread = threading.Thread(
            target=lambda: ends.append((backend.wait_for_change(record, seconds), time.monotonic()))
        )
        began = time.monotonic()
        thread.start()
        time.sleep(1.0)
        change()
        thread.join()
        return ends[0][1] - began

    time.sleep(1.0)  # the controller has had its say
    assert time_waited(2.0) >= 2.0
    label = {"metadata": {"labels": {"changed": "yes"}}}
    assert 1.0 <= time_waited(20.0, lambda: custom.patch_namespaced_custom_object(*JOBSETS, id, label)) < 10.0
    assert time_waited(30.0, kube.restart) < 20.0  # in mid-watch
    wait_for(lambda: backend.status(record).state == "pending")
    old = backend._get(id)
    custom.patch_namespaced_custom_object(*JOBSETS, id, {"metadata": {"labels": {"changed": "again"}}})
    kube.forget_history()
    seen = []
    stream = kubernetes.watch.Watch.stream

    def watch(*arguments, **fields):
        try:
            yield from stream(*arguments, **fields)
        except client.ApiException as error:
            seen.append(error.status)
            raise

    with monkeypatch.context() as patch:
        patch.setattr(kubernetes.watch.Watch, "stream", watch)
        patch.setattr(backend, "_get", lambda name: old)
        assert time_waited(20.0) < 5.0 and seen == [410]
    assert time_waited(2.0) >= 2.0  # and the next one is from a version that is known


def test_a_sweep_is_a_job_set_each_and_all_or_nothing(kube, nodes, command):
    sweep = ["submit", "tiny.yaml", "--on", "queued", "parallel.data=4", "sleep.passes=1,2", "run.name=sweep"]
    custom = client.CustomObjectsApi(kube.clients())
    body = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "sweep-passes2-1"}}
    custom.create_namespaced_custom_object(*JOBSETS, body | {"spec": {"suspend": True, "replicatedJobs": []}})
    before = objects(kube)
    runs.assert_one_line(command(*sweep), '"sweep-passes2-1" already exists')
    wait_for(lambda: objects(kube) == before)  # the first one is gone again
    custom.delete_namespaced_custom_object(*JOBSETS, "sweep-passes2-1")
    done = command(*sweep)
    assert done.returncode == 0, done.stderr
    rows = json.loads(command("status", "sweep", "--json").stdout)
    assert [(row["run"], row["id"], row["state"]) for row in rows] == [
        (f"sweep-passes{n}", f"sweep-passes{n}-1", "pending") for n in (1, 2)
    ]
    assert command("cancel", "sweep").returncode == 0
    assert command("wait", "sweep", "--timeout", "1m").returncode == 3


def test_the_parts_of_a_build_share_the_volume(nodes, command):
    work = nodes.claims / "work"
    (work / "corpus").mkdir()
    for name in "abc":
        (work / "corpus" / f"{name}.txt").write_text(f"{name} sleeps. " * 80)
    build = ["text", "shards", "inputs=corpus", "tokenizer=bytes", "window=32", "--shard-size", "0.0008MB"]
    done = command("submit", "--on", "kube", "--parts", "2", "job.cpus_per_process=1", "--build", *build)
    assert done.returncode == 0, done.stderr
    done = command("wait", "build-shards", "--timeout", "3m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert command("status", "build-shards").stdout.count("succeeded") == 2
    assert "shards" in command("logs", "build-shards-part-2").stdout
    assert runs.powernap("data", "verify", "shards", cwd=work).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "user", "words"),
    [
        (["--on", "kube"], "stranger", ["does not accept these credentials"]),
        (["--on", "kube"], "reader", ["does not allow", "reader", "create"]),
        (["--on", "elsewhere"], "admin", ["elsewhere", "not found"]),
        (["--on", "kube", "job.image=null"], "submitter", ["job.image is missing"]),
        (["--on", "kube", "job.secrets=[TOKEN]"], "submitter", ["job.secrets=TOKEN"]),
        (["--on", "kube", "job.nodes=3"], "submitter", ["needs 4 ranks"]),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(kube, command, folder, arguments, user, words):
    before = objects(kube)
    refused = command("submit", "tiny.yaml", "run.name=never", "parallel.data=4", *arguments, user=user)
    runs.assert_one_line(refused, *words)
    assert objects(kube) == before and not (folder / "runs" / "never").exists()


def test_a_server_that_is_away_and_no_access_are_told(kube, command, folder, tmp_path):
    config = yaml.safe_load(kube.kubeconfigs["submitter"].read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    submit = ["submit", "tiny.yaml", "--on", "kube", "run.name=never", "parallel.data=4"]
    away = command(*submit, KUBECONFIG=str(tmp_path / "config"))
    runs.assert_one_line(away, "does not answer at https://127.0.0.1:9")
    nobody = command(*submit, KUBECONFIG=str(tmp_path / "nothing"))
    runs.assert_one_line(nobody, "no access to Kubernetes", "KUBECONFIG")
    assert not (folder / "runs" / "never").exists()


def test_a_name_in_use_is_not_taken_over(kube, command, folder):
    custom = client.CustomObjectsApi(kube.clients())
    body = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "taken-1"}}
    jobs = {"suspend": True, "replicatedJobs": []}
    custom.create_namespaced_custom_object(*JOBSETS, body | {"spec": jobs})
    before = objects(kube)
    refused = command("submit", "tiny.yaml", "--on", "kube", "run.name=taken", "parallel.data=4")
    runs.assert_one_line(refused, '"taken-1" already exists', "choose another run.name")
    assert objects(kube) == before and not (folder / "runs" / "taken").exists()
    custom.delete_namespaced_custom_object(*JOBSETS, "taken-1")


def test_a_validation_error_of_the_server_is_one_line(kube, folder, monkeypatch):
    from powernap.launch.jobs.backends.kubernetes import Kubernetes
    from powernap.launch.jobs.cluster import find_cluster
    from powernap.launch.jobs.description import JobError

    monkeypatch.chdir(folder)
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfigs["submitter"]))
    backend = Kubernetes(find_cluster("kube"))
    body = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "wrong"},
        "spec": {"failurePolicy": {"restartStrategy": "Sometimes"}, "replicatedJobs": []},
    }  # fmt: skip
    with pytest.raises(
        JobError, match="refuses to create JobSet: spec.failurePolicy.restartStrategy: .*Sometimes"
    ) as error:
        backend._create(body)
    assert "\n" not in str(error.value)


def test_submitting_that_was_cut_off_is_found_again(submit, command, folder):
    submit("cut", "job.env.A=1", "train.steps=100000")
    record = folder / "runs/cut/jobs/1/record.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"id": None}))
    assert row(command, "cut")["id"] == values["id"]
    assert json.loads(record.read_text())["id"] == values["id"]


def test_a_queued_job_waits_and_an_unknown_one_is_lost(submit, command, kube):
    id = submit("queued", on="queued")
    assert row(command, "queued")["state"] == "pending"
    assert not pods(kube, id)
    client.CustomObjectsApi(kube.clients()).delete_namespaced_custom_object(*JOBSETS, id)
    wait_for(lambda: row(command, "queued")["state"] == "lost")
    assert "gone" in row(command, "queued")["reason"]


def test_a_secret_reaches_the_run_by_reference_alone(submit, command, kube, nodes, folder):
    core = client.CoreV1Api(kube.clients())
    core.create_namespaced_secret(NAMESPACE, {"metadata": {"name": "mlflow"}, "stringData": {"token": "5ecret-value"}})
    profile = yaml.safe_load((folder / "clusters/kube.yaml").read_text())
    profile["secrets"] = {"MLFLOW_TRACKING_TOKEN": {"secret": "mlflow", "key": "token"}}
    (folder / "clusters/secret.yaml").write_text(yaml.safe_dump(profile))
    id = submit("secret", "job.secrets=[MLFLOW_TRACKING_TOKEN]", "train.steps=100000", on="secret")
    (pod, _) = wait_for(lambda: len(found := pods(kube, id)) == 2 and found)
    process = wait_for(lambda: nodes.kubelet.processes.get(pod))
    seen = wait_for(lambda: Path(f"/proc/{process.pid}/environ").read_text().split("\0"))
    assert "MLFLOW_TRACKING_TOKEN=5ecret-value" in seen
    assert "5ecret-value" not in Path(f"/proc/{process.pid}/cmdline").read_text()
    kept = [path for path in (folder / "runs/secret").rglob("*") if path.is_file()]
    assert kept and not any("5ecret-value" in path.read_text() for path in kept)
