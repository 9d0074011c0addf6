"""Why a job's pods do not run, and why an object is refused: Kubernetes' message, the object, and what to write instead.

Nothing here contacts a server: kubernetes.py passes in pods and a function that reads events.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

CREATING = "its pods are being created"
SILENT = 60.0  # seconds without a pod or an event before something is assumed to be wrong
LONGEST = 500  # characters of a message
# Reasons of events about objects that a controller could not create; other events are about earlier starts.
NOT_CREATED = r"Creat\w*Fail|Fail\w*Creat"
STARTS = ("ContainerCreating", "PodInitializing")  # reasons of a container that is starting normally
PROFILE = "in the cluster's profile"
CURES = (  # pattern of a message -> what helps; the first match counts
    (r"exceeded quota: ([^,\s]+)", "ask for less (job.*), end other jobs, or have ResourceQuota {} raised"),
    (r"failed quota: ([^:\s]+): must specify", "ResourceQuota {} requires job.cpus_per_process and job.memory"),
    (r"(?:max|min)imum (\S+) usage per", "a limit of the namespace's LimitRange: see job.memory and job.cpus_per_process"),
    (r"limit to request ratio", "a limit of the namespace's LimitRange: see job.memory and job.cpus_per_process"),
    (r"persistentvolumeclaim \"?([^\s\"]+)\"? not found", f"see storage.claim={{}} {PROFILE}"),
    (r"unbound immediate PersistentVolumeClaims", f"there is no volume yet for storage.claim {PROFILE}"),
    (r"serviceaccount \"?([^\s\"]+)\"? not found", f"see service_account={{}} {PROFILE}"),
    (r"no PriorityClass with name (\S+)", f"see priority_class={{}} {PROFILE}"),
    (r"namespaces \"?([^\s\"]+)\"? not found", f"see namespace={{}} {PROFILE}"),
    (r"configmap \"?([^\s\"]+)\"? not found", "the ConfigMap with the recipe is gone: cancel the job and submit again"),
    (r"couldn't find key (\S+) in Secret|secret \"?([^\s\"]+)\"? not found", f"see secrets and image_pull_secrets {PROFILE}"),
    (r"ErrImage|ImagePull|InvalidImageName|Failed to pull image", f"see job.image, and image_pull_secrets {PROFILE}"),
    (r"violates PodSecurity|hostPath", f"see job.mounts, and host_network and device_resources {PROFILE}"),
    (r"system:anonymous", "the kubeconfig's user has no credentials: log in"),
    (r"Insufficient cpu", "the nodes are busy or too small: see job.cpus_per_process, or wait"),
    (r"Insufficient memory", f"the nodes are busy or too small: see job.memory, and shared_memory {PROFILE}, or wait"),
    (r"Insufficient (\S+?)[,.]?(?:\s|$)", "the nodes are busy or have fewer {}: see job.processes_per_node, or wait"),
    (r"node affinity|node selector", f"see node_selector {PROFILE}"),
    (r"untolerated taint|had taint", f"see tolerations {PROFILE}"),
)  # fmt: skip


def with_cure(message: str) -> str:
    """A message of Kubernetes in one line, with a cure if one is known."""
    message = " ".join(message.split())
    message = re.sub(r"\.? preemption: .*", "", message)  # the scheduler's next attempt, which failed too
    short = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
    for pattern, cure in CURES:
        if match := re.search(pattern, message):
            return f"{short}: {cure.format(*match.groups())}"
    return short


def why_pending(
    pods: list[Any],
    nodes: int,
    owners: list[tuple[str, str]],
    age: float,
    events: Callable[[str, str | None], list[Any] | None],
) -> str:
    """Why a job waits: the status of its pods, else the newest event of a pod or of an owner of the pods.

    Args:
        nodes: expected number of pods.
        owners: (kind, name) of the objects that create the pods, the nearest first.
        age: seconds since the job was created.
        events: those of a kind and a name, or of all names; None if this user may not list them.
    """
    waiting = [pod for pod in pods if pod.status.phase == "Pending"]
    for pod in waiting:
        if cause := _cause_by_status(pod, events):
            return cause
    if waiting and (cause := _cause_by_events(waiting, events)):
        return cause
    if len(pods) >= nodes:
        return CREATING
    is_forbidden = False
    for kind, name in owners:
        listed = events(kind, name)
        is_forbidden |= listed is None
        ordered = sorted(listed or [], key=when)
        failed = [event for event in ordered if re.search(NOT_CREATED, event.reason or "")]
        if failed and not any(event.type == "Normal" and when(event)[0] > when(failed[-1])[0] for event in ordered):
            return _describe(kind, name, failed[-1])
    if is_forbidden:
        return f"{CREATING}; if they never come, see the namespace's events, which this user may not list"
    if age > SILENT and not pods:
        kind, name = owners[-1]
        return f"{age / 60:.0f} minutes without a pod or an event of {kind} {name}: is its controller running?"
    return CREATING


def newest(events: list[Any] | None, prefix: str = "") -> Any | None:
    """The last event of objects whose names begin with `prefix`."""
    matching = [event for event in events or [] if (event.involved_object.name or "").startswith(prefix)]
    return max(matching, key=when, default=None)


def when(event: Any) -> tuple[datetime, int]:
    """Sort key: the time when an event was last seen, in seconds, and the server's order within a second."""
    series = event.series and event.series.last_observed_time
    seen = series or event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    version = event.metadata.resource_version or ""
    return seen or datetime.min.replace(tzinfo=UTC), int(version) if version.isdigit() else 0


def _cause_by_status(pod: Any, events: Callable[[str, str | None], list[Any] | None]) -> str:
    status, name = pod.status, pod.metadata.name
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting = container.state and container.state.waiting
        if not waiting or not waiting.reason or waiting.reason in STARTS:
            continue
        message = waiting.message or ""
        if waiting.reason == "ImagePullBackOff":  # the registry's error is in an earlier event
            pulls = [event for event in events("Pod", name) or [] if "Failed to pull" in (event.message or "")]
            message = last.message if (last := newest(pulls)) else message
        return with_cure(f"pod {name}: {waiting.reason}: {message}".strip(": "))
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return with_cure(f"pod {name}: {condition.message or condition.reason or 'not scheduled'}")
    return ""


def _cause_by_events(waiting: list[Any], events: Callable[[str, str | None], list[Any] | None]) -> str:
    """Why pods do not start that have a node: a volume cannot be mounted, an image is still being pulled."""
    names = {pod.metadata.name for pod in waiting}
    warnings = [event for event in events("Pod", None) or [] if event.involved_object.name in names]
    name = last.involved_object.name if (last := newest(warnings)) else waiting[0].metadata.name
    event = newest(events("Pod", name))
    if event and event.type == "Warning":
        return _describe("pod", name, event)
    return f"pod {name}: {event.message}" if event and event.reason == "Pulling" else ""


def _describe(kind: str, name: str, event: Any) -> str:
    return with_cure(f"{kind} {name}: {event.reason}: {event.message or ''}".strip(": "))
