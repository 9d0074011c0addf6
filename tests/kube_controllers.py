"""The parts of a Kubernetes cluster that the tests have not: JobSet's and Job's controllers, scheduler and kubelet.

What they do is done as jobset/pkg/controllers and kubernetes/pkg/controller/job do it, for one Indexed Job each: names,
labels, annotations, podFailurePolicy, failurePolicy, conditions, deletion with grace. Pods are real objects of the API
server, their containers local processes, and their logs come back through the API server as from a kubelet.
All nodes of a job share this machine, so its rendezvous is 127.0.0.1 on a port of its own, and a path of a
volume is a local folder: both are replaced in arguments, environment and mounted files.
"""

import base64
import json
import math
import os
import re
import secrets
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from kubernetes import client
from urllib3.exceptions import HTTPError

from kube_cluster import NAMESPACE, KubeCluster, end_with_parent, free_port

KIND = ("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets")
TRAIN_JOBS = ("trainer.kubeflow.org", "v1alpha1", NAMESPACE, "trainjobs")
LABEL = "jobset.sigs.k8s.io/"
INDEX = "batch.kubernetes.io/job-completion-index"


class Kubelet:
    """One node: runs pods as local processes and serves their logs.

    Args:
        folder: for logs, and for the volumes: claims/NAME stands for a PersistentVolumeClaim.
        environment: what the image would bring along, beside PATH and HOME.
        entry_point: of the image, for a container without a command.
    """

    NODE = "node-1"

    def __init__(self, cluster: KubeCluster, folder: Path, environment: dict[str, str], entry_point: list[str]):
        self.folder, self.environment, self.entry_point = folder, environment, entry_point
        self.api = client.CoreV1Api(cluster.clients())
        self.processes: dict[str, subprocess.Popen] = {}  # pod -> its container
        self.kill_at: dict[str, float] = {}
        self.ports: dict[tuple, int] = {}  # attempt of a job -> its MASTER_PORT
        self._serve_logs(cluster.folder)

    def step(self, pods: list[dict]) -> None:
        """Start, stop and report what is due."""
        for pod in pods:
            name = pod["metadata"]["name"]
            if pod["status"]["phase"] == "Pending" and name not in self.processes:
                if "deletionTimestamp" not in pod["metadata"]:
                    self._start(pod)
            elif name in self.processes and pod["status"]["phase"] == "Running":
                code = self.processes[name].poll()
                if code is not None:
                    self._report_end(name, pod, 128 - code if code < 0 else code)
                elif "deletionTimestamp" in pod["metadata"]:
                    self._stop(name, pod["metadata"]["deletionGracePeriodSeconds"])

    def remove(self, pod: dict) -> None:
        """The pod is deleted and has ended: its object goes."""
        with suppress(client.ApiException):
            self.api.delete_namespaced_pod(pod["metadata"]["name"], NAMESPACE, grace_period_seconds=0)

    def stop(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.server.shutdown()
        self.server.server_close()

    def _start(self, pod: dict) -> None:
        name = pod["metadata"]["name"]
        (container,) = pod["spec"]["containers"]
        home = self.folder / "pods" / name
        home.mkdir(parents=True, exist_ok=True)  # tried again, as while the ConfigMap is not there yet
        local = self._replacements(pod)
        for mount, path in self._mounts(pod, container, home):
            local.append((rf"(?<![\w/.-]){re.escape(mount)}(?=$|[^\w.-])", str(path)))
        self._fill_volumes(pod, home, local)
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HOSTNAME": pod["spec"].get("hostname", name)}
        environment |= self.environment
        for entry in container.get("env", []):
            value = self._value(entry, pod)
            if entry["name"].endswith("MASTER_PORT"):
                value = str(self.ports.setdefault(_attempt(pod), free_port()))
            environment[entry["name"]] = _replace(_expand(value, environment), local)
        words = [*container.get("command", self.entry_point), *container.get("args", [])]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [_replace(_expand(word, environment), local) for word in words],
                env=environment,
                cwd=_replace(container["workingDir"], local) if "workingDir" in container else home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._report(name, container, "Running", {"running": {"startedAt": _now()}}, pod)

    def _stop(self, name: str, grace: int) -> None:
        """SIGTERM to the container's first process, SIGKILL to all when the grace period is over."""
        process = self.processes[name]
        if name not in self.kill_at:
            self.kill_at[name] = time.monotonic() + grace
            process.send_signal(signal.SIGTERM)
        elif time.monotonic() > self.kill_at[name]:
            os.killpg(process.pid, signal.SIGKILL)

    def _report_end(self, name: str, pod: dict, code: int) -> None:
        with suppress(ProcessLookupError):  # what the first process left behind ends with its container
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": _now()}
        (container,) = pod["spec"]["containers"]
        self._report(name, container, "Failed" if code else "Succeeded", {"terminated": end}, pod)

    def _report(self, name: str, container: dict, phase: str, state: dict, pod: dict) -> None:
        status = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
        status |= {"ready": phase == "Running", "state": state}
        kept = [one for one in pod["status"].get("conditions", []) if one["type"] != "Ready"]
        ready = {"type": "Ready", "status": str(phase == "Running"), "lastTransitionTime": _now()}
        body = {"phase": phase, "conditions": [*kept, ready], "containerStatuses": [status], "podIP": "127.0.0.1"}
        self.api.patch_namespaced_pod_status(name, NAMESPACE, {"status": body})

    def _replacements(self, pod: dict) -> list[tuple[str, str]]:
        job, subdomain = pod["metadata"]["labels"]["job-name"], pod["spec"].get("subdomain", "")
        return [(rf"\b{re.escape(job)}-\d+\.{re.escape(subdomain)}(\.[\w.-]+)?", "127.0.0.1")]

    def _mounts(self, pod: dict, container: dict, home: Path) -> Iterator[tuple[str, Path]]:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for mount in sorted(container.get("volumeMounts", []), key=lambda one: -len(one["mountPath"])):
            volume = volumes[mount["name"]]
            if "hostPath" in volume:
                path = Path(volume["hostPath"]["path"])
            elif "persistentVolumeClaim" in volume:
                path = self.folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
            else:
                path = home / "volumes" / mount["name"]
            path = path / mount.get("subPath", "")
            if not path.suffix or "subPath" not in mount:  # of a file, only its folder
                path.mkdir(parents=True, exist_ok=True)
            yield mount["mountPath"].rstrip("/"), path

    def _fill_volumes(self, pod: dict, home: Path, local: list[tuple[str, str]]) -> None:
        for volume in pod["spec"].get("volumes", []):
            files = {}
            if "configMap" in volume:
                files = self.api.read_namespaced_config_map(volume["configMap"]["name"], NAMESPACE).data
            elif "secret" in volume:
                found = self.api.read_namespaced_secret(volume["secret"]["secretName"], NAMESPACE).data
                files = {key: base64.b64decode(value).decode() for key, value in found.items()}
            for name, text in files.items():
                path = home / "volumes" / volume["name"] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_replace(text, local))

    def _value(self, entry: dict, pod: dict) -> str:
        source = entry.get("valueFrom")
        if not source:
            return entry.get("value", "")
        if "secretKeyRef" in source:
            where = source["secretKeyRef"]
            return base64.b64decode(
                self.api.read_namespaced_secret(where["name"], NAMESPACE).data[where["key"]]
            ).decode()
        if "configMapKeyRef" in source:
            where = source["configMapKeyRef"]
            return self.api.read_namespaced_config_map(where["name"], NAMESPACE).data[where["key"]]
        path = source["fieldRef"]["fieldPath"]
        if found := re.fullmatch(r"metadata\.(annotations|labels)\['(.+)'\]", path):
            return pod["metadata"][found[1]][found[2]]
        return {"status.podIP": "127.0.0.1", "status.hostIP": "127.0.0.1", "spec.nodeName": self.NODE}.get(path) or str(
            pod["metadata"][path.removeprefix("metadata.")]
        )

    def _serve_logs(self, certificates: Path) -> None:
        kubelet = self

        class Logs(BaseHTTPRequestHandler):
            def do_GET(self):
                address = urlsplit(self.path)
                name = address.path.split("/")[3]  # /containerLogs/NAMESPACE/POD/CONTAINER
                asked = parse_qs(address.query)
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # whoever read has left
                    for part in kubelet.read_log(name, asked.get("follow") == ["true"], asked.get("tailLines")):
                        self.wfile.write(part)
                        self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Logs)
        self.server.daemon_threads = True
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trusted.load_cert_chain(certificates / "apiserver.crt", certificates / "apiserver.key")
        self.server.socket = trusted.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.server.server_port}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        with suppress(client.ApiException):  # it is there from the kubelet before this one
            self.api.create_node({"metadata": {"name": self.NODE}})
        self.api.patch_node_status(self.NODE, {"status": status})

    def read_log(self, pod: str, follow: bool, tail: list[str] | None) -> Iterator[bytes]:
        """A pod's output, in parts; following it until its container has ended."""
        with (self.folder / f"{pod}.log").open("rb") as file:
            if tail:
                yield b"".join(file.readlines()[-int(tail[0]) :])
            while True:
                ended = self.processes[pod].poll() is not None
                if part := file.read():
                    yield part
                elif ended or not follow:
                    return
                time.sleep(0.05 if follow else 0)


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
        self.verdicts: dict[tuple, str] = {}  # attempt of a job -> why it fails, once its other pods are gone
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
        """What draining a node, or a pod of higher priority, does: the condition, then SIGTERM and the grace period."""
        why = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
            "lastTransitionTime": _now(),
        }
        self.api.patch_namespaced_pod_status(pod, NAMESPACE, {"status": {"conditions": [why]}})
        self.api.delete_namespaced_pod(pod, NAMESPACE)

    def _work(self) -> None:
        while not self.ending.wait(0.05):
            with suppress(client.ApiException, HTTPError, OSError):  # the server is away, or somebody was faster
                self._make_jobsets()
                self.kubelet.step(self._pods())
                pods = self._pods()
                alive = set()
                for jobset in self.jobsets.list_namespaced_custom_object(*KIND)["items"]:
                    alive.add(jobset["metadata"]["uid"])
                    self._reconcile(jobset, [pod for pod in pods if _owner(pod) == jobset["metadata"]["uid"]])
                for pod in pods:
                    if "deletionTimestamp" in pod["metadata"]:
                        if pod["status"]["phase"] in ("Succeeded", "Failed", "Pending"):
                            self.kubelet.remove(pod)
                    elif _owner(pod) not in alive:  # deleted in the background
                        self._delete([pod])

    def _make_jobsets(self) -> None:
        """What Trainer does: a JobSet for each TrainJob, of its TrainingRuntime; the conditions of the one for the other."""
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
        # As the server writes it: the client's objects rename fields.
        found = self.api.list_namespaced_pod(NAMESPACE, _preload_content=False)
        return [
            pod for pod in json.loads(found.data)["items"] if LABEL + "jobset-name" in pod["metadata"].get("labels", {})
        ]

    def _delete(self, pods: list[dict]) -> bool:
        """Whether none is left."""
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self.api.delete_namespaced_pod(pod["metadata"]["name"], NAMESPACE)
        return not pods

    def _reconcile(self, jobset: dict, pods: list[dict]) -> None:
        spec, status = jobset["spec"], jobset.setdefault("status", {})
        conditions = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
        if "deletionTimestamp" in jobset["metadata"]:
            if self._delete(pods):  # in the foreground: it goes when all it owns has gone
                # The garbage collector's own; others hold the object until they are taken away.
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
        if key not in self.verdicts:
            failed = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
            rules = [_matching_rule(job, pod) for pod in failed]
            if "FailJob" in rules:
                self.verdicts[key] = "PodFailurePolicy"
            elif len(rules) - rules.count("Ignore") > job.get("backoffLimit", 6):
                self.verdicts[key] = "BackoffLimitExceeded"
            elif time.monotonic() - self.started.get(key, math.inf) > job.get("activeDeadlineSeconds", math.inf):
                self.verdicts[key] = "DeadlineExceeded"
        if key in self.verdicts:  # the Job has failed when its other pods have ended
            left = [pod for pod in pods if not _ended(pod)]
            if self._delete(left):
                self._apply_failure_policy(jobset, replicated["name"], self.verdicts[key])
            return
        done = {pod["metadata"]["annotations"][INDEX] for pod in pods if pod["status"]["phase"] == "Succeeded"}
        if len(done) == job["completions"]:
            message = "jobset completed successfully"
            self._set(jobset, "Completed", "AllJobsCompleted", message, terminalState="Completed")
            return
        there = {pod["metadata"]["annotations"][INDEX] for pod in pods if pod["status"]["phase"] != "Failed"}
        self.started.setdefault(key, time.monotonic())
        for index in range(job["completions"]):
            if str(index) not in there:
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
        spec["nodeName"] = Kubelet.NODE  # the scheduler's part
        if network.get("enableDNSHostnames", True):
            spec |= {"hostname": f"{job}-{index}", "subdomain": network.get("subdomain", name)}
        for container in spec["containers"]:
            source = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
            container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
        given = template.get("metadata", {})
        return {
            "metadata": {
                "name": f"{job}-{index}-{secrets.token_hex(3)[:5]}",
                "labels": given.get("labels", {}) | marks | labels,
                "annotations": given.get("annotations", {}) | marks,
            },
            "spec": spec,
        }

    def _set(self, jobset: dict, kind: str, reason: str, message: str, status: str = "True", **more) -> None:
        new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _now()}
        kept = [one for one in jobset["status"].get("conditions", []) if one["type"] != kind]
        self._patch(jobset, {"status": {"conditions": [*kept, new], **more}}, status=True)

    def _patch(self, jobset: dict, body: dict, status: bool = False) -> None:
        change = self.jobsets.patch_namespaced_custom_object
        if status:
            change = self.jobsets.patch_namespaced_custom_object_status
        change(*KIND, jobset["metadata"]["name"], body)


