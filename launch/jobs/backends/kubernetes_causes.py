"""Why a job's pods do not run, and why an object is refused: Kubernetes' own words, the object, and what to write instead.

Nothing here asks a server: kubernetes.py hands in pods and a function that reads events.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

MAKING = "its pods are being made"
SILENT = 60.0  # seconds without a pod and without an event, after which something is wrong
LONGEST = 500  # letters of a message
# Reasons of events for what a controller could not create; others on the same objects tell how earlier starts ended.
NOT_MADE = r"Creat\w*Fail|Fail\w*Creat"
STARTS = ("ContainerCreating", "PodInitializing")  # what a container waits for if nothing is wrong
PROFILE = "in the cluster's profile"
CURES = (  # words of Kubernetes -> what helps; the first that fits
    (r"exceeded quota: ([^,\s]+)", "ask for less (job.*), end other jobs, or have ResourceQuota {} raised"),
    (r"failed quota: ([^:\s]+): must specify", "ResourceQuota {} wants job.cpus_per_process and job.memory"),
    (r"(?:max|min)imum (\S+) usage per", "a LimitRange of the namespace says so: see job.memory and job.cpus_per_process"),
    (r"limit to request ratio", "a LimitRange of the namespace says so: see job.memory and job.cpus_per_process"),
    (r"persistentvolumeclaim \"?([^\s\"]+)\"? not found", f"see storage.claim={{}} {PROFILE}"),
    (r"unbound immediate PersistentVolumeClaims", f"no volume is there yet for storage.claim {PROFILE}"),
    (r"serviceaccount \"?([^\s\"]+)\"? not found", f"see service_account={{}} {PROFILE}"),
    (r"no PriorityClass with name (\S+)", f"see priority_class={{}} {PROFILE}"),
    (r"namespaces \"?([^\s\"]+)\"? not found", f"see namespace={{}} {PROFILE}"),
    (r"configmap \"?([^\s\"]+)\"? not found", "the ConfigMap with the recipe is gone: cancel the job and submit again"),
    (r"couldn't find key (\S+) in Secret|secret \"?([^\s\"]+)\"? not found", f"see secrets and image_pull_secrets {PROFILE}"),
    (r"ErrImage|ImagePull|InvalidImageName|Failed to pull image", f"see job.image, and image_pull_secrets {PROFILE}"),
    (r"violates PodSecurity|hostPath", f"see job.mounts, and host_network and fabric {PROFILE}"),
    (r"system:anonymous", "the kubeconfig's user has no credentials: log in"),
    (r"Insufficient cpu", "they are taken or too small: see job.cpus_per_process, or wait"),
    (r"Insufficient memory", f"they are taken or too small: see job.memory, and shared_memory {PROFILE}, or wait"),
    (r"Insufficient (\S+?)[,.]?(?:\s|$)", "they are taken or have fewer {}: see job.processes_per_node, or wait"),
    (r"node affinity|node selector", f"see node_selector {PROFILE}"),
    (r"untolerated taint|had taint", f"see tolerations {PROFILE}"),
)  # fmt: skip


def with_cure(said: str) -> str:
    """What Kubernetes said, in one line, and what helps."""
    said = " ".join(said.split())
    said = re.sub(r"\.? preemption: .*", "", said)  # what it tried after that, without success
    short = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    for words, cure in CURES:
        if found := re.search(words, said):
            return f"{short}: {cure.format(*found.groups())}"
    return short


def why_pending(
    pods: list[Any],
    nodes: int,
    owners: list[tuple[str, str]],
    age: float,
    events: Callable[[str, str | None], list[Any] | None],
) -> str:
    """The cause of a wait: what the pods say of themselves, else the newest event of one of them or of what makes them.

    Args:
        nodes: as many pods as there are to be.
        owners: (kind, name) of what makes the pods, the nearest first.
        age: seconds since the job was created.
        events: of a kind and a name, or of all names; None where this user may not read them.
    """
    waiting = [pod for pod in pods if pod.status.phase == "Pending"]
    for pod in waiting:
        if said := _pod_says(pod, events):
            return said
    if waiting and (said := _events_say(waiting, events)):
        return said
    if len(pods) >= nodes:
        return MAKING
    may_not_read = False
    for kind, name in owners:
        found = events(kind, name)
        may_not_read |= found is None
        ordered = sorted(found or [], key=when)
        failed = [event for event in ordered if re.search(NOT_MADE, event.reason or "")]
        if failed and not any(event.type == "Normal" and when(event)[0] > when(failed[-1])[0] for event in ordered):
            return _told(kind, name, failed[-1])
    if may_not_read:
        return f"{MAKING}; if they never come, the namespace's events say why, which this user may not list"
    if age > SILENT and not pods:
        kind, name = owners[-1]
        return f"{age / 60:.0f} minutes without a pod or an event of {kind} {name}: is its controller running?"
    return MAKING


def newest(events: list[Any] | None, prefix: str = "") -> Any | None:
    """The last event, of objects whose names begin with `prefix`."""
    found = [event for event in events or [] if (event.involved_object.name or "").startswith(prefix)]
    return max(found, key=when, default=None)


def when(event: Any) -> tuple[datetime, int]:
    """When an event was last seen, to sort by: seconds, and the server's own order within one."""
    series = event.series and event.series.last_observed_time
    seen = series or event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    version = event.metadata.resource_version or ""
    return seen or datetime.min.replace(tzinfo=UTC), int(version) if version.isdigit() else 0


def _pod_says(pod: Any, events: Callable[[str, str | None], list[Any] | None]) -> str:
    status, name = pod.status, pod.metadata.name
    for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
        waiting = container.state and container.state.waiting
        if not waiting or not waiting.reason or waiting.reason in STARTS:
            continue
        message = waiting.message or ""
        if waiting.reason == "ImagePullBackOff":  # says that it waits; what the registry said stands in an event
            pulls = [event for event in events("Pod", name) or [] if "Failed to pull" in (event.message or "")]
            message = last.message if (last := newest(pulls)) else message
        return with_cure(f"pod {name}: {waiting.reason}: {message}".strip(": "))
    for condition in status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return with_cure(f"pod {name}: {condition.message or condition.reason or 'not scheduled'}")
    return ""


def _events_say(waiting: list[Any], events: Callable[[str, str | None], list[Any] | None]) -> str:
    """Of pods that have a node and do not start: volumes that cannot be mounted, an image that takes long."""
    names = {pod.metadata.name for pod in waiting}
    warned = [event for event in events("Pod", None) or [] if event.involved_object.name in names]
    name = last.involved_object.name if (last := newest(warned)) else waiting[0].metadata.name
    event = newest(events("Pod", name))
    if event and event.type == "Warning":
        return _told("pod", name, event)
    return f"pod {name}: {event.message}" if event and event.reason == "Pulling" else ""


def _told(kind: str, name: str, event: Any) -> str:
    return with_cure(f"{kind} {name}: {event.reason}: {event.message or ''}".strip(": "))
