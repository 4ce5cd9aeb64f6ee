"""Manifests against the schemas of Kubernetes and Kubeflow, the chart as rendered, and the commands in all of them.

kubernetes-validate holds Kubernetes' own schemas, kubeflow-trainer-api those of Kubeflow Trainer's TrainJob and of
JobSet, and kubeflow-training those of the older PyTorchJob. No package has Volcano's: its pods are validated.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_templates import ChartError, render_chart
from kubeflow.training import models
from kubeflow_trainer_api import models as trainer_models

from finetuning.cli.launch import build_parser
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.distributed import DEFAULT_GRACE_S, read_grace
from finetuning.launch.hosts import resolve_hosts

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "kubernetes" / "chart"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"
KUBERNETES_OWN = ("v1", "batch/v1", "networking.k8s.io/v1")
JOBS = ("Job", "PyTorchJob", "TrainJob", "JobSet")
OVERRIDES = {
    "nodes": 2,
    "queue": "user-queue",
    "finetuningGpus": 8,
    "distributedType": "fsdp2",
    "hfTokenSecret": {"name": "hf", "key": "token"},
    "imagePullSecrets": ["registry"],
    "labels": {"team": "a"},
    "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
    "networkResources": {"rdma/hca": "8"},
    "env": [{"name": "NCCL_SOCKET_IFNAME", "value": "net1"}],
    "cacheClaim": "finetuning-cache",
    "workspaceClaim": "",
    "storageClass": "shared",
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "priorityClassName": "batch",
    "customAccelerateConfig": {"distributed_type": "MULTI_GPU"},
}


def chart(overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    return render_chart(CHART, overrides)


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in MANIFESTS:
        for item in yaml.safe_load_all(file.read_text()):
            yield f"{file.name}: {item['kind']}", item
    for name, overrides in (("plain", {}), ("full", OVERRIDES)):
        for item in chart(overrides):
            yield f"chart, {name}: {item['kind']}", item


ALL: dict[str, dict[str, Any]] = {}
for key, manifest in everything():
    # Several of a kind in a file differ by their names.
    ALL[f"{key} {manifest['metadata']['name']}" if key in ALL else key] = manifest


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container, and the trainer of a TrainJob."""
    if isinstance(value, dict):
        if "image" in value and "args" in value:
            yield value
        for inner in value.values():
            yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if item["apiVersion"] in KUBERNETES_OWN])
def test_kubernetes_takes_it(name: str) -> None:
    kubernetes_validate.validate(ALL[name], KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("trainjob.yaml: TrainJob", trainer_models.TrainerV1alpha1TrainJob),
        ("jobset.yaml: JobSet", trainer_models.JobsetV1alpha2JobSet),
    ],
)
def test_kubeflow_takes_it(name: str, model: Any) -> None:
    manifest = ALL[name]
    assert model.from_dict(manifest).to_dict() == manifest, "a key that the schema does not know is lost on the way"


