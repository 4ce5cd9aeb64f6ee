"""Manifests against the schemas of Kubernetes and Kubeflow, the chart as rendered, and the commands in all of them.

kubernetes-validate holds Kubernetes' own schemas, kubeflow-trainer-api those of Kubeflow Trainer's TrainJob, and
kubeflow-training those of the older PyTorchJob.
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
from kubeflow.training import models
from kubeflow_trainer_api import models as trainer_models

from finetuning.cli.launch import build_parser
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.distributed import DEFAULT_GRACE_S, read_grace

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "kubernetes" / "chart"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.33"
OVERRIDES = {
    "queue": "user-queue",
    "gpus": 8,
    "preset": "fsdp2",
    "huggingFaceSecret": "hf",
    "env": [{"name": "A", "value": "1"}],
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}


def looked_up(path: str, scope: Any) -> Any:
    for name in path.strip(".").split("."):
        scope = scope[name]
    return scope


def rendered(text: str, scope: Mapping[str, Any]) -> str:
    """A template of the chart, which uses a few words of Helm's language only: if, end, toYaml, nindent, quote."""
    lines: list[str] = []
    displayed = [True]
    for line in text.splitlines():
        control = re.fullmatch(r"\s*\{\{-? (if (\S+)|end) \}\}", line)
        if control:
            if control[1] == "end":
                displayed.pop()
            else:
                displayed.append(displayed[-1] and bool(looked_up(control[2], scope)))
        elif displayed[-1]:
            block = re.fullmatch(r"\s*\{\{- toYaml (\S+) \| nindent (\d+) \}\}", line)
            if block:
                dumped = yaml.safe_dump(looked_up(block[1], scope), sort_keys=False)
                lines += [" " * int(block[2]) + item for item in dumped.splitlines()]
            else:
                lines.append(re.sub(r"\{\{ (\S+)( \| quote)? \}\}", lambda match: filled(match, scope), line))
    assert displayed == [True]
    assert not any("{{" in line for line in lines), "a word of Helm's language that this renderer does not know"
    return "\n".join(lines)


def filled(match: re.Match[str], scope: Mapping[str, Any]) -> str:
    value = str(looked_up(match[1], scope))
    return f'"{value}"' if match[2] else value


def chart(overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = yaml.safe_load((CHART / "values.yaml").read_text()) | dict(overrides)
    if shutil.which("helm"):
        command = ["helm", "template", "run", str(CHART), "--values", "-"]
        text = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True, check=True).stdout
    else:
        scope = {"Values": values, "Release": {"Name": "run"}}
        text = "\n---\n".join(rendered(file.read_text(), scope) for file in sorted((CHART / "templates").iterdir()))
    return [item for item in yaml.safe_load_all(text) if item]


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in MANIFESTS:
        for item in yaml.safe_load_all(file.read_text()):
            yield f"{file.name}: {item['kind']}", item
    for name, overrides in (("plain", {}), ("full", OVERRIDES)):
        for item in chart(overrides):
            yield f"chart, {name}: {item['kind']}", item


ALL = dict(everything())


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


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if "kubeflow" not in item["apiVersion"]])
def test_kubernetes_takes_it(name: str) -> None:
    kubernetes_validate.validate(ALL[name], KUBERNETES, strict=True)


def test_kubeflow_trainer_takes_the_train_job() -> None:
    manifest = ALL["trainjob.yaml: TrainJob"]
    job = trainer_models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert job.to_dict() == manifest, "a key that the schema does not know is lost on the way"


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


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if item["kind"] != "ConfigMap"])
def test_the_command_is_one_of_ours(name: str) -> None:
    result = list(containers(ALL[name]))
    assert result
    for container in result:
        assert container.get("command", ["finetuning"]) == ["finetuning"]
        arguments = [str(item) for item in container["args"]]
        if arguments != ["job"]:
            assert arguments[0] == "launch"
            assert build_parser().parse_args(arguments[1:]).command[0] in EXPERIMENTS


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


@pytest.mark.parametrize("name", [name for name, item in ALL.items() if item["kind"] != "ConfigMap"])
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
