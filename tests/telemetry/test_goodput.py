"""Goodput of jobs with given times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.telemetry.goodput import session_goodput
from finetuning.telemetry.metrics import PROGRESS

SECOND = 1_000_000_000


def write_job(
    output_dir: Path,
    name: str,
    *,
    began_s: int,
    spans: list[tuple[str, int, int | None]],
    progress: tuple[float, ...],
    session: str = "s",
) -> None:
    """Write the two files of a job.

    Spans are (name, start, end) in seconds since the job began; the end is None for one that never ended. `progress`
    is: first step, last step, seconds of the last record, saved step; then seconds of iterations, of data loading, of
    the first step, and of iterations up to the saved step.
    """
    folder = output_dir / "telemetry" / name
    folder.mkdir(parents=True)
    began = began_s * SECOND
    lines: list[dict[str, Any]] = [{"type": "resource", "time_ns": began, "attributes": {"session_tag": session}}]
    for index, (span, start, end) in enumerate(spans):
        event = {"type": "event", "span_id": str(index), "attributes": {"span_name": span}}
        lines.append(event | {"name": "span_start", "time_ns": began + start * SECOND})
        if end is not None:
            lines.append(event | {"name": "span_stop", "time_ns": began + end * SECOND})
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    (folder / "rank0.jsonl").write_text(text + '{"type":"event","name":"torn')
    start, step, heard, saved, *seconds = progress
    times = (int(start), int(step), began + int(heard) * SECOND, int(saved))
    (folder / "rank0.progress").write_bytes(PROGRESS.pack(*times, *seconds))


def test_every_second_is_in_one_category(tmp_path: Path) -> None:
    # Killed after 100 s: 20 s to start, 17 steps of 4 s, the first 6 s longer; 10 of them saved, which took 4 s.
    write_job(
        tmp_path,
        "1",
        began_s=1000,
        spans=[("application", 0, None), ("training_loop", 20, None), ("checkpoint_save_sync", 66, 70)],
        progress=(0, 17, 100, 10, 74.0, 7.4, 10.0, 46.0),
    )
    # Resumes half a minute later from step 10: 30 s to start, of which 5 s load the checkpoint.
    write_job(
        tmp_path,
        "2",
        began_s=1130,
        spans=[
            ("application", 0, 90),
            ("checkpoint_load", 10, 15),
            ("training_loop", 30, 80),
            ("validation_loop", 70, 75),
            ("model_publication", 81, 89),
        ],
        progress=(10, 20, 80, -1, 40.0, 4.0, 4.0, 0.0),
    )
    write_job(tmp_path, "0", began_s=10, spans=[("application", 0, 9)], progress=(0, 0, 0, -1, 0, 0, 0, 0), session="x")
    goodput = session_goodput(tmp_path)
    assert (goodput.session_tag, goodput.jobs, goodput.disruptions) == ("s", 2, 1)
    assert (goodput.kept_steps, goodput.lost_steps) == (20, 7)
    assert goodput.total_s == 190
    assert goodput.between_jobs_s == 30
    assert goodput.badput_s == pytest.approx(
        {
            "data_wait": 4.6 + 4.0,
            "first_step": 6.0,
            "lost_work": 28.0,
            "checkpoint_save": 4.0,
            "checkpoint_load": 5.0,
            "evaluation": 5.0,
            "initialization": 20 + 25.0,
            "publication": 8.0,
            "other": 190 - 46 - 40 - 28 - 4 - 5 - 5 - 45 - 8,
        }
    )
    assert goodput.productive_s == pytest.approx(46 - 6 - 4.6 + 40 - 4)
    assert goodput.goodput == pytest.approx(goodput.productive_s / 190)


def test_there_is_no_goodput_without_records(tmp_path: Path) -> None:
    assert session_goodput(tmp_path) is None
    (tmp_path / "telemetry" / "1").mkdir(parents=True)
    (tmp_path / "telemetry" / "1" / "rank0.jsonl").write_text("")
    assert session_goodput(tmp_path) is None
