"""Benchmarks run on the current code. What they measure is for an idle machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import ForkServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALLEST = {
    "saving.py": ["--size", "tiny", "--rounds", "1"],
    "telemetry.py": ["--steps", "20", "--every", "10", "--rounds", "1"],
    "generation.py": ["--size", "tiny", "--prompts", "4", "--new-tokens", "4", "--repeats", "1"],
    "data/packing.py": ["--rows", "2000", "--rounds", "1"],
    "data/prepare.py": ["--rows", "40", "--rounds", "1", "--only", "ours, one process"],
}
OF_MANY_PROCESSES = {
    "startup.py": ["--rounds", "1"],
    "images.py": ["--rounds", "1", "--steps", "2"],
    "rehearsal.py": ["--size", "tiny", "--cases", "SFT, LoRA"],
    "merge.py": ["--size", "tiny", "--rounds", "1"],
    "training/sliced_loss.py": ["--labels", "512", "--vocabulary", "512", "--hidden", "32", "--rounds", "1"],
    "training/throughput.py": [
        "--rounds",
        "1",
        "--steps",
        "2",
        "--layers",
        "2",
        "--variants",
        "finetuning, end to end",
    ],
}


def run(fork_server: ForkServer, name: str, args: list[str]) -> None:
    process = fork_server.start(args, {"OMP_NUM_THREADS": "1"}, program=str(BENCHMARKS / name))
    assert process.wait() == 0, process.output
    lines = process.stdout.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 2 or any(json.loads(line) for line in lines if line.startswith("{")), process.output


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_its_results(fork_server: ForkServer, name: str) -> None:
    run(fork_server, name, SMALLEST[name])


@pytest.mark.full
@pytest.mark.parametrize("name", OF_MANY_PROCESSES)
def test_a_benchmark_of_whole_processes_prints_its_results(fork_server: ForkServer, name: str) -> None:
    run(fork_server, name, OF_MANY_PROCESSES[name])


def test_every_benchmark_is_run() -> None:
    scripts = {str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py")}
    parts = {"training/engines.py", "training/make_inputs.py", "training/measuring.py"}
    peers = {"training/trl_script.py", "training/unsloth_engine.py"}
    # `make gpu-check` runs for minutes, also on its smallest models.
    assert scripts == {*SMALLEST, *OF_MANY_PROCESSES, "gpu_check.py"} | parts | peers
