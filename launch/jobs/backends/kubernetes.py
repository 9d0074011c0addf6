"""Jobs on Kubernetes, through the official client. kubernetes_objects.py says what they are made of."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import urllib3
import yaml

from powernap.launch.jobs.backends.kubernetes_causes import newest, when, why_pending, with_cure
from powernap.launch.jobs.backends.kubernetes_objects import CONTAINER, JOBSET, RUNTIME, TOKEN, TRAINJOB, check, objects
from powernap.launch.jobs.cluster import KubernetesCluster
from powernap.launch.jobs.description import JobError, UnknownOutcomeError
from powernap.launch.jobs.job import Job, Record
from powernap.launch.jobs.status import Status
from powernap.train.yaml_core import dump

try:
    import kubernetes
    import kubernetes.watch
    from kubernetes.client.exceptions import ApiException
except ImportError:
    raise JobError("jobs on Kubernetes need its client: pip install 'powernap[kubernetes]'") from None

ANSWERS_WITHIN = (5, 30)  # seconds to connect, and to answer
PATIENCE = 40.0  # seconds that a server may be away while it is only asked
STARTING = 10.0  # seconds that one which has never let us in may forbid it
LOOK_AGAIN = 1.0  # seconds
GONE_VERSION = 410  # a status: etcd has forgotten what was when the watch should begin
KINDS = {"JobSet": JOBSET, "TrainJob": TRAINJOB, "TrainingRuntime": RUNTIME}
_LET_IN: set[str] = set()  # servers that have answered this process
GONE = (urllib3.exceptions.HTTPError, OSError)


class _NoCredentials(JobError):
    """The kubeconfig's exec plugin failed."""


