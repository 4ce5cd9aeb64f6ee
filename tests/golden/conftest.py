"""Fixtures of the golden tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from golden.golden_inputs import write_inputs
from golden.golden_runs import VALUES, RunProgram, child_environment, made_with
from processes import ForkServer


@pytest.fixture(scope="session")
def golden_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and rows of all cases."""
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def golden_values() -> dict[str, Any]:
    """The committed values of all cases; skips where they were made with other versions."""
    values = json.loads(VALUES.read_text(encoding="utf-8"))
    expected, installed = values["made_with"], made_with()
    changed = [
        f"{name} {expected.get(name)} (here {here})" for name, here in installed.items() if expected.get(name) != here
    ]
    if changed:
        pytest.skip(f"the golden losses were made with {', '.join(changed)}; regenerate them with `make golden`")
    return values["cases"]


@pytest.fixture(scope="session")
def run_portably(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunProgram]:
    """A function that runs `finetuning` in a folder, in a process that has imported torch with portable arithmetic."""
    fork_server = ForkServer(tmp_path_factory.mktemp("golden-processes"), child_environment())

    def run(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        process = fork_server.start(arguments, cwd=folder)
        code = process.wait()
        return subprocess.CompletedProcess(process.args, code, process.stdout, process.stderr)

    yield run
    fork_server.clear()
    fork_server.close()
