"""What a job waits for on Kubernetes, or is refused for: cause, object and cure. A stand-in plays the API server, with events and
refusals in the words of a real one."""

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from powernap.launch import cli
from powernap.launch.jobs.backends import kubernetes_causes
from powernap.launch.jobs.job import newest_record
from tests.helpers import runs

NOW = datetime.now(UTC)
POD = "mine-1-node-0-0-abcde"
QUOTA = (
    'pods "mine-1-node-0-0-" is forbidden: exceeded quota: team, requested: requests.cpu=8, used: requests.cpu=60, '
    "limited: requests.cpu=64"
)


class StandIn(ThreadingHTTPServer):
    """An API server that makes what it is asked to, and shows the `pods` and `events` that a test puts there."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.made: dict[str, dict] = {}
        self.refusals: dict[str, tuple[int, dict]] = {}  # kind of object, or the last word of a path -> status
        self.reset()

    def reset(self) -> None:
        self.pods, self.events, self.conditions, self.age = [], [], [], 0.0
        self.refusals.clear()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if refused := self.server.refusals.get(body["kind"]):
            return self.answer(*refused)
        body["metadata"]["uid"] = "u-1"
        self.server.made[body["kind"]] = body
        self.answer(201, body)

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        last = url.path.rpartition("/")[2]
        if refused := server.refusals.get(last):
            self.answer(*refused)
        elif last == "pods":
            self.answer(200, {"items": server.pods})
        elif last == "events":
            wanted = dict(part.split("=") for part in parse_qs(url.query)["fieldSelector"][0].split(","))
            names = {"involvedObject.kind": "kind", "involvedObject.name": "name"}
            found = [
                event
                for event in server.events
                if all(event["involvedObject"].get(names.get(key), event.get(key)) == wanted[key] for key in wanted)
            ]
            self.answer(200, {"items": found})
        elif "watch" in url.query:  # it has forgotten when to begin
            self.answer(410, {})
        elif "JobSet" in server.made:
            made = server.made["JobSet"]
            created = f"{NOW - timedelta(seconds=server.age):%Y-%m-%dT%H:%M:%SZ}"
            metadata = made["metadata"] | {"creationTimestamp": created, "resourceVersion": "1"}
            self.answer(200, made | {"metadata": metadata, "status": {"conditions": server.conditions}})
        else:
            self.answer(404, {"details": {"name": last, "kind": "jobsets"}})

    def do_DELETE(self):
        self.server.made.clear()
        self.answer(200, {})


def event(kind: str, name: str, reason: str, message: str, type: str = "Warning", seconds: float = 5) -> dict:
    """Seen so many seconds after the job was made."""
    return {
        "metadata": {"name": "e", "resourceVersion": "7"}, "involvedObject": {"kind": kind, "name": name}, "type": type,
        "reason": reason, "message": message, "lastTimestamp": f"{NOW + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}",
    }  # fmt: skip


def pod(reason: str = "ContainerCreating", message: str = "", unscheduled: str = "") -> dict:
    state = {"waiting": {"reason": reason, "message": message}}
    container = {"name": "node", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unscheduled}
    status = {"phase": "Pending", "containerStatuses": [container]}
    if unscheduled:
        status = {"phase": "Pending", "conditions": [why]}
    return {"metadata": {"name": POD, "uid": "p"}, "spec": {"containers": [{"name": "node"}]}, "status": status}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causes")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(runs.RECIPE))
    (folder / "clusters").mkdir()
    profile = {"kind": "kubernetes", "storage": {"claim": "work"}, "job": {"image": "x/y:1"}}
    (folder / "clusters/kube.yaml").write_text(yaml.safe_dump(profile))
    (folder / "clusters/queued.yaml").write_text(yaml.safe_dump(profile | {"queue": "gpus"}))
    return folder


@pytest.fixture(scope="module")
def stand_in():
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def kubeconfig(path, server: StandIn, user: dict) -> str:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": user}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture
def kube(stand_in, folder, monkeypatch, tmp_path):
    stand_in.reset()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path / "config", stand_in, {"token": "t"}))
    return stand_in


@pytest.fixture
def submitted(kube, folder):
    """The record of a job that the stand-in has."""
    if not newest_record(folder / "runs/mine"):
        assert cli.main(["submit", "tiny.yaml", "--on", "kube", "run.name=mine", "job.nodes=1"]) == 0
    return newest_record(folder / "runs/mine")


@pytest.mark.parametrize(
    ("pods", "events", "words"),
    [
        ([], [event("Job", "mine-1-node-0", "FailedCreate", f"Error creating: {QUOTA}")],
         ["Job mine-1-node-0: FailedCreate", "requested: requests.cpu=8", "ResourceQuota team raised"]),
        ([], [event("Job", "mine-1-node-0", "FailedCreate", 'pods "x" is forbidden: failed quota: team: must specify limits.cpu')],
         ["ResourceQuota team requires job.cpus_per_process and job.memory"]),
        ([], [event("Job", "mine-1-node-0", "FailedCreate", 'pods "x" is forbidden: maximum memory usage per Container is 4Gi, but limit is 64Gi')],
         ["is 4Gi", "LimitRange", "see job.memory"]),
        ([], [event("Job", "mine-1-node-0", "FailedCreate", 'error looking up service account a/b: serviceaccount "b" not found')],
         ["see service_account=b in the cluster's profile"]),
        ([], [event("JobSet", "mine-1", "JobCreationFailed", 'admission webhook "policy" denied the request: no team label')],
         ["JobSet mine-1: JobCreationFailed", "no team label"]),
        ([pod(unscheduled='persistentvolumeclaim "work" not found. preemption: 0/1 nodes')], [],
         [f"pod {POD}", 'claim "work" not found: see storage.claim=work in the cluster']),
        ([pod(unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")], [],
         [f"pod {POD}: 0/3 nodes", "have fewer nvidia.com/gpu: see job.processes_per_node"]),
        ([pod(unscheduled="0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.")], [], ["see node_selector"]),
        ([pod("CreateContainerConfigError", 'secret "mlflow" not found')], [],
         [f"pod {POD}: CreateContainerConfigError", "see secrets and image_pull_secrets in the cluster's profile"]),
        ([pod("InvalidImageName", 'couldn\'t parse "X/y"')], [], [f"pod {POD}: InvalidImageName", "see job.image"]),
        ([pod("ImagePullBackOff", 'Back-off pulling image "x/y:1"')],
         [event("Pod", POD, "Failed", 'Failed to pull image "x/y:1": 401 Unauthorized')],
         ["ImagePullBackOff", "401 Unauthorized", "see job.image, and image_pull_secrets"]),
        ([pod()], [event("Pod", POD, "FailedMount", 'MountVolume.SetUp failed for volume "storage" : timed out')],
         [f"pod {POD}: FailedMount", "timed out"]),
        ([pod()], [event("Pod", POD, "FailedMount", 'configmap "mine-1" not found', seconds=1),
                   event("Pod", POD, "Pulling", 'Pulling image "x/y:1"', "Normal", 2)],
         [f'pod {POD}: Pulling image "x/y:1"']),
    ],
)  # fmt: skip
def test_a_wait_says_its_cause_the_object_and_the_cure(kube, submitted, pods, events, words):
    kube.pods, kube.events = pods, events
    status = submitted.profile.backend().status(submitted)
    assert status.state == "pending" and "\n" not in status.reason
    for word in words:
        assert word in status.reason, status.reason


@pytest.mark.parametrize(
    "events",
    [
        [event("Job", "mine-1-node-0", "FailedCreate", QUOTA, seconds=-9)],  # of an earlier job of this name
        [
            event("Job", "mine-1-node-0", "FailedCreate", QUOTA, seconds=1),
            event("Job", "mine-1-node-0", "SuccessfulCreate", "Created pod", "Normal", seconds=3),
        ],
        [event("Job", "mine-1-node-0", "BackoffLimitExceeded", "Job has reached the specified backoff limit")],
        [event("Job", "mine-10-node-0", "FailedCreate", QUOTA)],  # another job's
    ],
)
def test_what_is_over_or_another_job_s_is_no_cause(kube, submitted, events, monkeypatch):
    monkeypatch.setattr(kubernetes_causes, "SILENT", float("inf"))  # however slow this machine is
    kube.events = events
    assert submitted.profile.backend().status(submitted).reason == "its pods are being created"


def test_where_nothing_says_why_that_is_said(kube, submitted):
    backend = submitted.profile.backend()
    kube.refusals["events"] = (403, {"message": "events is forbidden", "code": 403})
    assert "which this user may not list" in backend.status(submitted).reason
    kube.reset()
    kube.age = 600
    assert re.match(r"\d\d minutes without a pod", backend.status(submitted).reason)


def test_a_queued_job_says_what_its_queue_waits_for(kube, folder, capfd):
    kube.made.clear()
    assert cli.main(["submit", "tiny.yaml", "--on", "queued", "run.name=mine2", "job.nodes=1"]) == 0
    record = newest_record(folder / "runs/mine2")
    kube.conditions = [{"type": "Suspended", "status": "True", "message": "jobset is suspended"}]
    assert record.profile.backend().status(record).reason == "waits in Kueue's queue gpus"
    said = "couldn't assign flavors to pod set node: insufficient unused quota for cpu, 3 more needed"
    kube.events = [event("Workload", "jobset-mine2-1-ab123", "Pending", said)]
    assert record.profile.backend().status(record).reason == f"waits in Kueue's queue gpus: {said}"
    kube.made.clear()


def test_status_wait_and_logs_show_it(kube, submitted, capfd, monkeypatch):
    if "JobSet" not in kube.made:
        kube.made["JobSet"] = {"metadata": {"name": "mine-1", "labels": {"powernap.io/token": submitted.submission_id}}}
    kube.events = [event("Job", "mine-1-node-0", "FailedCreate", QUOTA)]
    capfd.readouterr()
    assert cli.main(["status", "mine"]) == 0
    assert "exceeded quota: team" in capfd.readouterr().out
    assert cli.main(["wait", "mine", "--timeout", "1s"]) == 124
    assert "mine is pending: Job mine-1-node-0: FailedCreate" in capfd.readouterr().err
    assert cli.main(["logs", "mine"]) == 0
    printed = capfd.readouterr()
    assert printed.out == "" and "mine is pending: Job mine-1-node-0: FailedCreate" in printed.err


QUOTA_OF_JOBSETS = {
    "message": 'jobsets.jobset.x-k8s.io "x" is forbidden: exceeded quota: team, requested: count/jobsets.jobset.x-k8s.io=1, '
    "used: count/jobsets.jobset.x-k8s.io=4, limited: count/jobsets.jobset.x-k8s.io=4",
    "code": 403,
}


def test_a_quota_on_jobs_is_no_missing_right(kube, folder, capfd):
    kube.refusals["JobSet"] = (403, QUOTA_OF_JOBSETS)
    submit = ["submit", "tiny.yaml", "--on", "kube", "run.name=never", "job.nodes=1"]
    runs.assert_refused(submit, capfd, "refuses to create JobSet", "exceeded quota: team", "end other jobs")
    assert not (folder / "runs/never").exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'first line' >&2; echo 'error: your SSO session has expired, run sso login' >&2; exit 1",
         ["exec plugin", "your SSO session has expired, run sso login"]),
        (None, ["exec plugin", "no-such-plugin", "install it"]),
        ("echo '{}'", ["exec plugin", "malformed response"]),
    ],
)  # fmt: skip
def test_an_exec_plugin_that_fails_is_the_cause(kube, tmp_path, capfd, monkeypatch, script, words):
    plugin = tmp_path / "no-such-plugin"
    if script:
        plugin.write_text(f"#!/bin/sh\n{script}\n")
        plugin.chmod(0o755)
    user = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    }
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path / "config", kube, user))
    submit = ["submit", "tiny.yaml", "--on", "kube", "run.name=never", "job.nodes=1"]
    runs.assert_refused(submit, capfd, *words)


def test_every_cure_fits_what_its_words_find():
    for words, cure in kubernetes_causes.CURES:
        assert cure.count("{}") <= re.compile(words).groups