def _jobset_of(train_job: dict, runtime: dict) -> dict:
    """What the torch plugin makes: the template, with the TrainJob's trainer and torchrun's PET_* in its container."""
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
    given = {entry["name"]: entry for entry in [*container.get("env", []), *trainer.get("env", [])]}
    container["env"] = [*given.values(), *(torchrun if "torch" in runtime.get("mlPolicy", {}) else [])]
    spec["suspend"] = train_job["spec"].get("suspend", False)
    metadata = {"name": name, "annotations": {"trainer.kubeflow.org/trainjob": name}}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _matching_rule(job: dict, pod: dict) -> str:
    """What the podFailurePolicy says of a failed pod: the action of its first rule that matches, or Count."""
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


def _owner(pod: dict) -> str:
    return pod["metadata"]["labels"][LABEL + "jobset-uid"]


def _attempt(pod: dict) -> tuple:
    return _owner(pod), pod["metadata"]["labels"][LABEL + "restart-attempt"]


def _replace(text: str, local: list[tuple[str, str]]) -> str:
    """All at once: what one puts in is not for another to replace. The first that fits wins."""
    patterns = "|".join(f"(?P<local{number}>{pattern})" for number, (pattern, _) in enumerate(local))
    return re.sub(patterns, lambda found: local[int(found.lastgroup.removeprefix("local"))][1], text)


def _expand(text: str, environment: dict[str, str]) -> str:
    """Kubernetes' own $(NAME); one that is not set stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
