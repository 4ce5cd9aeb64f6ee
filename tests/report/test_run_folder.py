"""Reading an output directory, of this version and of earlier ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetuning.report.run_folder import read_run, read_run_record

OLD_RECORD = {
    "status": "completed",
    "told": [["model", "tiny", ""]],  # old name
    "controlled": ["step 3: stopped"],
    "trackers_that_failed": {"aim": "no repository"},
    "trained": True,
    "copied": ["checkpoint-1"],
    "not_copied": ["checkpoint-2: refused"],
    "data": {"rows": 3, "ledger": [{"part": "training"}]},  # old name
    "memory": {"peak_bytes": 1, "divisions": ["step 2: out of memory"]},
}
RECORD = {
    "status": "completed",
    "summary": [["model", "tiny", ""]],
    "controller_actions": ["step 3: stopped"],
    "tracker_errors": {"aim": "no repository"},
    "training_started": True,
    "uploaded_checkpoints": ["checkpoint-1"],
    "upload_errors": ["checkpoint-2: refused"],
    "data": {"rows": 3, "statistics": [{"split": "training"}]},
    "memory": {"peak_bytes": 1, "oom_retries": ["step 2: out of memory"]},
}
PREVIEW = "--- rows.jsonl:1 (row): 3 tokens, 2 trained\n<user>⟦Hello⟧\n"


@pytest.mark.parametrize("written", [OLD_RECORD, RECORD], ids=["old keys", "current keys"])
def test_a_record_is_returned_with_current_keys(tmp_path: Path, written: dict[str, object]) -> None:
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert read_run_record(tmp_path) == RECORD


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["missing", "truncated", "not an object"])
def test_an_unreadable_record_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert read_run_record(tmp_path) is None


@pytest.mark.parametrize("name", ["preview.txt", "first_rows.txt"])
def test_the_preview_is_read_under_its_old_name_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    (tmp_path / name).write_text(PREVIEW)
    [row] = read_run(tmp_path).rows
    assert row.segments == (("<user>", False), ("Hello", True))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    names = ("config.resolved.yaml", "preview.txt", "metrics.jsonl", "evaluations/a.json", "telemetry/job/rank0.jsonl")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    run = read_run(tmp_path)
    assert (run.config, run.rows, run.evaluations) == ("", (), ())
