"""Fixtures of the golden tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden.golden_inputs import write_inputs
from golden.golden_runs import VALUES, made_with


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
