"""The golden values cover every case, and the arithmetic behind them does not depend on the CPU's instructions."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

from golden.golden_runs import CASES, STEPS, VALUES, child_environment

METHODS = {"sft", "dpo", "kto", "reward", "grpo", "orpo", "cpo"}
MULTIPLY = """
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
"""


def test_every_case_has_values_and_every_method_a_case() -> None:
    values: dict[str, Any] = json.loads(VALUES.read_text(encoding="utf-8"))["cases"]
    assert list(values) == list(CASES)
    assert {case.split("-")[0] for case in CASES} == METHODS
    for case, value in values.items():
        losses = [entry["loss"] for entry in value["log"] if "loss" in entry]
        assert len(set(losses)) == STEPS, f"{case} does not train"


def test_runs_use_one_thread_and_no_cpu_specific_instructions() -> None:
    environment = {**child_environment(), "MKL_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", MULTIPLY], env=environment, capture_output=True, text=True, check=True)
    assert "DEFAULT 1" in done.stdout
    calls = [line for line in done.stdout.splitlines() if "GEMM" in line]
    assert calls or platform.machine() != "x86_64"
    assert all("CNR:COMPATIBLE" in line for line in calls), calls
