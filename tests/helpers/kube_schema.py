"""Custom resource definitions of JobSet and Kubeflow Trainer, made from the models that kubeflow-trainer-api publishes.

The models have every field and type but no enums, so the enums of fields that powernap sets are listed here, as in JobSet's
api/jobset/v1alpha2/jobset_types.go and Trainer's pkg/apis/trainer/v1alpha1. Kubernetes 1.20 silently drops fields that a schema
does not have, which newer servers can refuse: `dropped_fields` reports them.
"""

import importlib
import re
import types
import typing

from pydantic import BaseModel

# (model, field) -> choices
CHOICES = {
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): ["Recreate", "BlockingRecreate", "InPlaceRestart"],
    ("JobsetV1alpha2FailurePolicyRule", "action"): [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ],
    ("JobsetV1alpha2SuccessPolicy", "operator"): ["All", "Any"],
    ("JobsetV1alpha2StartupPolicy", "startupPolicyOrder"): ["AnyOrder", "InOrder"],
    ("IoK8sApiBatchV1JobSpec", "completionMode"): ["NonIndexed", "Indexed"],
    ("IoK8sApiBatchV1JobSpec", "podReplacementPolicy"): ["TerminatingOrFailed", "Failed"],
    ("IoK8sApiBatchV1PodFailurePolicyRule", "action"): ["FailJob", "FailIndex", "Ignore", "Count"],
    ("IoK8sApiBatchV1PodFailurePolicyOnExitCodesRequirement", "operator"): ["In", "NotIn"],
    ("IoK8sApiCoreV1PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
    ("IoK8sApiCoreV1PodSpec", "dnsPolicy"): ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    ("IoK8sApiCoreV1Container", "imagePullPolicy"): ["Always", "IfNotPresent", "Never"],
    ("IoK8sApiCoreV1Container", "terminationMessagePolicy"): ["File", "FallbackToLogsOnError"],
    ("IoK8sApiCoreV1EmptyDirVolumeSource", "medium"): ["", "Memory"],
    ("IoK8sApiCoreV1SeccompProfile", "type"): ["RuntimeDefault", "Localhost", "Unconfined"],
    ("IoK8sApiCoreV1Toleration", "operator"): ["Exists", "Equal"],
    ("IoK8sApiCoreV1Toleration", "effect"): ["", "NoSchedule", "PreferNoSchedule", "NoExecute"],
    ("IoK8sApiCoreV1TopologySpreadConstraint", "whenUnsatisfiable"): ["DoNotSchedule", "ScheduleAnyway"],
    ("TrainerV1alpha1RuntimeRef", "kind"): ["TrainingRuntime", "ClusterTrainingRuntime"],
}
# Defaults that the server sets.
DEFAULTS = {
    ("JobsetV1alpha2FailurePolicy", "restartStrategy"): "Recreate",
    ("JobsetV1alpha2ReplicatedJob", "replicas"): 1,
    ("JobsetV1alpha2ReplicatedJob", "groupName"): "default",
    ("TrainerV1alpha1RuntimeRef", "kind"): "ClusterTrainingRuntime",
    ("TrainerV1alpha1RuntimeRef", "apiGroup"): "trainer.kubeflow.org",
}
KINDS = {
    "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobset_v1alpha2_job_set"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainer_v1alpha1_train_job"),
    "TrainingRuntime": ("trainer.kubeflow.org", "v1alpha1", "trainer_v1alpha1_training_runtime"),
}


def definitions() -> list[dict]:
    """The CustomResourceDefinitions, ready to be created."""
    return [_definition(kind, *names) for kind, names in KINDS.items()]


def dropped_fields(sent: object, stored: object, path: str = "") -> list[str]:
    """Paths of fields that were sent but that the server has not stored: misspelled, or not in its schema."""
    if isinstance(sent, dict) and isinstance(stored, dict):
        dropped = [dropped_fields(sent[key], stored.get(key), f"{path}.{key}") for key in sent]
        return [path for paths in dropped for path in paths]
    if isinstance(sent, list) and isinstance(stored, list) and len(sent) == len(stored):
        dropped = [
            dropped_fields(one, other, f"{path}[{i}]") for i, (one, other) in enumerate(zip(sent, stored, strict=True))
        ]
        return [path for paths in dropped for path in paths]
    return [] if sent == stored else [path.lstrip(".")]


def _definition(kind: str, group: str, version: str, module: str) -> dict:
    models = importlib.import_module(f"kubeflow_trainer_api.models.{module}")
    schema = _of_model(getattr(models, "".join(word.capitalize() for word in module.split("_"))))
    schema["properties"]["metadata"] = {"type": "object"}  # which the server checks itself
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    # TrainingRuntime has none, and no status either.
                    "subresources": {"status": {}} if "status" in schema["properties"] else {},
                }
            ],
        },
    }


def _of_model(model: type[BaseModel]) -> dict:
    """A structural schema of one generated model, with nested ones inlined: a definition has no references."""
    if model.__name__.endswith("ResourceQuantity") or "actual_instance" in model.model_fields:
        return {"x-kubernetes-int-or-string": True}  # a quantity: 8, or "80Gi"
    properties, required = {}, []
    for name, field in model.model_fields.items():
        key = field.alias or name
        properties[key] = _of_type(field.annotation)
        if choices := CHOICES.get((model.__name__, key)):
            properties[key]["enum"] = choices
        if (model.__name__, key) in DEFAULTS:
            properties[key]["default"] = DEFAULTS[model.__name__, key]
        if field.is_required():
            required.append(key)
    schema = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {})


def _of_type(annotation: object) -> dict:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _of_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        members = [argument for argument in arguments if argument is not type(None)]
        return _of_type(members[0]) if len(members) == 1 else {"x-kubernetes-int-or-string": True}

    if origin is list:
        return {"type": "array", "items": _of_type(arguments[0])}
    if origin is dict:
        if arguments[1] is typing.Any:
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        return {"type": "object", "additionalProperties": _of_type(arguments[1])}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _of_model(annotation)
    scalars = {str: "string", int: "integer", bool: "boolean", float: "number"}
    if annotation in scalars:
        return {"type": scalars[annotation]}
    name = getattr(annotation, "__name__", str(annotation))
    if re.search("datetime", name):
        return {"type": "string", "format": "date-time"}
    raise AssertionError(f"no schema for {annotation!r}")
