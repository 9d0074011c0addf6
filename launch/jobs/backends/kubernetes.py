"""Jobs on Kubernetes, through the official client. kubernetes_objects.py renders their objects."""

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
from powernap.launch.jobs.backends.kubernetes_objects import (
    CONTAINER,
    JOBSET,
    RUNTIME,
    SUBMISSION_LABEL,
    TRAINJOB,
    check,
    objects,
)
from powernap.launch.jobs.cluster import KubernetesCluster
from powernap.launch.jobs.description import JobError, UnknownOutcomeError
from powernap.launch.jobs.job import Job, JobRecord
from powernap.launch.jobs.status import Status
from powernap.train.yaml_core import dump

try:
    import kubernetes
    import kubernetes.watch
    from kubernetes.client.exceptions import ApiException
except ImportError:
    raise JobError("jobs on Kubernetes need its client: pip install 'powernap[kubernetes]'") from None

ANSWERS_WITHIN = (5, 30)  # seconds to connect, and to answer
PATIENCE = 40.0  # seconds to retry queries while a server is down
STARTING = 10.0  # seconds to retry a server that denies access and has not granted it before
POLL_SECONDS = 1.0
GONE_VERSION = 410  # HTTP status: etcd no longer has the version at which the watch begins
KINDS = {"JobSet": JOBSET, "TrainJob": TRAINJOB, "TrainingRuntime": RUNTIME}
CONNECTION_ERRORS = (urllib3.exceptions.HTTPError, OSError)
_access_granted: set[str] = set()  # servers that have answered this process


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
        """The job first: the other objects need its uid as their owner, and its pods wait for the ConfigMap."""
        (text,) = rendered.values()
        main, *others = yaml.safe_load_all(text)
        name = main["metadata"]["name"]
        try:
            created = self._create(main)
        except UnknownOutcomeError as error:
            try:
                if self._submitted(jobs[0].submission_id):
                    self._delete(name)
            except JobError:
                raise error from None
            raise JobError(str(error)) from None
        owner = {key: created[key] for key in ("apiVersion", "kind")} | {
            "name": name,
            "uid": created["metadata"]["uid"],
        }
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

    def find(self, record: JobRecord) -> str | None:
        return self._submitted(record.submission_id)

    def status(self, record: JobRecord) -> Status:
        body = self._get(record.known_id)
        if body is None or body["metadata"].get("labels", {}).get(SUBMISSION_LABEL) != record.submission_id:
            if record.folder.cancelled.exists():
                return Status("cancelled", "cancelled")
            return Status("lost", f"{self._kind['plural']}/{record.id} is gone: deleted, or past its ttl")
        jobset = body if self._kind is JOBSET else self._get(record.known_id, JOBSET) or {}
        return self._status(body, jobset.get("status", {}), record)

    def wait_for_change(self, record: JobRecord, seconds: float) -> None:
        """Watch the job. A watch may end early, as when the server restarts or lacks the version it begins at; callers poll."""
        body = self._get(record.known_id)
        if body is None:
            return
        try:
            for _ in kubernetes.watch.Watch().stream(
                self._custom.list_namespaced_custom_object,
                **self._kind,
                namespace=self._cluster.namespace,
                field_selector=f"metadata.name={record.id}",
                resource_version=body["metadata"]["resourceVersion"],
                timeout_seconds=max(1, round(seconds)),
            ):
                return
        except ApiException as error:
            time.sleep(POLL_SECONDS if error.status == GONE_VERSION else seconds)
        except CONNECTION_ERRORS:
            time.sleep(POLL_SECONDS)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        """The log of the first node, which has rank 0. A restart deletes pods with their logs; runs/NAME/logs/train.log on the
        volume has all of them."""
        shown: set[str] = set()
        while True:
            over = not follow or self.status(record).is_over  # before reading: the job's last lines come through
            for pod in self._pods(record):
                if pod.metadata.uid not in shown and _is_first(pod) and pod.status.phase != "Pending":
                    shown.add(pod.metadata.uid)
                    yield from self._log_of(pod, follow)
            if over:
                return
            yield ""
            time.sleep(POLL_SECONDS)

    def cancel(self, record: JobRecord) -> None:
        """Pods get their grace period to save. The object stays, "stopping", until they have ended and its finalizers are gone."""
        record.folder.cancelled.touch()
        self._delete(record.known_id)

    def _status(self, body: dict[str, Any], jobset: dict[str, Any], record: JobRecord) -> Status:
        """
        Args:
            body: the job's object, a JobSet or a TrainJob.
            jobset: status of the JobSet.
        """
        conditions = {
            condition["type"]: condition
            for condition in body.get("status", {}).get("conditions", [])
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
        if "deletionTimestamp" in body["metadata"]:
            return Status("stopping", "it saves and ends", restarts, nodes=nodes)
        if suspended := conditions.get("Suspended"):
            return Status("pending", self._why_suspended(suspended, body, record), restarts)
        expected = record.job.nodes
        assert expected is not None
        if sum(pod.status.phase == "Running" for pod in pods) == expected:
            return Status("running", "", restarts, nodes=nodes)
        created = _time(body["metadata"])
        kind, name = body.get("kind", self._name_of_kind), record.id
        owners = [("Job", f"{name}-{CONTAINER}-0"), ("JobSet", name)] + [(kind, name)] * (kind != "JobSet")
        age = (datetime.now(UTC) - created).total_seconds()
        reason = why_pending(pods, expected, owners, age, lambda *of: self._events(created, *of))
        return Status("pending", reason, restarts, nodes=nodes)

    def _why_suspended(self, suspended: dict[str, Any], body: dict[str, Any], record: JobRecord) -> str:
        """Kueue reports the reason in events of the Workload that it creates for the job."""
        queue = self._cluster.queue
        if not queue:
            return suspended.get("message") or "it is suspended"
        event = newest(self._events(_time(body["metadata"]), "Workload"), f"{self._name_of_kind.lower()}-{record.id}-")
        reason = f": {with_cure(event.message)}" if event and event.message else ""
        return f"waits in Kueue's queue {queue}{reason}"

    def _events(self, since: datetime, kind: str, name: str | None = None) -> list[Any] | None:
        """Events of an object, or warnings about all objects of a kind; None if this user may not list them. Events before
        `since` belong to an earlier job of the same name."""
        selector = f"involvedObject.kind={kind}," + (f"involvedObject.name={name}" if name else "type=Warning")

        def list_events() -> list[Any] | None:
            try:
                return self._core.list_namespaced_event(self._cluster.namespace, field_selector=selector).items
            except ApiException as error:
                if error.status in (403, 404):
                    return None
                raise

        events = self._retrying(list_events)
        return None if events is None else [event for event in events if when(event)[0] >= since]

    def _exit_code(self, record: JobRecord) -> int | None:
        codes = [
            state.terminated.exit_code
            for pod in self._pods(record)
            for container in pod.status.container_statuses or []
            if (state := container.state) and state.terminated and state.terminated.exit_code
        ]
        return codes[0] if codes else None

    def _log_of(self, pod: Any, follow: bool) -> Iterator[str]:
        """A pod's log. If the connection breaks, reconnect and continue where it broke, as long as the pod exists."""
        position = 0
        name = pod.metadata.name
        deadline = time.monotonic() + PATIENCE
        while True:
            skip = position  # the server always sends the log from the beginning
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
                if error.status == 404 or time.monotonic() > deadline:  # 404: a restart has deleted the pod
                    return
            except CONNECTION_ERRORS:
                if time.monotonic() > deadline:
                    return
            time.sleep(POLL_SECONDS)

    def _pods(self, record: JobRecord) -> list[Any]:
        namespace, selector = self._cluster.namespace, f"{SUBMISSION_LABEL}={record.submission_id}"
        return self._retrying(lambda: self._core.list_namespaced_pod(namespace, label_selector=selector)).items

    def _get(self, name: str, kind: dict[str, str] | None = None) -> dict[str, Any] | None:
        path = {**(kind or self._kind), "namespace": self._cluster.namespace, "name": name}
        return self._retrying(lambda: self._custom.get_namespaced_custom_object(**path), missing=None)

    def _submitted(self, submission_id: str) -> str | None:
        """The name of the object with this submission_id."""
        path, selector = {**self._kind, "namespace": self._cluster.namespace}, f"{SUBMISSION_LABEL}={submission_id}"
        listed = self._retrying(lambda: self._custom.list_namespaced_custom_object(**path, label_selector=selector))
        return listed["items"][0]["metadata"]["name"] if listed["items"] else None

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tried once: after a create without an answer, find() tells whether it arrived."""
        namespace = self._cluster.namespace
        try:
            if body["kind"] == "ConfigMap":
                created = self._core.create_namespaced_config_map(namespace, body, _request_timeout=ANSWERS_WITHIN)
                return self._api.sanitize_for_serialization(created)
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
            raise JobError(self._no_answer(error)) from None
        except CONNECTION_ERRORS as error:
            raise UnknownOutcomeError(self._no_answer(error)) from None

    def _delete(self, name: str) -> None:
        path = {**self._kind, "namespace": self._cluster.namespace, "name": name}
        self._retrying(
            lambda: self._custom.delete_namespaced_custom_object(**path, propagation_policy="Foreground"), missing=None
        )

    def _retrying(self, call: Callable[[], Any], **missing: Any) -> Any:
        """Retry `call` while the server is unavailable; return `missing` if there is no such object."""
        host, began = self._api.configuration.host, time.monotonic()
        while True:
            waited = time.monotonic() - began
            try:
                answer = call()
                _access_granted.add(host)
                return answer
            except ApiException as error:
                if error.status == 404 and missing and _is_of_an_object(error):
                    return missing["missing"]
                # A server that has just started denies everything until it has loaded its access rules.
                starting = error.status in (401, 403) and (host in _access_granted or waited < STARTING)
                if not (starting or error.status in (429, 500, 502, 503, 504)) or waited > PATIENCE:
                    raise JobError(self._refusal(error, "answer")) from None
            except _NoCredentials:
                if host not in _access_granted or waited > PATIENCE:
                    raise
            except CONNECTION_ERRORS as error:
                is_permanent = isinstance(getattr(error, "reason", error), urllib3.exceptions.SSLError)
                if is_permanent or waited > PATIENCE:
                    raise JobError(self._no_answer(error)) from None
            time.sleep(POLL_SECONDS)

    def _refusal(self, error: ApiException, doing: str) -> str:
        """The server's error in one line, with a cure if one is known."""
        body = _body(error)
        message = body.get("message") or error.reason or f"status {error.status}"
        if error.status == 401:
            return "Kubernetes does not accept these credentials: log in again, or see context in the cluster's profile"
        if error.status == 403 and "quota" not in message:
            return f"Kubernetes does not allow this: {with_cure(message)}"
        if error.status == 404 and not body:
            missing = "JobSet" if self._kind is JOBSET else "Kubeflow Trainer"
            return f"{missing} is not installed on this cluster: install it, or see form in the cluster's profile"
        if error.status == 409:
            return f"{message}: another submission has this name; choose another run.name"
        causes = (body.get("details") or {}).get("causes") or []
        if causes:
            message = "; ".join(f"{cause.get('field', '')}: {cause.get('message', '')}" for cause in causes[:3])
        return f"Kubernetes refuses to {doing}: {with_cure(message)}"

    def _no_answer(self, error: Exception) -> str:
        reason = str(getattr(error, "reason", None) or error)
        reason = reason.rpartition("object at ")[2].partition(">: ")[2] or reason  # without the connection's repr
        return f"Kubernetes does not answer at {self._api.configuration.host}: {reason}"

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
            configuration.retries = False  # urllib3's would sleep as long as a starting server's Retry-After says
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
    """Whether a 404 is about an object, not about its namespace or custom resource."""
    details = _body(error).get("details") or {}
    return bool(details.get("name")) and details.get("kind") != "namespaces"


def _is_first(pod: Any) -> bool:
    return (pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index") == "0"


def _time(metadata: dict[str, Any]) -> datetime:
    """When an object was created."""
    return datetime.fromisoformat(metadata.get("creationTimestamp") or "1970-01-01T00:00:00Z")


@contextmanager
def _plugin_must_not_fail() -> Iterator[None]:
    """If a kubeconfig's exec plugin fails, the client logs that and continues as anonymous: raise instead."""
    logged: list[str] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    before, root.handlers = root.handlers, [handler]
    try:
        yield
    finally:
        root.handlers = before
    if logged:
        lines = re.sub(r"^exec: (process returned \d+\. )?", "", logged[-1]).strip().splitlines()
        # On a terminal the plugin prints its error itself; the client, which has no output to log then, fails with a TypeError.
        cause = "see its message above" if "NoneType" in lines[-1] else lines[-1].strip()
        if "No such file" in cause:
            cause = f"{cause}: install it, or put its folder on PATH"
        raise _NoCredentials(f"no access to Kubernetes: the exec plugin of the kubeconfig failed: {cause}")
