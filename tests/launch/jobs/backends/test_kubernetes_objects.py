"""What would be created fits the published schemas, strictly, and has what a cluster needs of it."""

import copy
import dataclasses
import itertools
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

from powernap.launch.jobs.backends.kubernetes import Kubernetes
from powernap.launch.jobs.backends.kubernetes_objects import check, object_name, objects
from powernap.launch.jobs.cluster import parse_cluster
from powernap.launch.jobs.description import JobDescription, JobError
from powernap.launch.jobs.job import BuildJob, Job, TrainingJob
from powernap.train.config import Recipe
from powernap.train.recipe_file import RecipeError
from tests.helpers import kube_schema, runs

MODELS = {
    "JobSet": JobsetV1alpha2JobSet,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}
KUBERNETES = "1.37"
FULL = {
    "queue": "gpus",
    "priority_class": "training",
    "service_account": "powernap",
    "image_pull_secrets": ["registry"],
    "device_resources": {"rdma/hca": 1},
    "host_network": True,
    "node_selector": {"nvidia.com/gpu.product": "H100"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}, {"operator": "Exists"}],
    "spread_by": "kubernetes.io/hostname",
    "exclusive_topology": "topology.kubernetes.io/rack",
    "network": {"interface": "eth0", "nccl": {"NCCL_DEBUG": "INFO"}, "port": 30000},
    "secrets": {"TOKEN": {"secret": "mlflow", "key": "token"}},
}
WANTED = {
    "device": "gpu",
    "nodes": 2,
    "cpus_per_process": 4,
    "memory": "64GiB",
    "time": "2h",
    "grace": "5m",
    "retries": 5,
    "secrets": ["TOKEN"],
    "env": {"A": "b: c # d", "NUMBER": "1"},
    "mounts": ["/scratch:/scratch", "/data:/data:ro"],
}


def job(form: str = "jobset", profile: dict | None = None, wanted: dict | None = None, name: str = "mine") -> Job:
    sections = {**runs.RECIPE, "run": {"name": name}, "parallel": {"data": 4}}
    cluster = parse_cluster({"kind": "kubernetes", "form": form, "storage": {"claim": "work"}} | (profile or {}))
    description = JobDescription(**{"image": "registry.example/powernap:1"} | (wanted or {}))
    return TrainingJob(
        recipe=Recipe.model_validate(sections),
        description=description.resolved(4, "the layout"),
        cluster=cluster,
        submission_id="0123456789abcdef",
        attempt=1,
        submit_dir=Path("/"),
        submitted_as="powernap submit a.yaml 'data.train=pipe:$(cat)'",
    )