def test_the_job_of_a_job_set_is_one_of_kubernetes() -> None:
    [replicated] = ALL["jobset.yaml: JobSet"]["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, **replicated["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_pods_of_a_volcano_job_are_those_of_kubernetes() -> None:
    spec = ALL["volcano.yaml: Job"]["spec"]
    for task in spec["tasks"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": task["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert spec["minAvailable"] == sum(task["replicas"] for task in spec["tasks"]), "all of them or none"


def test_the_training_operator_takes_the_pytorch_job() -> None:
    manifest = ALL["pytorchjob.yaml: PyTorchJob"]
    spec = models.KubeflowOrgV1PyTorchJobSpec
    supported = {value for value in spec.attribute_map.values()}
    assert set(manifest["spec"]) <= supported
    assert set(manifest["spec"]["runPolicy"]) <= set(models.KubeflowOrgV1RunPolicy.attribute_map.values())
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        assert set(replica) <= set(models.KubeflowOrgV1ReplicaSpec.attribute_map.values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": replica["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if item["kind"] in JOBS])
def test_the_command_is_one_of_ours(name: str) -> None:
    result = list(containers(ALL[name]))
    assert result
    for container in result:
        assert container.get("command", ["finetuning"]) == ["finetuning"]
        arguments = [str(item) for item in container["args"]]
        if arguments != ["job"]:
            assert arguments[0] == "launch"
            assert build_parser().parse_args(arguments[1:]).command[0] in EXPERIMENTS


# Exit codes of a run: 1 and 3 end the job, 203 and those of a signal do not.
def test_what_cannot_succeed_is_not_tried_again() -> None:
    pytorch = ALL["pytorchjob.yaml: PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    assert {replica["restartPolicy"] for replica in pytorch.values()} == {"ExitCode"}
    [replicated] = ALL["jobset.yaml: JobSet"]["spec"]["replicatedJobs"]
    jobs = [replicated["template"]["spec"], ALL["job.yaml: Job"]["spec"], ALL["chart, full: Job"]["spec"]]
    for job in jobs:
        rule = job["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 3]
        names = [item["name"] for item in job["template"]["spec"]["containers"]]
        assert rule["onExitCodes"]["containerName"] in names
    volcano = ALL["volcano.yaml: Job"]["spec"]["policies"]
    assert [policy["exitCode"] for policy in volcano if "exitCode" in policy] == [203]


def test_what_a_job_refers_to_is_in_the_shared_file() -> None:
    shared = {(item["kind"], item["metadata"]["name"]) for name, item in ALL.items() if name.startswith("shared")}
    claims = {name for kind, name in shared if kind == "PersistentVolumeClaim"}
    for file in ("job", "pytorchjob", "trainjob", "jobset", "volcano"):
        text = (DEPLOY / "kubernetes" / f"{file}.yaml").read_text()
        assert set(re.findall(r"claimName: (\S+)", text)) == claims
        assert set(re.findall(r"serviceAccountName: (\S+)", text)) == {"finetuning"}
        assert "app.kubernetes.io/name: finetuning" in text, "the label that the network policy selects"
    modes = [item["spec"]["accessModes"] for item in ALL.values() if item["kind"] == "PersistentVolumeClaim"]
    assert modes == [["ReadWriteMany"]] * 3


def test_the_pods_of_the_chart_find_each_other() -> None:
    items = {item["kind"]: item for item in chart(OVERRIDES)}
    job, pod = items["Job"]["spec"], items["Job"]["spec"]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 2
    assert pod["subdomain"] == items["Service"]["metadata"]["name"]
    variables = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    environ = {name: value for name, value in variables.items() if value is not None} | {"PET_NODE_RANK": "1"}
    hosts = resolve_hosts(environ=environ)
    assert (hosts.nnodes, hosts.node_rank, hosts.address) == (2, 1, "run-0.run")
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "512Gi", "nvidia.com/gpu": "8", "rdma/hca": "8"}


@pytest.mark.parametrize(
    ("kind", "preset"),
    [("auto-deepspeed-stage3", "zero3"), ("auto-deepspeed-stage1", "zero1"), ("auto-ddp", "ddp"), ("zero2", "zero2")],
)
def test_the_chart_takes_the_words_of_silogen(kind: str, preset: str) -> None:
    [job] = (item for item in chart({"distributedType": kind}) if item["kind"] == "Job")
    [container] = containers(job)
    assert build_parser().parse_args(container["args"][1:]).preset == preset


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"basemodel": "bucket/model"}, "copies nothing from a bucket"),
        ({"checkpointsRemote": "bucket/out"}, "copy_checkpoints_to"),
        ({"mergeAdapter": True}, "merge_adapter"),
        ({"finetuningGpu": 8}, "'finetuningGpu' was unexpected"),
        ({"distributedType": "auto"}, "'auto' is not one of"),
    ],
)
def test_the_chart_ignores_no_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ChartError, match=message):
        chart(values)


def test_secrets_are_named_and_not_written() -> None:
    for container in containers(list(ALL.values())):
        for item in container.get("env", []):
            assert "TOKEN" not in item["name"] or "valueFrom" in item


@pytest.mark.parametrize("overrides", [{}, OVERRIDES])
def test_the_finetuning_config_of_the_chart_is_right(overrides: dict[str, Any]) -> None:
    (config,) = (item for item in chart(overrides) if item["kind"] == "ConfigMap")
    document = parse_document(config["data"]["experiment.yaml"], "values.yaml")
    assert validate(document, EXPERIMENTS["sft"]).experiment.batchsize_conf.total_train_batch_size == 64


def test_the_slurm_script_is_a_right_script() -> None:
    script = DEPLOY / "slurm" / "finetuning.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    command = re.search(r"finetuning launch (.*?) \|\|", script.read_text().replace("\\\n", " "), re.S)
    assert command is not None
    arguments = command[1].replace('"$first:29500"', "a:29500").replace('"${PRESET:-ddp}"', "ddp").split()
    assert build_parser().parse_args(arguments).command[0] == "sft"


def grace_periods(value: Any) -> Iterator[int]:
    """Every grace period of a pod."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value.get("terminationGracePeriodSeconds", 30)
        for inner in value.values():
            yield from grace_periods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from grace_periods(inner)


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if item["kind"] in JOBS])
def test_a_pod_has_the_grace_period_that_the_launcher_expects(name: str) -> None:
    periods = set(grace_periods(ALL[name]))
    for container in containers(ALL[name]):
        variables = {item["name"]: item.get("value") for item in container.get("env", [])}
        assert periods == {read_grace({name: value for name, value in variables.items() if value is not None})}


def test_slurm_signals_as_long_ahead_as_the_launcher_expects() -> None:
    script = (DEPLOY / "slurm" / "finetuning.sbatch").read_text()
    lead = re.search(r"^#SBATCH --signal=USR1@(\d+)$", script, re.M)
    grace = re.search(r"--grace (\d+)", script)
    assert lead is not None and grace is not None
    assert int(lead[1]) == int(grace[1]) == DEFAULT_GRACE_S
