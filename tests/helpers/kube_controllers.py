"""The parts of a Kubernetes cluster that the tests lack: the controllers of JobSet, Job and Trainer, and the scheduler.

They follow jobset/pkg/controllers and kubernetes/pkg/controller/job, for JobSets of one Indexed Job: names, labels,
annotations, podFailurePolicy, failurePolicy, conditions, deletion with grace. Pods run on the node of kube_node.py.
"""

import json
import math
import secrets
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from kubernetes import client
from urllib3.exceptions import HTTPError

from tests.helpers.kube_cluster import NAMESPACE, KubeCluster
from tests.helpers.kube_node import LABEL, Kubelet, now, owner_of

KIND = ("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets")
TRAIN_JOBS = ("trainer.kubeflow.org", "v1alpha1", NAMESPACE, "trainjobs")
INDEX = "batch.kubernetes.io/job-completion-index"


class JobSetController:
    """Plays all controllers in a thread, Kubeflow Trainer's too; use as a context manager. Arguments as for Kubelet.

    Attributes:
        claims: folder that holds the PersistentVolumeClaims' folders.
    """

    def __init__(
        self,
        cluster: KubeCluster,
        folder: Path,
        environment: dict[str, str] | None = None,
        entry_point: list[str] | None = None,
    ):
        self.kubelet = Kubelet(cluster, folder, environment or {}, entry_point or [])
        self.claims = folder / "claims"
        self.api, self.jobsets = self.kubelet.api, client.CustomObjectsApi(self.kubelet.api.api_client)
        self.failure_reasons: dict[
            tuple, str
        ] = {}  # attempt of a job -> why it fails, as soon as its other pods are gone
        self.started: dict[tuple, float] = {}
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.thread.join()
        self.kubelet.stop()

    def evict(self, pod: str) -> None:
        """Evict as a node drain or a pod of higher priority does: the condition, then SIGTERM and the grace period."""
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "lastTransitionTime": now(),
        }
        self.api.patch_namespaced_pod_status(pod, NAMESPACE, {"status": {"conditions": [condition]}})
        self.api.delete_namespaced_pod(pod, NAMESPACE)

    def _work(self) -> None:
        while not self.ending.wait(0.05):
            with suppress(client.ApiException, HTTPError, OSError):  # the server is down, or a conflicting change
                self._make_jobsets()
                self.kubelet.step(self._pods())
                pods = self._pods()
                alive = set()
                for jobset in self.jobsets.list_namespaced_custom_object(*KIND)["items"]:
                    alive.add(jobset["metadata"]["uid"])
                    self._reconcile(jobset, [pod for pod in pods if owner_of(pod) == jobset["metadata"]["uid"]])
                for pod in pods:
                    if "deletionTimestamp" in pod["metadata"]:
                        if pod["status"]["phase"] in ("Succeeded", "Failed", "Pending"):
                            self.kubelet.remove(pod)
                    elif owner_of(pod) not in alive:  # deleted in the background
                        self._delete([pod])
                self._collect_garbage()

    def _collect_garbage(self) -> None:
        """Delete ConfigMaps whose owner is gone."""
        configs = self.api.list_namespaced_config_map(NAMESPACE).items  # before their owners, which are created first
        owners = set()
        for kind in (KIND, TRAIN_JOBS):
            jobs = self.jobsets.list_namespaced_custom_object(*kind)["items"]
            owners |= {job["metadata"]["uid"] for job in jobs}
        for config in configs:
            if any(owner.uid not in owners for owner in config.metadata.owner_references or []):
                self.api.delete_namespaced_config_map(config.metadata.name, NAMESPACE)

    def _make_jobsets(self) -> None:
        """As Trainer does: create a JobSet for each TrainJob from its TrainingRuntime, and copy back its conditions."""
        known = {one["metadata"]["name"]: one for one in self.jobsets.list_namespaced_custom_object(*KIND)["items"]}
        trained = {
            one["metadata"]["name"]: one for one in self.jobsets.list_namespaced_custom_object(*TRAIN_JOBS)["items"]
        }
        for name, train_job in trained.items():
            if name not in known:
                runtime = train_job["spec"]["runtimeRef"]["name"]
                runtime = self.jobsets.get_namespaced_custom_object(*TRAIN_JOBS[:3], "trainingruntimes", runtime)
                self.jobsets.create_namespaced_custom_object(*KIND, _jobset_of(train_job, runtime["spec"]))
            elif conditions := known[name].get("status", {}).get("conditions"):
                renamed = [one | {"type": one["type"].replace("Completed", "Complete")} for one in conditions]
                if renamed != train_job.get("status", {}).get("conditions"):
                    body = {"status": {"conditions": renamed}}
                    self.jobsets.patch_namespaced_custom_object_status(*TRAIN_JOBS, name, body)
        for name, jobset in known.items():
            if "trainer.kubeflow.org/trainjob" in jobset["metadata"].get("annotations", {}) and name not in trained:
                self.jobsets.delete_namespaced_custom_object(*KIND, name)

    def _pods(self) -> list[dict]:
        # The server's JSON: the client's objects rename fields.
        pods = json.loads(self.api.list_namespaced_pod(NAMESPACE, _preload_content=False).data)["items"]
        return [pod for pod in pods if LABEL + "jobset-name" in pod["metadata"].get("labels", {})]

    def _delete(self, pods: list[dict]) -> bool:
        """Delete pods; return whether there are none any more."""
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self.api.delete_namespaced_pod(pod["metadata"]["name"], NAMESPACE)
        return not pods

    def _reconcile(self, jobset: dict, pods: list[dict]) -> None:
        spec, status = jobset["spec"], jobset.setdefault("status", {})
        conditions = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
        if "deletionTimestamp" in jobset["metadata"]:
            if self._delete(pods):  # foreground deletion: after everything it owns
                # Without the garbage collector's finalizer; the others keep the object until they are removed.
                others = [one for one in jobset["metadata"].get("finalizers", []) if one != "foregroundDeletion"]
                if len(others) < len(jobset["metadata"].get("finalizers", [])):
                    self._patch(jobset, {"metadata": {"finalizers": others}})
            return
        if finished := conditions.get("Completed") or conditions.get("Failed"):
            self._delete([pod for pod in pods if not _ended(pod)])
            since = datetime.now(UTC) - datetime.fromisoformat(finished["lastTransitionTime"])
            if since.total_seconds() > spec.get("ttlSecondsAfterFinished", math.inf):
                self.jobsets.delete_namespaced_custom_object(*KIND, jobset["metadata"]["name"])
            return
        if spec.get("suspend"):
            self._delete([pod for pod in pods if not _ended(pod)])
            self.started.pop((jobset["metadata"]["uid"], status.get("restarts", 0)), None)
            if "Suspended" not in conditions:
                self._set(jobset, "Suspended", "SuspendedJobs", "jobset is suspended")
            return
        if "Suspended" in conditions:
            self._set(jobset, "Suspended", "ResumeJobs", "jobset is resumed", "False")
        restarts = status.get("restarts", 0)
        stale = [pod for pod in pods if pod["metadata"]["labels"][LABEL + "restart-attempt"] != str(restarts)]
        if not self._delete(stale):
            return
        self._run_job(jobset, pods, restarts)

    def _run_job(self, jobset: dict, pods: list[dict], restarts: int) -> None:
        """The one Job of the set, as the Job controller runs it."""
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job, key = replicated["template"]["spec"], (jobset["metadata"]["uid"], restarts)
        if key not in self.failure_reasons:
            failed = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
            rules = [_matching_rule(job, pod) for pod in failed]
            if "FailJob" in rules:
                self.failure_reasons[key] = "PodFailurePolicy"
            elif len(rules) - rules.count("Ignore") > job.get("backoffLimit", 6):
                self.failure_reasons[key] = "BackoffLimitExceeded"
            elif time.monotonic() - self.started.get(key, math.inf) > job.get("activeDeadlineSeconds", math.inf):
                self.failure_reasons[key] = "DeadlineExceeded"
        if key in self.failure_reasons:  # the Job has failed when its other pods have ended
            if self._delete([pod for pod in pods if not _ended(pod)]):
                self._apply_failure_policy(jobset, replicated["name"], self.failure_reasons[key])
            return
        done = {pod["metadata"]["annotations"][INDEX] for pod in pods if pod["status"]["phase"] == "Succeeded"}
        if len(done) == job["completions"]:
            message = "jobset completed successfully"
            self._set(jobset, "Completed", "AllJobsCompleted", message, terminalState="Completed")
            return
        existing = {pod["metadata"]["annotations"][INDEX] for pod in pods if pod["status"]["phase"] != "Failed"}
        self.started.setdefault(key, time.monotonic())
        for index in range(job["completions"]):
            if str(index) not in existing:
                self.api.create_namespaced_pod(NAMESPACE, self._pod(jobset, replicated, index, restarts))

    def _apply_failure_policy(self, jobset: dict, replicated: str, reason: str) -> None:
        status, policy = jobset["status"], jobset["spec"].get("failurePolicy")
        first = f" (first failed job: {jobset['metadata']['name']}-{replicated}-0)"

        def fail(reason: str, message: str) -> None:
            self._set(jobset, "Failed", reason, message + first, terminalState="Failed")

        if policy is None:
            return fail("FailedJobs", "jobset failed due to one or more job failures")
        action = "RestartJobSet"
        for rule in policy.get("rules", []):
            if reason in (rule.get("onJobFailureReasons") or [reason]):
                action = rule["action"]
                break
        counted = status.get("restartsCountTowardsMax", 0)
        if action == "FailJobSet":
            return fail("FailJobSetFailurePolicyAction", "applying FailJobSet failure policy action")
        if action == "RestartJobSet" and counted >= policy.get("maxRestarts", 0):
            return fail("ReachedMaxRestarts", "jobset failed due to reaching max number of restarts")
        new = {
            "restarts": status.get("restarts", 0) + 1,
            "restartsCountTowardsMax": counted + (action == "RestartJobSet"),
        }
        self._patch(jobset, {"status": new}, status=True)

    def _pod(self, jobset: dict, replicated: dict, index: int, restarts: int) -> dict:
        template = replicated["template"]["spec"]["template"]
        name = jobset["metadata"]["name"]
        job = f"{name}-{replicated['name']}-0"
        network = jobset["spec"].get("network", {})
        marks = {
            LABEL + "jobset-name": name,
            LABEL + "jobset-uid": jobset["metadata"]["uid"],
            LABEL + "replicatedjob-name": replicated["name"],
            LABEL + "replicatedjob-replicas": "1",
            LABEL + "job-index": "0",
            LABEL + "job-global-index": "0",
            LABEL + "restart-attempt": str(restarts),
            INDEX: str(index),
        }
        labels = {"job-name": job, "batch.kubernetes.io/job-name": job}
        spec = json.loads(json.dumps(template["spec"]))
        spec["nodeName"] = Kubelet.NODE  # as the scheduler does
        if network.get("enableDNSHostnames", True):
            spec |= {"hostname": f"{job}-{index}", "subdomain": network.get("subdomain", name)}
        for container in spec["containers"]:
            source = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
            container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
        metadata = template.get("metadata", {})
        return {
            "metadata": {
                "name": f"{job}-{index}-{secrets.token_hex(3)[:5]}",
                "labels": metadata.get("labels", {}) | marks | labels,
                "annotations": metadata.get("annotations", {}) | marks,
            },
            "spec": spec,
        }

    def _set(self, jobset: dict, kind: str, reason: str, message: str, status: str = "True", **more) -> None:
        new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}
        kept = [one for one in jobset["status"].get("conditions", []) if one["type"] != kind]
        self._patch(jobset, {"status": {"conditions": [*kept, new], **more}}, status=True)

    def _patch(self, jobset: dict, body: dict, status: bool = False) -> None:
        change = self.jobsets.patch_namespaced_custom_object
        if status:
            change = self.jobsets.patch_namespaced_custom_object_status
        change(*KIND, jobset["metadata"]["name"], body)