def strict(schema: dict) -> dict:
    """An OpenAPI schema as JSON schema that refuses fields it does not know."""
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        schema["type"] = ["integer", "string", "number"]
    if "properties" in schema:
        schema["properties"] = {name: strict(of) for name, of in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = strict(schema["items"])
    return schema


def _schemas() -> dict[str, dict]:
    found = {}
    for definition in kube_schema.definitions():
        schema = strict(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[definition["spec"]["names"]["kind"]] = schema
    return found


SCHEMAS = _schemas()


def jobset_spec(body: dict) -> dict:
    return body["spec"] if body["kind"] == "JobSet" else body["spec"]["template"]["spec"]


def findings(body: dict) -> list[str]:
    """Everything that a validator says against an object."""
    if body["kind"] == "ConfigMap":
        return by_kubernetes(body)
    said = [error.message for error in jsonschema.Draft7Validator(SCHEMAS[body["kind"]]).iter_errors(body)]
    try:
        model = MODELS[body["kind"]].from_dict(body)
        said += kube_schema.dropped_fields(body, yaml.safe_load(model.to_json()))
    except ValueError as error:
        said.append(str(error))
    if body["kind"] != "TrainJob":
        template = jobset_spec(body)["replicatedJobs"][0]["template"]
        metadata = {"name": "x", **template.get("metadata", {})}
        said += by_kubernetes({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]})
    return said


def by_kubernetes(body: dict) -> list[str]:
    try:
        kubernetes_validate.validate(body, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
@pytest.mark.parametrize(
    ("profile", "wanted"),
    [
        ({}, {}),
        (FULL, WANTED),
        *(({key: value}, {}) for key, value in FULL.items()),
        ({"read_only_root": False}, {"nodes": 4}),
    ],
    ids=str,
)
def test_all_objects_are_valid(form, profile, wanted):
    made = objects(job(form, profile, wanted))
    assert [body["kind"] for body in made] == {
        "jobset": ["JobSet", "ConfigMap"], "trainjob": ["TrainJob", "TrainingRuntime", "ConfigMap"]
    }[form]  # fmt: skip
    for body in made:
        assert findings(body) == []


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
@pytest.mark.parametrize("profile", [{}, FULL], ids=str)
def test_a_part_of_a_build_has_no_recipe(form, profile):
    run = job(form, profile)
    one = {field.name: getattr(run, field.name) for field in dataclasses.fields(Job)}
    one["description"] = JobDescription(nodes=1, processes_per_node=1, image="registry.example/powernap:1")
    part = BuildJob(**one, build="build-mine", output=Path("mine"), words=("depo", "mine"), part=(3, 64))
    check([part])
    made = objects(part)
    assert [findings(body) for body in made] == [[]] * len(made)
    assert "ConfigMap" not in {body["kind"] for body in made}
    pod = _at(jobset_spec(made[-1]), *SPEC[1:])
    assert {volume["name"] for volume in pod["volumes"]} == {"storage", "shm", "tmp"}
    assert pod["containers"][0]["command"] == ["powernap", "data", "build", "depo", "mine", "--part", "3/64"]


def _at(body: dict, *path) -> dict:
    for key in path:
        body = body[key]
    return body


POD = ("spec", "replicatedJobs", 0, "template", "spec")
SPEC = (*POD, "template", "spec")
PLANTED = [
    (("spec", "failurePolicy"), {"maxRestart": 1}),
    (("spec", "failurePolicy"), {"restartStrategy": "BlockingRestart"}),
    (("spec", "failurePolicy", "rules", 0), {"action": "RestartAll"}),
    (("spec", "failurePolicy", "rules", 0), {"onJobFailureReason": ["PodFailurePolicy"]}),
    (("spec", "network"), {"enableDnsHostnames": True}),
    (("spec", "successPolicy"), {"operator": "Every"}),
    (POD, {"backofLimit": 1}),
    (POD, {"completionMode": "Index"}),
    (POD, {"parallelism": "2"}),
    (POD, {"podReplacementPolicy": "Never"}),
    ((*POD, "podFailurePolicy", "rules", 0), {"action": "Fail"}),
    ((*POD, "podFailurePolicy", "rules", 1, "onExitCodes"), {"operator": "in"}),
    (SPEC, {"restartPolicy": "Nevr"}),
    (SPEC, {"terminationGracePeriod": 1}),
    (SPEC, {"dnsPolicy": "ClusterFirstHostNet"}),
    ((*SPEC, "securityContext"), {"runAsNonroot": True}),
    ((*SPEC, "securityContext"), {"seccompProfile": {"type": "runtimeDefault"}}),
    ((*SPEC, "containers", 0), {"port": []}),
    ((*SPEC, "containers", 0, "env", 1), {"value": 3}),
    ((*SPEC, "containers", 0, "securityContext"), {"readOnlyRootFileSystem": True}),
    ((*SPEC, "tolerations", 0), {"effect": "NoScheduling"}),
    ((*SPEC, "topologySpreadConstraints", 0), {"whenUnsatisfiable": "Refuse"}),
    ((*SPEC, "volumes", 2, "emptyDir"), {"medium": "RAM"}),
]


@pytest.mark.parametrize(("where", "change"), PLANTED, ids=str)
def test_a_planted_mistake_is_found(where, change):
    body = copy.deepcopy(objects(job(profile=FULL, wanted=WANTED))[0])
    _at(body, *where).update(change)
    assert findings(body)


@pytest.mark.parametrize("change", [{"numNode": 2}, {"runtimeRef": {"name": "x", "kind": "Runtime"}}], ids=str)
def test_a_planted_mistake_in_a_trainjob_is_found(change):
    body = copy.deepcopy(objects(job("trainjob"))[0])
    body["spec"].update(change)
    assert findings(body)


def test_what_a_cluster_needs_of_a_pod():
    made = objects(job(profile=FULL, wanted=WANTED))[0]
    pods = _at(made, *POD)
    assert (pods["completions"], pods["parallelism"], pods["backoffLimit"]) == (2, 2, 0)
    assert pods["activeDeadlineSeconds"] == 7200 and made["spec"]["suspend"]
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 5
    rules = pods["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob"] * 2 and rules[1]["onExitCodes"]["values"] == [75]
    pod = _at(made, *SPEC)
    assert pod["terminationGracePeriodSeconds"] > 300
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    limits = {"nvidia.com/gpu": 2, "rdma/hca": 1, "cpu": "8", "memory": "65536Mi"}
    assert container["resources"] == {"limits": limits, "requests": limits}
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["PET_MASTER_ADDR"] == "mine-1-node-0-0.mine-1" and values["PET_MASTER_PORT"] == "30000"
    assert (
        values["POWERNAP_SUBMITTED_AS"] == "powernap submit a.yaml 'data.train=pipe:$$(cat)'"
    )  # as kubelet unescapes it
    assert values["A"] == "b: c # d" and values["NCCL_SOCKET_IFNAME"] == "eth0" and values["TOKEN"] is None
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "8192Mi"}
    assert container["command"] == ["powernap", "train", "/etc/powernap/recipe.yaml", "--auto-resume"]


def test_text_is_what_is_sent_whatever_the_values_hold():
    nasty = {"A": "'\"\n- b: {c}\n# $(id) `id` &x *y\\", "B": "null", "C": "1e3", "D": "---\n"}
    one = job(wanted={"env": nasty})
    (text,) = Kubernetes(one.cluster).render([one]).values()
    assert list(yaml.safe_load_all(text)) == objects(one)
    assert "&id" not in text  # aliases


def test_names_fit_dns_and_differ_where_runs_do():
    names = ["mine", "Mine", "m.ine", "m_ine", "m-ine", "1mine", "mine-", "x" * 60, "x" * 59 + "y", "é"]
    found = {name: object_name(job(name=name)) for name in names}
    assert len(set(found.values())) == len(names)
    for name in found.values():
        assert len(f"{name}-node-0-0-abcde") <= 63
        assert name[0].isalpha() and name.replace("-", "").isalnum() and name == name.lower() and name.isascii()
    assert found["mine"] == "mine-1"


@pytest.mark.parametrize(
    ("profile", "wanted", "words"),
    [
        ({}, {"image": None}, "job.image is missing"),
        ({}, {"environment": "/opt/env"}, "job.environment=/opt/env"),
        ({}, {"secrets": ["TOKEN"]}, "job.secrets=TOKEN: add its Secret"),
        ({}, {"env": {"PET_NNODES": "2"}}, "job.env.PET_NNODES"),
    ],
)
def test_what_no_server_is_needed_to_refuse(profile, wanted, words):
    with pytest.raises(JobError, match=words):
        check([job(profile=profile, wanted=wanted)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", "A"), ("queue", "a b"), ("form", "job"), ("gpu_resource", "gpu;"), ("device_resources", {"rdma/a": 0}),
        ("tolerations", [{"effect": "None"}]), ("storage", {"claim": "c", "path": "relative"}), ("shared_memory", "1"),
        ("secrets", {"A": {"secret": "b"}}), ("node_selector", {"a": "b c"}), ("user", 0), ("ttl", "ever"),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_told(field, value):
    with pytest.raises(RecipeError, match=field):
        parse_cluster({"kind": "kubernetes", "storage": {"claim": "work"}} | {field: value})


def test_the_shipped_profile_with_all_its_examples():
    text = (Path(__file__).parents[4] / "launch/clusters/kubernetes.yaml").read_text()
    examples = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if not line.startswith("#") or _is_example(line)
    )
    values = yaml.safe_load(examples)
    assert len(values) > 15
    cluster = parse_cluster(values)
    sections = {**runs.RECIPE, "run": {"name": "mine"}, "parallel": {"data": 8}}
    description = cluster.job.resolved(8, "the layout")
    one = TrainingJob(
        recipe=Recipe.model_validate(sections),
        description=description,
        cluster=cluster,
        submission_id="0" * 16,
        attempt=1,
        submit_dir=Path("/"),
    )
    assert not list(itertools.chain.from_iterable(findings(body) for body in objects(one)))


def _is_example(line: str) -> bool:
    return line.startswith("# ") and ": " in line and line[2:].partition(":")[0].isidentifier()


def test_a_recipe_that_no_configmap_holds_is_refused():
    small = job()
    shards = ["data/" + "x" * 2**19 + ".tar"] * 3
    big = small.recipe.model_copy(update={"data": small.recipe.data.model_copy(update={"train": shards})})
    with pytest.raises(
        JobError, match=r"recipe takes 1.5 MiB, data.train alone 1.5 MiB: .* holds 1 MiB: write a pattern"
    ):
        check([dataclasses.replace(small, recipe=big)])
    with pytest.raises(JobError, match="job.env and network.nccl take 1.* MiB"):
        check([job(wanted={"env": {"A": "x" * 2**20}})])
    check([small])
