"""Goodput: the share of the time of a session's jobs that went into steps that are part of the final model.

Each second of a job is in exactly one category: productive steps; waiting for data; the excess time of the first step
(compilation, allocation); steps that were lost or repeated; saving and loading checkpoints; evaluation; initialization;
publication of the model; or other. The time between jobs is separate.

The source is the files that telemetry has written, also those of jobs that were killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.error_guard import TelemetryErrors
from finetuning.telemetry.metrics import read_progress
from finetuning.telemetry.session import FOLDER

BADPUT: tuple[str, ...] = (
    "data_wait",
    "first_step",
    "lost_work",
    "checkpoint_save",
    "checkpoint_load",
    "evaluation",
    "initialization",
    "publication",
    "other",
)


@dataclass(frozen=True)
class RecordedSpan:
    """A span, reconstructed from its events. Times are nanoseconds since 1970.

    A span that never ended has the time of the job's last record as its end, and `ended` is false.
    """

    name: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    ended: bool

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class RecordedJob:
    """What one process of one job has recorded. `progress` is None if no training loop had begun."""

    path: Path
    resource: Mapping[str, Any]
    spans: tuple[RecordedSpan, ...]
    start_ns: int
    last_record_ns: int
    progress: Mapping[str, float] | None = None
    errors: tuple[str, ...] = field(default=())

    @property
    def session_tag(self) -> str:
        return str(self.resource.get("session_tag", ""))

    def total_s(self, *span_names: str) -> float:
        """Return the seconds in the spans of these names."""
        return sum(span.seconds for span in self.spans if span.name in span_names)


def _read_records(path: Path, *patterns: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, of lines that contain one of these texts. An incomplete last line is skipped."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if not any(pattern in line for pattern in patterns):
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def job_files(output_dir: Path, rank: int = 0) -> list[Path]:
    """Return the files of one rank of all jobs of an output directory, oldest job first."""
    return sorted((output_dir / FOLDER).glob(f"*/rank{rank}.jsonl"))


def read_job(path: Path) -> RecordedJob | None:
    """Read a job's file; None if it has no first line."""
    resource: Mapping[str, Any] | None = None
    starts: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    errors: list[str] = []
    times: list[int] = []
    # Most of a long file is updates, which are not needed: do not parse them.
    patterns = ('"type":"resource"', '"name":"span_st', '"name":"error"')
    for record in _read_records(path, *patterns):
        attributes = record.get("attributes") or {}
        times.append(record.get("time_ns") or 0)
        if record.get("type") == "resource":
            resource = attributes
        elif record.get("name") == names.SPAN_START:
            starts[record["span_id"]] = record
        elif record.get("name") == names.SPAN_STOP:
            ends[record["span_id"]] = record["time_ns"]
        elif record.get("name") == names.ERROR:
            errors.append(str(attributes.get("error_message", "")))
    if resource is None:
        return None
    progress = read_progress(path.with_suffix(".progress"))
    last = max([*times, int(progress["time_ns"]) if progress else 0])
    spans = tuple(
        RecordedSpan(
            record["attributes"].get("span_name", ""),
            span_id,
            record["attributes"].get("parent_span_id", ""),
            record["time_ns"],
            ends.get(span_id, last),
            span_id in ends,
        )
        for span_id, record in starts.items()
    )
    first = min((span.start_ns for span in spans), default=times[0])
    return RecordedJob(path, resource, spans, min(first, times[0]), last, progress, tuple(errors))


@dataclass(frozen=True)
class Goodput:
    """The goodput of all jobs of one session. Times are seconds."""

    session_tag: str
    jobs: int
    total_s: float
    productive_s: float
    badput_s: dict[str, float]
    between_jobs_s: float
    lost_steps: int
    kept_steps: int
    disruptions: int
    """Jobs that ended before training was complete."""

    @property
    def goodput(self) -> float:
        """The share of productive time, from 0 to 1."""
        return self.productive_s / self.total_s if self.total_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the run record."""
        return {
            "goodput": self.goodput,
            "jobs": self.jobs,
            "disruptions": self.disruptions,
            "total_sec": self.total_s,
            "productive_sec": self.productive_s,
            "badput_sec": dict(self.badput_s),
            "between_jobs_sec": self.between_jobs_s,
            "kept_steps": self.kept_steps,
            "lost_steps": self.lost_steps,
        }


def session_goodput(output_dir: Path, session_tag: str | None = None) -> Goodput | None:
    """Compute the goodput of a session, by default the last job's; None if nothing is recorded."""
    jobs = [job for path in job_files(output_dir) if (job := read_job(path))]
    if not jobs:
        return None
    tag = session_tag or jobs[-1].session_tag
    return compute_goodput([job for job in jobs if job.session_tag == tag])


