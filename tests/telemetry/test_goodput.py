"""Goodput of jobs with given times."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from finetuning.telemetry.goodput import session_goodput
from finetuning.telemetry.metrics import COMPLETED, RUNNING, JobProgress

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
    # What versions before 0.2 wrote.
    (folder / "rank0.progress").write_bytes(struct.pack("<4q4d", *times, *seconds))


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
            "startup": 0.0,
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


def write_progress(output_dir: Path, name: str, *, began_s: int, **values: Any) -> None:
    """Write a job of which nothing but the application span was exported. Times are seconds since the job began."""
    write_job(output_dir, name, began_s=began_s, spans=[("application", 0, None)], progress=(0, 0, 0, -1, 0, 0, 0, 0))
    for key in ("time_ns", "application_start_ns", "loop_start_ns", "marked_ns", "open_since_ns", "process_start_ns"):
        if key in values:
            values[key] = (began_s + values[key]) * SECOND
    progress = JobProgress(**{"application_start_ns": began_s * SECOND, **values})
    (output_dir / "telemetry" / name / "rank0.progress").write_bytes(progress.pack())


def test_a_hang_that_ends_in_a_kill_is_lost_work(tmp_path: Path) -> None:
    # Ten steps of 2 s, five of them saved; then 300 s without progress until the kill.
    write_progress(
        tmp_path,
        "job",
        began_s=1000,
        process_start_ns=-7,
        loop_start_ns=10,
        step=10,
        saved=5,
        iterations_s=20.0,
        saved_s=10.0,
        first_s=2.0,
        data_s=0.0,
        marked_ns=31,
        time_ns=331,
        loop_state=RUNNING,
        checkpoint_save_s=1.0,
    )
    goodput = session_goodput(tmp_path)
    assert goodput.total_s == 338
    assert goodput.badput_s["lost_work"] == pytest.approx(10 + 300)
    assert goodput.badput_s["startup"] == 7
    assert goodput.badput_s["initialization"] == 10
    assert goodput.productive_s == 10
    assert goodput.productive_s + sum(goodput.badput_s.values()) == pytest.approx(goodput.total_s)
    assert (goodput.disruptions, goodput.lost_steps) == (1, 5)


def test_a_job_killed_in_a_checkpoint_was_saving(tmp_path: Path) -> None:
    write_progress(
        tmp_path,
        "job",
        began_s=1000,
        loop_start_ns=10,
        step=10,
        iterations_s=20.0,
        marked_ns=30,
        time_ns=90,
        loop_state=RUNNING,
        open_category=0,
        open_since_ns=30,
    )
    badput = session_goodput(tmp_path).badput_s
    assert badput["checkpoint_save"] == 60
    assert badput["lost_work"] == 20


def test_jobs_are_ordered_by_time(tmp_path: Path) -> None:
    common = {"loop_state": COMPLETED, "loop_start_ns": 1, "iterations_s": 10.0, "time_ns": 20, "marked_ns": 20}
    write_progress(tmp_path, "job-2", began_s=1000, step=10, saved=5, saved_s=5.0, **common)
    write_progress(tmp_path, "job-10", began_s=1100, start=5, step=15, application_state=COMPLETED, **common)
    goodput = session_goodput(tmp_path)
    assert (goodput.kept_steps, goodput.lost_steps, goodput.disruptions) == (15, 5, 1)
    assert goodput.between_jobs_s == 80


def test_time_that_was_not_measured_is_left_out(tmp_path: Path) -> None:
    write_progress(tmp_path, "job", began_s=1000, loop_start_ns=1, step=3, iterations_s=3.0, time_ns=9, marked_ns=9)
    assert "data_wait" not in session_goodput(tmp_path).badput_s
