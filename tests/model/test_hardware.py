"""Why a build of torch for GPUs sees none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from finetuning.config.sections.experiment import SFTExperiment
from finetuning.model import hardware
from finetuning.model.hardware import explain_missing_gpu
from finetuning.training.preflight import check_device


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /dev, on a machine whose torch sees no GPU."""
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def build(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None = None, hip: str | None = None) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_a_build_for_cpus_is_nothing_to_explain(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch)
    assert explain_missing_gpu() is None
    build(monkeypatch, hip="7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert explain_missing_gpu() is None


def test_devices_that_are_not_there(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, cuda="13.0")
    assert "built for CUDA 13.0 but sees no GPU: there is no /dev/nvidia0" in (explain_missing_gpu() or "")
    (devices / "nvidia0").touch()
    assert "driver may be too old" in (explain_missing_gpu() or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides all of them" in (explain_missing_gpu() or "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    build(monkeypatch, hip="7.1")
    assert "built for ROCm 7.1 but sees no GPU: there is no /dev/kfd" in (explain_missing_gpu() or "")


def test_a_device_of_another_group(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, hip="7.1")
    (devices / "dri").mkdir()
    for device in ("kfd", "dri/renderD128"):
        (devices / device).touch()
    assert "rocminfo" in (explain_missing_gpu() or "")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "renderD128")
    group = (devices / "dri/renderD128").stat().st_gid
    assert f"may not open {devices}/dri/renderD128, which belongs to group {group}" in (explain_missing_gpu() or "")
    assert f"--group-add {group}" in (explain_missing_gpu() or "")


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_run_says_so_first(
    use_cpu: bool, devices: Path, sft_values: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(monkeypatch, cuda="13.0")
    assert callable(sft_values)
    experiment = SFTExperiment.model_validate(sft_values({"training_args.use_cpu": use_cpu}))
    check_device(experiment)
    assert ("sees no GPU" in caplog.text) is not use_cpu
    assert ("This run uses the CPU" in caplog.text) is not use_cpu