def _jobset_of(train_job: dict, runtime: dict) -> dict:
    """As Trainer's torch plugin does: the template with the TrainJob's trainer, and torchrun's PET_* in its container."""
    name, trainer = train_job["metadata"]["name"], train_job["spec"].get("trainer", {})
    spec = runtime["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    job = replicated["template"]["spec"]
    job["parallelism"] = job["completions"] = trainer.get("numNodes", runtime.get("mlPolicy", {}).get("numNodes", 1))
    job.setdefault("completionMode", "Indexed")
    (container,) = [one for one in job["template"]["spec"]["containers"] if one["name"] == "node"]
    container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    container["resources"] = trainer.get("resourcesPerNode", container.get("resources", {}))
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
    torchrun = [
        {"name": "PET_NNODES", "value": str(job["completions"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer.get("numProcPerNode", "auto"))},
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    variables = {entry["name"]: entry for entry in [*container.get("env", []), *trainer.get("env", [])]}
    container["env"] = [*variables.values(), *(torchrun if "torch" in runtime.get("mlPolicy", {}) else [])]
    spec["suspend"] = train_job["spec"].get("suspend", False)
    metadata = {"name": name, "annotations": {"trainer.kubeflow.org/trainjob": name}}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _matching_rule(job: dict, pod: dict) -> str:
    """The action of the podFailurePolicy for a failed pod: that of the first matching rule, or Count."""

    (container,) = pod["status"]["containerStatuses"]
    conditions = [(one["type"], one["status"]) for one in pod["status"].get("conditions", [])]
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        codes = rule.get("onExitCodes")
        if codes and codes.get("containerName") in (None, container["name"]):
            if (container["state"]["terminated"]["exitCode"] in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
        patterns = [(one["type"], one.get("status", "True")) for one in rule.get("onPodConditions", [])]
        if any(pattern in conditions for pattern in patterns):
            return rule["action"]
    return "Count"


def _ended(pod: dict) -> bool:
    return pod["status"]["phase"] in ("Succeeded", "Failed")
