"""What stands in for a Kubernetes cluster in these tests behaves like one, where powernap depends on it."""

import copy
import time

import pytest

from tests.helpers import kube_schema
from tests.helpers.kube_cluster import NAMESPACE

pytestmark = pytest.mark.clusters

KIND = ("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets")


def jobset(name: str, script: str, **more) -> dict:
    """Two pods that run the script; exit code 75 and evictions are uncounted, other failures counted."""
    container = {
        "name": "node",
        "image": "none",
        "command": ["sh", "-c", script],
        "env": [
            {"name": "MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
            {"name": "MASTER_PORT", "value": "29500"},
            {"name": "RUN", "value": "/runs/$(JOB)"},
            {"name": "JOB", "value": name},
        ],
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}, {"name": "recipe", "mountPath": "/etc/recipe"}],
    }
    container["env"].reverse()
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 20,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
            {"name": "recipe", "configMap": {"name": "recipe"}},
        ],
    }
    rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [75]}},
    ]
    job = {
        "completions": 2,
        "parallelism": 2,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    uncounted = {
        "name": "uncounted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": 1, "restartStrategy": "BlockingRecreate", "rules": [uncounted]},
            "replicatedJobs": [
                {"name": "node", "template": {"spec": job | {"podFailurePolicy": {"rules": rules}}}},
            ],
            **more,
        },
    }


@pytest.fixture(scope="module")
def custom(kube):
    from kubernetes import client

    return client.CustomObjectsApi(kube.clients("submitter"))


@pytest.fixture(scope="module")
def core(kube):
    from kubernetes import client

    return client.CoreV1Api(kube.clients("submitter"))


@pytest.fixture(scope="module")
def controller(kube, core, tmp_path_factory):
    from tests.helpers.kube_controllers import JobSetController

    core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "recipe"}, "data": {"path": "in /runs/here"}})
    with JobSetController(kube, tmp_path_factory.mktemp("node")) as controller:
        yield controller


