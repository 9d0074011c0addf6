"""A real Kubernetes API server and its etcd as two child processes on loopback, up in seconds, gone afterwards.

There is no scheduler, kubelet or controller: kube_controllers.py plays those that a JobSet needs.
`.ci/build-kube-apiserver` builds the server, which is 1.20: it has no `fieldValidation`, see kube_schema.dropped_fields.
"""

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import yaml

NAMESPACE = "research"
# Rights in NAMESPACE: of a user who may submit jobs, as in README.md, and of one who may only read.
READ = ["get", "list", "watch"]
CHANGE = [*READ, "create", "patch", "delete"]
RIGHTS = {
    "submitter": [
        (["jobset.x-k8s.io"], ["jobsets"], CHANGE),
        (["trainer.kubeflow.org"], ["trainjobs", "trainingruntimes"], CHANGE),
        ([""], ["configmaps"], CHANGE),
        ([""], ["pods", "events"], READ),
        ([""], ["pods/log"], ["get"]),
    ],
    "reader": [
        (["jobset.x-k8s.io", "trainer.kubeflow.org"], ["*"], READ),
        ([""], ["pods", "events", "configmaps"], READ),
    ],
}
TOKENS = {name: f"token-of-{name}" for name in ("admin", *RIGHTS, "stranger")}  # the server does not know the last one