class Kubernetes:
    arrays = False

    def __init__(self, cluster: KubernetesCluster) -> None:
        self._cluster = cluster
        self._kind = JOBSET if cluster.form == "jobset" else TRAINJOB
        self._name_of_kind = "JobSet" if cluster.form == "jobset" else "TrainJob"
        self._client: kubernetes.client.ApiClient | None = None

    def check(self, jobs: list[Job]) -> None:
        check(jobs)

    def render(self, jobs: list[Job]) -> dict[str, str]:
        (job,) = jobs
        return {f"{self._cluster.form}.yaml": dump(*objects(job))}

    def command(self, jobs: list[Job], folder: Path) -> list[str]:
        return []

    def submit(self, jobs: list[Job], rendered: dict[str, str], folder: Path) -> list[str]:
        """The job first: what belongs to it can then name its owner, and its pods wait for their recipe."""
        (text,) = rendered.values()
        main, *others = yaml.safe_load_all(text)
        name = main["metadata"]["name"]
        try:
            made = self._create(main)
        except UnknownOutcomeError as error:
            try:
                if self._with_token(jobs[0].token):
                    self._delete(name)
            except JobError:
                raise error from None
            raise JobError(str(error)) from None
        owner = {key: made[key] for key in ("apiVersion", "kind")} | {"name": name, "uid": made["metadata"]["uid"]}
        try:
            for other in others:
                self._create(other | {"metadata": other["metadata"] | {"ownerReferences": [owner]}})
        except JobError as error:
            try:
                self._delete(name)
            except JobError:
                raise UnknownOutcomeError(str(error)) from None
            raise JobError(str(error)) from None
        return [name]

    def find(self, record: Record) -> str | None:
        return self._with_token(record.token)

    def status(self, record: Record) -> Status:
        found = self._get(record.known_id)
        if found is None or found["metadata"].get("labels", {}).get(TOKEN) != record.token:
            if record.own_folder.cancelled.exists():
                return Status("cancelled", "cancelled")
            return Status(
                "lost", f"{self._kind['plural']}/{record.id} is gone: deleted, or longer over than it is kept"
            )
        jobset = found if self._kind is JOBSET else self._get(record.known_id, JOBSET) or {}
        return self._status(found, jobset.get("status", {}), record)

    def pause(self, record: Record, seconds: float) -> None:
        """Watches the job. Whatever ends a watch early, a server that restarts or has forgotten the version it begins at, costs
        nothing: who asked looks again."""
        found = self._get(record.known_id)
        if found is None:
            return
        try:
            for _ in kubernetes.watch.Watch().stream(
                self._custom.list_namespaced_custom_object,
                **self._kind,
                namespace=self._cluster.namespace,
                field_selector=f"metadata.name={record.id}",
                resource_version=found["metadata"]["resourceVersion"],
                timeout_seconds=max(1, round(seconds)),
            ):
                return
        except ApiException as error:
            time.sleep(LOOK_AGAIN if error.status == GONE_VERSION else seconds)
        except GONE:
            time.sleep(LOOK_AGAIN)

    def logs(self, record: Record, follow: bool) -> Iterator[str]:
        """The first node's, which speaks for all. Pods are deleted when a job starts again, so earlier starts are gone; all is
        in runs/NAME/logs/train.log on the volume."""
        shown: set[str] = set()
        while True:
            over = not follow or self.status(record).is_over  # asked first: what it printed last is read after
            for pod in self._pods(record):
                if pod.metadata.uid not in shown and _is_first(pod) and pod.status.phase != "Pending":
                    shown.add(pod.metadata.uid)
                    yield from self._log_of(pod, follow)
            if over:
                return
            yield ""
            time.sleep(LOOK_AGAIN)

    def cancel(self, record: Record) -> None:
        """Pods get their grace to save. Whoever holds the object (a finalizer) lets it go when they have ended."""
        record.own_folder.cancelled.touch()
        self._delete(record.known_id)

    def _status(self, found: dict[str, Any], jobset: dict[str, Any], record: Record) -> Status:
        conditions = {
            condition["type"]: condition
            for condition in found.get("status", {}).get("conditions", [])
            if condition.get("status") == "True"
        }
        restarts = jobset.get("restarts", 0)
        if "Completed" in conditions or "Complete" in conditions:
            return Status("succeeded", "", restarts, 0)
        if failed := conditions.get("Failed"):
            code = self._exit_code(record)
            reason = f"{failed.get('reason', '')}: {failed.get('message', '')}".strip(": ")
            return Status("failed", reason, restarts, code)
        pods = self._pods(record)
        nodes = ",".join(sorted({pod.spec.node_name for pod in pods if pod.spec.node_name}))
        if "deletionTimestamp" in found["metadata"]:
            return Status("stopping", "it saves and ends", restarts, nodes=nodes)
        if suspended := conditions.get("Suspended"):
            return Status("pending", self._why_suspended(suspended, found, record), restarts)
        wanted = record.job.nodes
        assert wanted is not None
        if sum(pod.status.phase == "Running" for pod in pods) == wanted:
            return Status("running", "", restarts, nodes=nodes)
        made = _time(found["metadata"])
        kind, name = found.get("kind", self._name_of_kind), record.id
        owners = [("Job", f"{name}-{CONTAINER}-0"), ("JobSet", name)] + [(kind, name)] * (kind != "JobSet")
        reason = why_pending(
            pods, wanted, owners, (datetime.now(UTC) - made).total_seconds(), lambda *of: self._events(made, *of)
        )
        return Status("pending", reason, restarts, nodes=nodes)

    def _why_suspended(self, suspended: dict[str, Any], found: dict[str, Any], record: Record) -> str:
        """Kueue says why on its own object for the job."""
        queue = self._cluster.queue
        if not queue:
            return suspended.get("message") or "it is suspended"
        event = newest(self._events(_time(found["metadata"]), "Workload"), f"{self._name_of_kind.lower()}-{record.id}-")
        said = f": {with_cure(event.message)}" if event and event.message else ""
        return f"waits in Kueue's queue {queue}{said}"

    def _events(self, since: datetime, kind: str, name: str | None = None) -> list[Any] | None:
        """Of an object, or the warnings of all objects of a kind; None where this user may not list them. Those from before
        `since` belong to an earlier job of this name."""
        where = f"involvedObject.kind={kind}," + (f"involvedObject.name={name}" if name else "type=Warning")

        def ask() -> list[Any] | None:
            try:
                return self._core.list_namespaced_event(self._cluster.namespace, field_selector=where).items
            except ApiException as error:
                if error.status in (403, 404):
                    return None
                raise

        found = self._asked(ask)
        return None if found is None else [event for event in found if when(event)[0] >= since]

    def _exit_code(self, record: Record) -> int | None:
        codes = [
            state.terminated.exit_code
            for pod in self._pods(record)
            for container in pod.status.container_statuses or []
            if (state := container.state) and state.terminated and state.terminated.exit_code
        ]
        return codes[0] if codes else None

    def _log_of(self, pod: Any, follow: bool) -> Iterator[str]:
        """A pod's log; where the server or the pod goes away in the middle, from there on once more if it can be had."""
        position = 0
        name = pod.metadata.name
        deadline = time.monotonic() + PATIENCE
        while True:
            skip = position  # it always begins at the beginning
            try:
                answer = self._core.read_namespaced_pod_log(
                    name, self._cluster.namespace, container=CONTAINER, follow=follow, _preload_content=False
                )
                for piece in answer.stream(decode_content=True):
                    new = piece[skip:]
                    skip = max(0, skip - len(piece))
                    position += len(new)
                    deadline = time.monotonic() + PATIENCE
                    yield new.decode(errors="replace")
                return
            except ApiException as error:
                if error.status == 404 or time.monotonic() > deadline:  # the pod has made room for the next start
                    return
            except GONE:
                if time.monotonic() > deadline:
                    return
            time.sleep(LOOK_AGAIN)

    def _pods(self, record: Record) -> list[Any]:
        where = f"{TOKEN}={record.token}"
        return self._asked(lambda: self._core.list_namespaced_pod(self._cluster.namespace, label_selector=where)).items

    def _get(self, name: str, kind: dict[str, str] | None = None) -> dict[str, Any] | None:
        kind = kind or self._kind
        where = {**kind, "namespace": self._cluster.namespace, "name": name}
        return self._asked(lambda: self._custom.get_namespaced_custom_object(**where), missing=None)

    def _with_token(self, token: str) -> str | None:
        where = {**self._kind, "namespace": self._cluster.namespace, "label_selector": f"{TOKEN}={token}"}
        items = self._asked(lambda: self._custom.list_namespaced_custom_object(**where))["items"]
        return items[0]["metadata"]["name"] if items else None

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Once: whether a create that was not answered arrived is for find() to say."""
        namespace = self._cluster.namespace
        try:
            if body["kind"] == "ConfigMap":
                made = self._core.create_namespaced_config_map(namespace, body, _request_timeout=ANSWERS_WITHIN)
                return self._api.sanitize_for_serialization(made)
            return self._custom.create_namespaced_custom_object(
                **KINDS[body["kind"]],
                namespace=namespace,
                body=body,
                field_validation="Strict",
                _request_timeout=ANSWERS_WITHIN,
            )
        except ApiException as error:
            raise JobError(self._refusal(error, f"create {body['kind']}")) from None
        except urllib3.exceptions.NewConnectionError as error:
            raise JobError(self._away(error)) from None
        except GONE as error:
            raise UnknownOutcomeError(self._away(error)) from None

    def _delete(self, name: str) -> None:
        where = {**self._kind, "namespace": self._cluster.namespace, "name": name}
        self._asked(
            lambda: self._custom.delete_namespaced_custom_object(**where, propagation_policy="Foreground"), missing=None
        )

    def _asked(self, call: Callable[[], Any], **missing: Any) -> Any:
        """The answer, from a server that may be away for a while; `missing` if there is no such object."""
        host, began = self._api.configuration.host, time.monotonic()
        while True:
            waited = time.monotonic() - began
            try:
                answer = call()
                _LET_IN.add(host)
                return answer
            except ApiException as error:
                if error.status == 404 and missing and _is_of_an_object(error):
                    return missing["missing"]
                # A server that has just started forbids everything until it has read who may do what.
                starting = error.status in (401, 403) and (host in _LET_IN or waited < STARTING)
                if not (starting or error.status in (429, 500, 502, 503, 504)) or waited > PATIENCE:
                    raise JobError(self._refusal(error, "answer")) from None
            except _NoCredentials:
                if host not in _LET_IN or waited > PATIENCE:
                    raise
            except GONE as error:
                is_wrong = isinstance(getattr(error, "reason", error), urllib3.exceptions.SSLError)
                if is_wrong or waited > PATIENCE:
                    raise JobError(self._away(error)) from None
            time.sleep(LOOK_AGAIN)

    def _refusal(self, error: ApiException, doing: str) -> str:
        """What the server said, in one line."""
        body = _body(error)
        message = body.get("message") or error.reason or f"status {error.status}"
        if error.status == 401:
            return "Kubernetes does not know this token: log in again, or see context in the cluster's profile"
        if error.status == 403 and "quota" not in message:
            return f"Kubernetes does not allow that: {with_cure(message)}"
        if error.status == 404 and not body:
            need = "JobSet" if self._kind is JOBSET else "Kubeflow Trainer"
            return f"this cluster has no {need}: have it installed, or see form in the cluster's profile"
        if error.status == 409:
            return f"{message}: another submission has this name; choose another run.name"
        causes = (body.get("details") or {}).get("causes") or []
        if causes:
            message = "; ".join(f"{cause.get('field', '')}: {cause.get('message', '')}" for cause in causes[:3])
        return f"Kubernetes refuses to {doing}: {with_cure(message)}"

    def _away(self, error: Exception) -> str:
        reason = getattr(error, "reason", None) or error
        said = str(reason).rpartition("object at ")[2].partition(">: ")[2] or str(reason)
        return f"Kubernetes does not answer at {self._api.configuration.host}: {said}"

    @property
    def _api(self) -> "kubernetes.client.ApiClient":
        if self._client is None:
            configuration = kubernetes.client.Configuration()
            try:
                with _plugin_must_not_fail():
                    kubernetes.config.load_kube_config(
                        os.environ.get("KUBECONFIG"), self._cluster.context, client_configuration=configuration
                    )
            except (kubernetes.config.ConfigException, OSError, yaml.YAMLError, TypeError, KeyError) as error:
                try:
                    kubernetes.config.load_incluster_config(client_configuration=configuration)
                except kubernetes.config.ConfigException:
                    raise JobError(
                        f"no access to Kubernetes: {error}: see KUBECONFIG, and context in the profile"
                    ) from None
            if refresh := configuration.refresh_api_key_hook:

                def refresh_or_fail(of: "kubernetes.client.Configuration") -> None:
                    with _plugin_must_not_fail():
                        refresh(of)

                configuration.refresh_api_key_hook = refresh_or_fail
            configuration.retries = False  # its own would sleep for as long as a server that starts asks for
            self._client = kubernetes.client.ApiClient(configuration)
        return self._client

    @property
    def _custom(self) -> "kubernetes.client.CustomObjectsApi":
        return kubernetes.client.CustomObjectsApi(self._api)

    @property
    def _core(self) -> "kubernetes.client.CoreV1Api":
        return kubernetes.client.CoreV1Api(self._api)


def _body(error: ApiException) -> dict[str, Any]:
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _is_of_an_object(error: ApiException) -> bool:
    """A missing namespace or custom resource is another matter than a missing object."""
    details = _body(error).get("details") or {}
    return bool(details.get("name")) and details.get("kind") != "namespaces"


def _is_first(pod: Any) -> bool:
    return (pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index") == "0"


def _time(metadata: dict[str, Any]) -> datetime:
    """When an object was created."""
    return datetime.fromisoformat(metadata.get("creationTimestamp") or "1970-01-01T00:00:00Z")


@contextmanager
def _plugin_must_not_fail() -> Iterator[None]:
    """The client logs what a kubeconfig's exec plugin complained about, and goes on as nobody: raise it instead."""
    said: list[str] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before, root.handlers = root.handlers, [handler]
    try:
        yield
    finally:
        root.handlers = before
    if said:
        lines = re.sub(r"^exec: (process returned \d+\. )?", "", said[-1]).strip().splitlines()
        # On a terminal the plugin has spoken to the user itself, and the client stumbles over having nothing to add.
        cause = "its own words stand above" if "NoneType" in lines[-1] else lines[-1].strip()
        if "No such file" in cause:
            cause = f"{cause}: install it, or put its folder on PATH"
        raise _NoCredentials(f"no access to Kubernetes: the exec plugin of the kubeconfig failed: {cause}")
