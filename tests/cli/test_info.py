"""`finetuning doctor`: what is here is found by trying it, what is missing is named with its install line."""

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

from finetuning.cli.info import PACKAGES, attention_of, doctor_main, is_there
from finetuning.model.hardware import Device, Hardware, detect_hardware

HERE = not torch.cuda.is_available()


def test_people_read_what_is_here_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_main([]) == 0
    out = capsys.readouterr().out
    assert f"torch      {torch.__version__}, built for " in out
    for package in PACKAGES:
        line = next(line for line in out.splitlines() if line.startswith(f"  {package.distribution} "))
        assert (version(package.distribution) if is_there(package.module) else package.install) in line
    assert ("no accelerator: " in out) == HERE


def test_machines_read_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor_main(["--json", "--output-dir", str(tmp_path / "not" / "yet" / "there")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machine"]["torch"] == torch.__version__
    assert told["machine"]["disk_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert told["packages"]["peft"] == version("peft")
    assert told["attention"]["sdpa"] is None
    assert set(told["missing"]) == {package.module for package in PACKAGES if not is_there(package.module)}


def test_only_torch_is_imported() -> None:
    code = (
        "import sys; from finetuning.cli.info import doctor_main; doctor_main([]);"
        " print(sorted({'transformers', 'peft', 'trl', 'mlflow', 'bitsandbytes', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_cpu_is_described_by_what_it_computes() -> None:
    machine = detect_hardware(Path("."))
    cpu = machine.devices[-1]
    assert cpu.kind == "cpu"
    assert cpu.support_for("bf16").is_supported
    assert not cpu.support_for("fp16").is_supported
    assert 0 < machine.free <= machine.memory


def test_flash_attention_wants_a_device_and_its_package() -> None:
    def found(kind: str, *installed: str) -> Any:
        device = Device("a", kind, None, None, ())
        return attention_of(Hardware("3", "2", "b", 1, None, None, 0, (device,)), installed)["flash_attention_2"]

    assert found("cpu", "flash_attention_2") == "needs a CUDA or ROCm device"
    assert found("cuda") == "pip install 'finetuning[flash-attention]'"
    assert found("cuda", "flash_attention_4") == "pip install 'finetuning[flash-attention]'"
    assert found("cuda", "flash_attention_2") is None
