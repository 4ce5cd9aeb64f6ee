"""What the faults have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def losses_by_step() -> Callable[[Path], dict[int, set[float]]]:
    """A function that reads all losses that were ever logged in an output directory, by step."""

    def read(output_dir: Path) -> dict[int, set[float]]:
        result: dict[int, set[float]] = {}
        for line in (output_dir / "training_logs.jsonl").read_text(encoding="utf-8").splitlines():
            data = json.loads(line)["data"]
            result.setdefault(data["step"], set()).add(data["value"])
        return result

    return read
