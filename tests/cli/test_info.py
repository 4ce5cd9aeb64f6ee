"""`finetuning doctor`: hardware is probed, and missing packages have an install command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.cli.info import PACKAGES, attention_support, doctor_main, is_installed
from finetuning.model.hardware import Device, Hardware, detect_hardware

IS_CPU_ONLY = not torch.cuda.is_available()


def test_text_lists_installed_and_missing_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_main([]) == 0
    out = capsys.readouterr().out
    assert f"torch      {torch.__version__}, built for " in out
    for package in PACKAGES:
        line = next(line for line in out.splitlines() if line.startswith(f"  {package.distribution} "))
        assert (version(package.distribution) if is_installed(package.module) else package.install) in line
    assert ("no accelerator: " in out) == IS_CPU_ONLY


def test_json_has_the_same_facts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor_main(["--json", "--output-dir", str(tmp_path / "not" / "yet" / "there")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["disk_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert result["packages"]["peft"] == version("peft")
    assert result["attention"]["sdpa"] is None
    assert set(result["missing"]) == {package.module for package in PACKAGES if not is_installed(package.module)}


def test_only_torch_is_imported() -> None:
    code = (
        "import sys; from finetuning.cli.info import doctor_main; doctor_main([]);"
        " print(sorted({'transformers', 'peft', 'trl', 'mlflow', 'bitsandbytes', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_cpu_lists_its_dtypes() -> None:
    machine = detect_hardware(Path("."))
    cpu = machine.devices[-1]
    assert cpu.kind == "cpu"
    assert cpu.support_for("bf16").is_supported
    assert not cpu.support_for("fp16").is_supported
    assert 0 < machine.free <= machine.memory


def test_flash_attention_requires_a_gpu_and_its_package() -> None:
    def support(kind: str, *installed: str) -> Any:
        device = Device("a", kind, None, None, ())
        return attention_support(Hardware("3", "2", "b", 1, None, None, 0, (device,)), installed)["flash_attention_2"]

    assert support("cpu", "flash_attention_2") == "needs a CUDA or ROCm device"
    assert support("cuda") == "pip install flash-attn"
    assert support("cuda", "flash_attention_4") == "pip install flash-attn"
    assert support("cuda", "flash_attention_2") is None
