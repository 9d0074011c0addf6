"""A node of a Kubernetes cluster for tests: a kubelet whose containers are local processes.

Pods are real objects of the API server, which also serves their logs as if from a kubelet. All nodes of a job share this
machine, so its rendezvous is 127.0.0.1 on a port of its own, and volumes are local folders: both are replaced in arguments,
environment and mounted files.
"""

import base64
import os
import re
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

from tests.helpers.kube_cluster import NAMESPACE, KubeCluster, end_with_parent, free_port

LABEL = "jobset.sigs.k8s.io/"


class Kubelet:
    """One node: runs pods as local processes and serves their logs.

    Args:
        folder: for logs, and for the volumes: claims/NAME stands for a PersistentVolumeClaim.
        environment: variables of the image, besides PATH and HOME.
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
        """Start, stop and report pods as due."""
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
        """Remove the object of a deleted pod that has ended."""
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
        home.mkdir(parents=True, exist_ok=True)  # exists on a retry, as while the ConfigMap is missing
        local = self._replacements(pod)
        for mount, path in self._mounts(pod, container, home):
            local.append((rf"(?<![\w/.-]){re.escape(mount)}(?=$|[^\w.-])", str(path)))
        self._fill_volumes(pod, home, local)
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HOSTNAME": pod["spec"].get("hostname", name)}
        environment |= self.environment
        for entry in container.get("env", []):
            value = self._value(entry, pod)
            if entry["name"].endswith("MASTER_PORT"):
                value = str(self.ports.setdefault(attempt_of(pod), free_port()))
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
        self._report(name, container, "Running", {"running": {"startedAt": now()}}, pod)

    def _stop(self, name: str, grace: int) -> None:
        """SIGTERM to the container's first process, SIGKILL to all when the grace period is over."""
        process = self.processes[name]
        if name not in self.kill_at:
            self.kill_at[name] = time.monotonic() + grace
            process.send_signal(signal.SIGTERM)
        elif time.monotonic() > self.kill_at[name]:
            os.killpg(process.pid, signal.SIGKILL)

    def _report_end(self, name: str, pod: dict, code: int) -> None:
        with suppress(ProcessLookupError):  # a container ends with its first process
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}
        (container,) = pod["spec"]["containers"]
        self._report(name, container, "Failed" if code else "Succeeded", {"terminated": end}, pod)

    def _report(self, name: str, container: dict, phase: str, state: dict, pod: dict) -> None:
        status = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
        status |= {"ready": phase == "Running", "state": state}
        kept = [one for one in pod["status"].get("conditions", []) if one["type"] != "Ready"]
        ready = {"type": "Ready", "status": str(phase == "Running"), "lastTransitionTime": now()}
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
            if not path.suffix or "subPath" not in mount:  # not for a file
                path.mkdir(parents=True, exist_ok=True)
            yield mount["mountPath"].rstrip("/"), path

    def _fill_volumes(self, pod: dict, home: Path, local: list[tuple[str, str]]) -> None:
        for volume in pod["spec"].get("volumes", []):
            files = {}
            if "configMap" in volume:
                files = self.api.read_namespaced_config_map(volume["configMap"]["name"], NAMESPACE).data
            elif "secret" in volume:
                encoded = self.api.read_namespaced_secret(volume["secret"]["secretName"], NAMESPACE).data
                files = {key: base64.b64decode(value).decode() for key, value in encoded.items()}
            for name, text in files.items():
                path = home / "volumes" / volume["name"] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_replace(text, local))

    def _value(self, entry: dict, pod: dict) -> str:
        source = entry.get("valueFrom")
        if not source:
            return entry.get("value", "")
        if "secretKeyRef" in source:
            key = source["secretKeyRef"]
            return base64.b64decode(self.api.read_namespaced_secret(key["name"], NAMESPACE).data[key["key"]]).decode()
        if "configMapKeyRef" in source:
            key = source["configMapKeyRef"]
            return self.api.read_namespaced_config_map(key["name"], NAMESPACE).data[key["key"]]
        path = source["fieldRef"]["fieldPath"]
        if match := re.fullmatch(r"metadata\.(annotations|labels)\['(.+)'\]", path):
            return pod["metadata"][match[1]][match[2]]
        return {"status.podIP": "127.0.0.1", "status.hostIP": "127.0.0.1", "spec.nodeName": self.NODE}.get(path) or str(
            pod["metadata"][path.removeprefix("metadata.")]
        )

    def _serve_logs(self, certificates: Path) -> None:
        kubelet = self

        class Logs(BaseHTTPRequestHandler):
            def do_GET(self):
                address = urlsplit(self.path)
                name = address.path.split("/")[3]  # /containerLogs/NAMESPACE/POD/CONTAINER
                query = parse_qs(address.query)
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # the reader has disconnected
                    for part in kubelet.read_log(name, query.get("follow") == ["true"], query.get("tailLines")):
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
        with suppress(client.ApiException):  # an earlier kubelet has created it
            self.api.create_node({"metadata": {"name": self.NODE}})
        self.api.patch_node_status(self.NODE, {"status": status})

    def read_log(self, pod: str, follow: bool, tail: list[str] | None) -> Iterator[bytes]:
        """A pod's output in parts; with `follow` until its container has ended."""
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


def _replace(text: str, local: list[tuple[str, str]]) -> str:
    """Replace all patterns in one pass, so that no replacement is replaced again. The first that matches wins."""
    patterns = "|".join(f"(?P<local{number}>{pattern})" for number, (pattern, _) in enumerate(local))
    return re.sub(patterns, lambda match: local[int(match.lastgroup.removeprefix("local"))][1], text)


def _expand(text: str, environment: dict[str, str]) -> str:
    """Expand Kubernetes' $(NAME); an unset one stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)


def attempt_of(pod: dict) -> tuple:
    return owner_of(pod), pod["metadata"]["labels"][LABEL + "restart-attempt"]


def owner_of(pod: dict) -> str:
    return pod["metadata"]["labels"][LABEL + "jobset-uid"]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