def installed() -> tuple[Path, Path] | None:
    """kube-apiserver and etcd as .ci/build-kube-apiserver left them, or None."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powernap"
    servers = sorted(cache.glob("kube-apiserver-*"))
    return (servers[-1], cache / "etcd") if servers and (cache / "etcd").exists() else None


class KubeCluster:
    """Use as a context manager.

    Args:
        folder: an empty one, for certificates, logs and etcd's files.

    Attributes:
        kubeconfigs: user -> kubeconfig: admin, submitter, reader, stranger (unknown to the server).
        url: of the API server.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.binary, self.etcd_binary = installed()
        self.kubeconfigs = {name: folder / f"{name}.kubeconfig" for name in TOKENS}
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self):
        try:
            self._start_etcd()
            self.port = free_port()
            self.url = f"https://127.0.0.1:{self.port}"
            self._write_secrets()
            self._start_server()
            self._write_kubeconfigs()
            self._fill()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def clients(self, user: str = "admin"):
        """The official client's ApiClient of one user, for CoreV1Api and others. It tries once: with retries it would sleep as
        long as a starting server's Retry-After says."""
        from kubernetes import client, config

        configuration = client.Configuration()
        config.load_kube_config(str(self.kubeconfigs[user]), client_configuration=configuration)
        configuration.retries = False
        return client.ApiClient(configuration)

    def restart(self) -> None:
        """Stop the API server, which ends all open watches, and start it again."""
        self.stop_server()
        self.start_server()

    def stop_server(self) -> None:
        """Stop the API server: connections are refused."""
        self._end("kube-apiserver")

    def start_server(self) -> None:
        """Start it again, on the same port and data."""
        self._start_server()

    def forget_history(self) -> None:
        """Make the server answer a watch from any earlier resourceVersion with 410 Gone."""
        revision = self._etcd("kv/range", {"key": _coded("/")})["header"]["revision"]
        # An additional write, so that even the newest version that clients have is compacted away.
        newest = self._etcd("kv/put", {"key": _coded("/compacted"), "value": _coded(revision)})["header"]["revision"]
        self._etcd("kv/compaction", {"revision": newest, "physical": True})

    def stop(self) -> None:
        """End both processes."""
        for name in list(self.processes):
            self._end(name)

    def _start_etcd(self) -> None:
        for _ in range(5):  # another process may take a port between finding and using it
            self.etcd_url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
            self._start(
                "etcd",
                [self.etcd_binary, "--data-dir", self.folder / "etcd", "--unsafe-no-fsync", "--name", "one"],
                ["--listen-client-urls", self.etcd_url, "--advertise-client-urls", self.etcd_url],
                ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}"],
            )
            if self._wait("etcd", f"{self.etcd_url}/health"):
                return
        raise RuntimeError(self._last_lines("etcd"))

    def _start_server(self) -> None:
        files = self.folder
        self._start(
            "kube-apiserver",
            [self.binary, "--etcd-servers", self.etcd_url, "--bind-address=127.0.0.1", f"--secure-port={self.port}"],
            ["--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", f"--cert-dir={files}"],
            ["--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC", "--anonymous-auth=true"],
            [f"--token-auth-file={files}/tokens.csv", "--disable-admission-plugins=ServiceAccount"],
            [f"--service-account-{use}key-file={files}/service.key" for use in ("", "signing-")],
            ["--service-account-issuer=https://kubernetes.default", "--watch-cache=false"],
            # The kubelet with the logs runs here and has no DNS name.
            ["--kubelet-preferred-address-types=InternalIP"],
        )
        if not self._wait("kube-apiserver", f"{self.url}/readyz"):
            raise RuntimeError(self._last_lines("kube-apiserver"))

    def _write_secrets(self) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        groups = {"admin": "system:masters"}
        lines = [
            f'{token},{name},{name},"{groups.get(name, "users")}"'
            for name, token in TOKENS.items()
            if name != "stranger"
        ]
        (self.folder / "tokens.csv").write_text("\n".join(lines) + "\n")
        key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        (self.folder / "service.key").write_bytes(key)

    def _write_kubeconfigs(self) -> None:
        for name, path in self.kubeconfigs.items():
            here = {"server": self.url, "certificate-authority": str(self.folder / "apiserver.crt")}
            content = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": here}],
                "users": [{"name": name, "user": {"token": TOKENS[name]}}],
                "contexts": [{"name": name, "context": {"cluster": "here", "user": name, "namespace": NAMESPACE}}],
                "current-context": name,
            }
            path.write_text(yaml.safe_dump(content))
            path.chmod(0o600)

    def _fill(self) -> None:
        """The namespace, its users' rights, and the custom resources."""
        from kubernetes import client

        from tests.helpers import kube_schema

        admin = self.clients()
        client.CoreV1Api(admin).create_namespace({"metadata": {"name": NAMESPACE}})
        rbac = client.RbacAuthorizationV1Api(admin)
        for name, rights in RIGHTS.items():
            rules = [
                {"apiGroups": groups, "resources": resources, "verbs": verbs} for groups, resources, verbs in rights
            ]
            rbac.create_namespaced_role(NAMESPACE, {"metadata": {"name": name}, "rules": rules})
            role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
            user = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": name}
            rbac.create_namespaced_role_binding(
                NAMESPACE, {"metadata": {"name": name}, "roleRef": role, "subjects": [user]}
            )
        extensions, custom = client.ApiextensionsV1Api(admin), client.CustomObjectsApi(admin)
        for definition in kube_schema.definitions():
            extensions.create_custom_resource_definition(definition)
        for kind, (group, version, _) in kube_schema.KINDS.items():
            for _ in range(300):
                with suppress(client.ApiException):
                    custom.list_namespaced_custom_object(group, version, NAMESPACE, f"{kind.lower()}s")
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"{kind} is not served")

    def _start(self, name: str, *arguments: list) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for words in arguments for word in words],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=end_with_parent,
            )

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.kill()  # after SIGTERM a server would wait for its open watches
        process.wait()

    def _wait(self, name: str, url: str) -> bool:
        """Whether the process answers within a minute."""
        import ssl

        trusting = ssl._create_unverified_context()
        end = time.monotonic() + 60
        while time.monotonic() < end and self.processes[name].poll() is None:
            with suppress(OSError):  # HTTPError is one
                if urllib.request.urlopen(url, timeout=5, context=trusting).status == 200:
                    return True
            time.sleep(0.1)
        return False

    def _etcd(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(f"{self.etcd_url}/v3/{path}", json.dumps(body).encode())
        return json.load(urllib.request.urlopen(request, timeout=10))

    def _last_lines(self, name: str) -> str:
        return f"{name}: " + "\n".join((self.folder / f"{name}.log").read_text().splitlines()[-5:])


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def free_port() -> int:
    """A free port below the range of outgoing connections."""

    while True:
        port = 10000 + int.from_bytes(os.urandom(2)) % 20000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
