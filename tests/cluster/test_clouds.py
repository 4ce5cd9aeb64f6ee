"""The files for SkyPilot and dstack, read by the programs themselves, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.launch import build_parser
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.distributed import DEFAULT_GRACE_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SKYPILOT = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
[resources] = task.resources
values = {"nodes": task.num_nodes, "gpus": list(resources.accelerators.values()), "commands": [task.run]}
print(json.dumps(values | {"codes": resources.job_recovery["recover_on_exit_codes"]}))
"""
DSTACK = """
import json, sys, yaml
from dstack._internal.core.models.configurations import parse_run_configuration
with open(sys.argv[1]) as file:
    task = parse_run_configuration(yaml.safe_load(file))
values = {"nodes": task.nodes, "gpus": [task.resources.gpu.count.min], "commands": task.commands}
print(json.dumps(values | {"grace": task.stop_duration}))
"""


def read_task(tool: str, script: str, file: str) -> dict[str, Any]:
    python = Path(sys.prefix) / tool / "bin" / "python"
    if not python.exists():
        pytest.skip("see make test-cluster")
    result = subprocess.run([python, "-c", script, DEPLOY / file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_skypilot_takes_its_file() -> None:
    task = read_task("skypilot", SKYPILOT, "skypilot/finetuning.yaml")
    assert (task["nodes"], task["gpus"]) == (2, [8])
    assert task["codes"] == [138, 143, 203], "what may end otherwise the next time"
    assert_runs(task["commands"])


def test_dstack_takes_its_file() -> None:
    task = read_task("dstack", DSTACK, "dstack/finetuning.dstack.yml")
    assert (task["nodes"], task["gpus"]) == (2, [8])
    assert task["grace"] == DEFAULT_GRACE_S
    assert_runs(task["commands"])


def assert_runs(commands: list[str]) -> None:
    [command] = commands
    words = command.replace("\\\n", " ").split()
    assert words[:2] == ["finetuning", "launch"]
    assert build_parser().parse_args(words[2:]).command[0] in EXPERIMENTS
