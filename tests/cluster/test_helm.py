"""The chart as Helm itself renders it. The package helm-python-sdk is a binding to Helm's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_templates import render_chart

helm_python = pytest.importorskip("helm_python", reason="see make test-cluster")
CHART = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "chart"
VALUES: list[dict[str, Any]] = [
    {},
    {
        "nodes": 2,
        "queue": "user-queue",
        "finetuningGpus": 8,
        "distributedType": "fsdp2",
        "hfTokenSecret": {"name": "hf", "key": "token"},
        "imagePullSecrets": ["one", "two"],
        "labels": {"team": "a"},
        "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
        "networkResources": {"rdma/hca": "8"},
        "env": [{"name": "NCCL_SOCKET_IFNAME", "value": "net1"}],
        "cacheClaim": "finetuning-cache",
        "workspaceClaim": "",
        "storageClass": "shared",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "priorityClassName": "batch",
    },
    {"distributedType": "custom-accelerate-config", "customAccelerateConfig": {"distributed_type": "MULTI_GPU"}},
    {"distributedType": "auto-single-process", "networkPolicy": False},
    {"distributedType": "auto-deepspeed-stage3"},
]


def parsed(item: dict[str, Any]) -> dict[str, Any]:
    """A resource with the YAML in it parsed: Helm sorts its keys."""
    if item["kind"] == "ConfigMap":
        return item | {"data": {name: yaml.safe_load(text) for name, text in item["data"].items()}}
    return item


@pytest.mark.parametrize("values", VALUES)
def test_helm_renders_what_the_renderer_of_the_tests_does(values: dict[str, Any]) -> None:
    rendered = helm_python.Chart.load(CHART).render(values, name="run")
    items = [item for name in sorted(rendered) for item in yaml.safe_load_all(rendered[name]) if item]
    assert [parsed(item) for item in items] == [parsed(item) for item in render_chart(CHART, values)]


@pytest.mark.parametrize(
    ("values", "message"), [({"basemodel": "bucket/model"}, "copies nothing"), ({"finetuningGpu": 8}, "finetuningGpu")]
)
def test_helm_ignores_no_value(values: dict[str, Any], message: str) -> None:
    chart = helm_python.Chart.load(CHART)
    with pytest.raises(helm_python.HelmError, match=message):
        chart.validate_schema(values)
        chart.render(values)
