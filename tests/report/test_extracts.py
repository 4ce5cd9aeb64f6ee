"""The chart files and the model card of a run."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning.report.charts import Series, line_chart
from finetuning.report.html import picture, write_extracts_or_warn


def test_a_chart_file_is_a_standalone_svg() -> None:
    curves = [Series("training <1>", [(1, 2.0), (2, 1.0)]), Series("validation", [(2, 1.5)], color=1, dashed=True)]
    chart = line_chart("Loss & more", curves)
    assert chart is not None
    root = xml.fromstring(picture(chart))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "Loss & more"
    assert texts[1] == "— training <1>- - validation"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output directory of a run."""
    final = tmp_path / "checkpoint-final"
    final.mkdir()
    (final / "README.md").write_text("[More Information Needed]")
    record: dict[str, Any] = {
        "engine": "finetuning 1",
        "method": "sft",
        "status": "completed",
        "jobs": [{"packages": {"torch": "2.1", "bitsandbytes": "not installed"}}],
        "plan": {"steps": {"total": 3}, "batch": {"total": 8}, "learning_rate": 0.1},
        "model": {"name": "models/tiny", "notes": ["LORA adapter: 5 of 9 weights are trained"]},
        "data": {"statistics": [{"split": "training", "kept": 5, "rows": 6, "tokens": 700}], "fingerprint": "abc"},
        "artifact": {
            "kind": "adapter",
            "folder": str(final),
            "base": "models/tiny",
            "checks": ["all values finite"],
            "stop_tokens": "stops at 2",
        },
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "kind": "training", "time": step, "loss": 1 / step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_model_card_describes_the_run(folder: Path) -> None:
    written = write_extracts_or_warn(folder)
    names = ["plots/loss.svg", "model_card.md", "checkpoint-final/README.md"]
    assert [str(path.relative_to(folder)) for path in written] == names
    card = (folder / "model_card.md").read_text()
    assert (folder / "checkpoint-final" / "README.md").read_text() == card
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "models/tiny",
        "library_name": "peft",
        "tags": ["sft", "finetuning", "lora"],
        "pipeline_tag": "text-generation",
    }
    assert "| final loss | 0.3333, " in text
    assert "| training rows | 5 of 6 kept, 700 tokens |" in text
    assert "- all values finite" in text
    assert "not installed" not in text


def test_a_model_card_that_cannot_be_written_is_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "plots").write_text("not a folder")
    assert write_extracts_or_warn(folder) == []
    assert len(caplog.records) == 1