def wait_for(what, seconds: float = 30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


def finished(custom, name: str) -> dict:
    """status of a job set, when it has ended"""
    return wait_for(
        lambda: (s := custom.get_namespaced_custom_object(*KIND, name).get("status", {})).get("terminalState") and s
    )


def pods_of(core, name: str, count: int = 2) -> list:
    def running():
        pods = core.list_namespaced_pod(NAMESPACE, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}").items
        return len(pods) == count and all(pod.status.phase == "Running" for pod in pods) and pods

    return wait_for(running)


def status_of(error) -> int:
    return error.value.status


def test_rights_and_schemas(kube, custom):
    from kubernetes import client

    first = jobset("first", "true")
    stored = custom.create_namespaced_custom_object(*KIND, first)
    assert kube_schema.dropped_fields(first, stored) == []
    with pytest.raises(client.ApiException) as again:
        custom.create_namespaced_custom_object(*KIND, first)
    assert status_of(again) == 409
    wrong = jobset("second", "true")
    wrong["spec"]["failurePolicy"]["restartStrategy"] = "BlockingRestart"
    with pytest.raises(client.ApiException) as refused:
        custom.create_namespaced_custom_object(*KIND, wrong)
    assert status_of(refused) == 422 and "BlockingRestart" in refused.value.body
    for user, code in (("reader", 403), ("stranger", 401)):
        with pytest.raises(client.ApiException) as refused:
            client.CustomObjectsApi(kube.clients(user)).create_namespaced_custom_object(*KIND, wrong)
        assert status_of(refused) == code
    # A misspelled field is dropped without a word by this old server: the tests must look.
    misspelled = copy.deepcopy(first) | {"metadata": {"name": "third"}}
    misspelled["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    stored = custom.create_namespaced_custom_object(*KIND, misspelled)
    assert kube_schema.dropped_fields(misspelled, stored) == ["spec.replicatedJobs[0].template.spec.backofLimit"]
    for name in ("first", "third"):
        custom.delete_namespaced_custom_object(*KIND, name)


def test_preemption_is_uncounted_and_a_crash_is_counted(custom, core, controller):
    script = """mkdir -p $RUN; echo attempt >> $RUN/$JOB_COMPLETION_INDEX; n=$(wc -l < $RUN/$JOB_COMPLETION_INDEX)
    echo "n=$n $MASTER_ADDR $(cat /etc/recipe/path)"
    [ $n = 1 ] && exit 75; [ $n = 2 ] && exit 1; exit 0"""
    custom.create_namespaced_custom_object(*KIND, jobset("twice", script))
    status = finished(custom, "twice")
    assert (status["terminalState"], status["restarts"], status["restartsCountTowardsMax"]) == ("Completed", 2, 1)
    assert (controller.claims / "runs" / "twice" / "1").read_text() == "attempt\n" * 3
    pods = core.list_namespaced_pod(NAMESPACE, label_selector="jobset.sigs.k8s.io/jobset-name=twice").items
    log = core.read_namespaced_pod_log(pods[0].metadata.name, NAMESPACE, _preload_content=False).data.decode()
    assert log == f"n=3 127.0.0.1 in {controller.claims}/runs/here\n"


def test_only_the_rules_make_a_failure_uncounted(custom, controller):
    custom.create_namespaced_custom_object(*KIND, jobset("crash", "exit 1"))
    without = jobset("plain", "exit 75")
    del without["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    custom.create_namespaced_custom_object(*KIND, without)
    for name in ("crash", "plain"):
        status = finished(custom, name)
        assert (status["terminalState"], status["restarts"], status["restartsCountTowardsMax"]) == ("Failed", 1, 1)
        assert status["conditions"][0]["reason"] == "ReachedMaxRestarts"


def test_an_evicted_node_takes_its_gang_along(custom, core, controller):
    waits = "trap 'echo stopped; exit 75' TERM; [ $n -gt 1 ] || while :; do sleep 0.05; done"
    script = f"mkdir -p $RUN; f=$RUN/$JOB_COMPLETION_INDEX; echo >> $f; n=$(wc -l < $f); echo ready; {waits}"
    custom.create_namespaced_custom_object(*KIND, jobset("gang", script))
    pods = pods_of(core, "gang")
    lines = core.read_namespaced_pod_log(pods[0].metadata.name, NAMESPACE, follow=True, _preload_content=False).stream()
    assert next(lines) == b"ready\n"
    controller.evict(pods[1].metadata.name)
    assert b"".join(lines) == b"stopped\n"  # the other one is asked to stop, too, and its log ends with it
    status = finished(custom, "gang")
    assert (status["terminalState"], status["restarts"], status["restartsCountTowardsMax"]) == ("Completed", 1, 0)


def test_suspended_and_deleted(custom, core, controller):
    spec = jobset("queued", "echo up; sleep 100", suspend=True)
    custom.create_namespaced_custom_object(*KIND, spec)
    wait_for(lambda: custom.get_namespaced_custom_object(*KIND, "queued").get("status"))
    label = "jobset.sigs.k8s.io/jobset-name=queued"
    assert not core.list_namespaced_pod(NAMESPACE, label_selector=label).items
    custom.patch_namespaced_custom_object(*KIND, "queued", {"spec": {"suspend": False}})
    pods_of(core, "queued")
    custom.delete_namespaced_custom_object(*KIND, "queued", propagation_policy="Foreground")
    wait_for(lambda: not core.list_namespaced_pod(NAMESPACE, label_selector=label).items)
    wait_for(
        lambda: "queued"
        not in [one["metadata"]["name"] for one in custom.list_namespaced_custom_object(*KIND)["items"]]
    )


def test_a_time_limit_is_its_own_reason(custom, controller):
    script = "trap 'exit 75' TERM; f=$RUN-$JOB_COMPLETION_INDEX; echo >> $f; [ $(wc -l < $f) = 2 ] || while :; do sleep 0.05; done"
    spec = jobset("late", script)
    spec["spec"]["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] = 1
    spec["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] = ["DeadlineExceeded"]
    custom.create_namespaced_custom_object(*KIND, spec)
    status = finished(custom, "late")
    assert (status["terminalState"], status["restarts"], status["restartsCountTowardsMax"]) == ("Completed", 1, 0)


def test_a_train_job_becomes_a_jobset(custom, core, controller):
    from tests.helpers.kube_controllers import TRAIN_JOBS

    trainer = TRAIN_JOBS[:3]
    template = jobset("trained", "echo $PET_NODE_RANK of $PET_NNODES at $PET_MASTER_ADDR")
    template["spec"]["replicatedJobs"][0]["template"]["metadata"] = {
        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    }
    runtime = {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": template["spec"]}}
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "metadata": {"name": "trained"}}
    body = {"kind": "TrainingRuntime", **kind, "spec": runtime}
    custom.create_namespaced_custom_object(*trainer, "trainingruntimes", body)
    reference = {"name": "trained", "kind": "TrainingRuntime"}
    body = {"kind": "TrainJob", **kind, "spec": {"runtimeRef": reference, "trainer": {"numNodes": 2}}}
    custom.create_namespaced_custom_object(*TRAIN_JOBS, body)

    def condition():
        found = custom.get_namespaced_custom_object(*TRAIN_JOBS, "trained").get("status", {}).get("conditions")
        return found and found[-1]["type"]

    assert wait_for(condition) == "Complete"
    pods = core.list_namespaced_pod(NAMESPACE, label_selector="jobset.sigs.k8s.io/jobset-name=trained").items
    logs = [core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE, _preload_content=False).data for pod in pods]
    assert sorted(logs) == [b"0 of 2 at 127.0.0.1\n", b"1 of 2 at 127.0.0.1\n"]


def test_a_restarted_server_ends_watches_and_forgets(kube, custom):
    from kubernetes import client, watch

    version = custom.list_namespaced_custom_object(*KIND)["metadata"]["resourceVersion"]
    custom.create_namespaced_custom_object(*KIND, jobset("kept", "true", suspend=True))
    seen = watch.Watch().stream(custom.list_namespaced_custom_object, *KIND, resource_version=version)
    assert next(seen)["type"] == "ADDED"
    kube.restart()
    assert custom.get_namespaced_custom_object(*KIND, "kept")
    kube.forget_history()
    with pytest.raises(client.ApiException) as gone:
        list(watch.Watch().stream(custom.list_namespaced_custom_object, *KIND, resource_version=version))
    assert status_of(gone) == 410


def test_nothing_is_left_of_a_stopped_cluster(kube):
    processes = list(kube.processes.values())
    assert len(processes) == 2 and all(process.poll() is None for process in processes)
    kube.stop()
    assert all(process.poll() is not None for process in processes)
