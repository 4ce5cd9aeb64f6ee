"""The page of architectures is the one that the recorded results give."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from zoo.architectures import NOT_BUILT

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_architectures_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "architecture_table.py"))
    record = json.loads((ROOT / "tests" / "zoo" / "results.json").read_text(encoding="utf-8"))
    written = (ROOT / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
    assert written == script["page"](record, NOT_BUILT), "run: make docs"
