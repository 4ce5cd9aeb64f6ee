"""Jobs of several processes with the real programs: DeepSpeed, torch's launcher, SLURM.

Run by `make test-cluster`, which builds an environment with DeepSpeed and sets FINETUNING_CLUSTER_TESTS; without that
variable these tests are skipped, as they take many minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

IS_ON = os.environ.get("FINETUNING_CLUSTER_TESTS", "") not in ("", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="see make test-cluster")
    for item in items:
        if not IS_ON and Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


def _losses(folder: Path) -> dict[tuple[str, int], float]:
    log = folder / "training_logs.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return {(line["name"], line["data"]["step"]): line["data"]["value"] for line in lines}


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], dict[tuple[str, int], float]]:
    """A function that reads the losses of an output directory by name and step; the last one of a repeated step."""
    return _losses


@pytest.fixture(scope="session")
def last_step() -> Callable[[Path], int]:
    """A function that returns the last logged step of an output directory; 0 before the first."""

    def read(folder: Path) -> int:
        try:
            return max((step for _, step in _losses(folder)), default=0)
        except ValueError:
            # A line that is being written.
            return 0

    return read


@pytest.fixture(scope="session")
def run_record() -> Callable[[Path], dict[str, Any]]:
    """A function that reads `run.json`."""
    return lambda folder: json.loads((folder / "run.json").read_text(encoding="utf-8"))