def try_session_goodput(errors: TelemetryErrors, output_dir: Path, session_tag: str) -> Goodput | None:
    """Return `session_goodput`, or None with an error recorded if the files cannot be read."""
    try:
        return session_goodput(output_dir, session_tag)
    except Exception as error:  # noqa: BLE001  files of other jobs may be corrupt in any way
        errors.record("reading the files of earlier jobs", error)
        return None


def compute_goodput(jobs: Sequence[RecordedJob]) -> Goodput | None:
    """Compute the goodput of jobs, in the order in which they ran."""
    if not jobs:
        return None
    badput = dict.fromkeys(BADPUT, 0.0)
    productive = total = 0.0
    kept_steps = lost_steps = disruptions = 0
    for index, job in enumerate(jobs):
        kept = _kept_work(job, jobs[index + 1 :])
        productive += kept.productive_s
        kept_steps += kept.steps
        lost_steps += kept.lost_steps
        disruptions += not _is_done(job)
        total += (job.last_record_ns - job.start_ns) / 1e9
        for name, seconds in _badput(job, kept).items():
            badput[name] += seconds
    between_s = sum(max(after.start_ns - before.last_record_ns, 0) / 1e9 for before, after in pairwise(jobs))
    return Goodput(
        jobs[0].session_tag,
        len(jobs),
        total,
        productive,
        badput,
        between_s,
        lost_steps,
        kept_steps,
        disruptions,
    )


@dataclass(frozen=True)
class _KeptWork:
    """The steps of a job that are part of the final model, and the seconds that they and the lost ones took."""

    steps: int = 0
    lost_steps: int = 0
    productive_s: float = 0.0
    data_s: float = 0.0
    first_s: float = 0.0
    lost_s: float = 0.0


def _kept_work(job: RecordedJob, later: Sequence[RecordedJob]) -> _KeptWork:
    progress = job.progress
    if progress is None:
        return _KeptWork()
    start, step, total = int(progress["start"]), int(progress["step"]), float(progress["iterations_s"])
    done = step - start
    # A later job resumed from the last checkpoint that it had: steps after it were lost.
    next_start = next((int(item.progress["start"]) for item in later if item.progress), None)
    if next_start is not None:
        steps = min(max(next_start - start, 0), done)
    elif _is_done(job):
        steps = done
    else:
        steps = max(int(progress["saved"]) - start, 0)
    if done <= 0:
        return _KeptWork()
    # Seconds are known up to the end and up to the last checkpoint; otherwise assume equally long steps.
    if steps == done:
        seconds = total
    elif steps == int(progress["saved"]) - start:
        seconds = float(progress["saved_s"])
    else:
        seconds = total * steps / done
    share = seconds / total if total > 0 else 0.0
    first = float(progress["first_s"])
    typical = (total - first) / (done - 1) if done > 1 else first
    first_excess = min(max(first - typical, 0.0), seconds)
    data = min(float(progress["data_s"]) * share, seconds - first_excess)
    return _KeptWork(steps, done - steps, seconds - data - first_excess, data, first_excess, total - seconds)


def _is_done(job: RecordedJob) -> bool:
    """Return whether the training loop and then the application ended without an error."""
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    applications = [span for span in job.spans if span.name == names.APPLICATION]
    return bool(loops and applications) and all(span.ended for span in (*loops, *applications)) and not job.errors


def _badput(job: RecordedJob, kept: _KeptWork) -> dict[str, float]:
    """Return the seconds of each category of `BADPUT`."""
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    loop_start_ns = loops[0].start_ns if loops else job.last_record_ns
    before_loop = (loop_start_ns - job.start_ns) / 1e9
    loading = job.total_s(names.CHECKPOINT_LOAD)
    loading_before = sum(
        span.seconds for span in job.spans if span.name == names.CHECKPOINT_LOAD and span.start_ns < loop_start_ns
    )
    badput = {
        "data_wait": kept.data_s,
        "first_step": kept.first_s,
        "lost_work": kept.lost_s,
        "checkpoint_save": job.total_s(names.CHECKPOINT_SAVE_SYNC, names.CHECKPOINT_SAVE_ASYNC),
        "checkpoint_load": loading,
        "evaluation": job.total_s(names.VALIDATION_LOOP, names.TESTING_LOOP),
        "initialization": max(before_loop - loading_before, 0.0),
        "publication": job.total_s(names.MODEL_PUBLICATION),
    }
    elapsed = (job.last_record_ns - job.start_ns) / 1e9
    badput["other"] = max(elapsed - kept.productive_s - sum(badput.values()), 0.0)
    return badput
