"""Goodput: how much of the time of all jobs of a session went into steps that are part of the model.

Every second of a job has one place: a step that was kept, fetching rows for it, what the first step took longer than
the others (compilation, allocation), a step that was done again or lost, saving or loading a checkpoint, evaluation,
starting up, publishing the model, or the rest. The time between two jobs is told apart.

The files that telemetry has written, read again: of jobs that ended well, and of those that were killed."""

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


@dataclass(frozen=True)
class RecordedSpan:
    """A span, pieced together from its events. Times are nanoseconds since 1970; one that never ended has the time
    that the job was last heard of, and `ended` is false."""

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
    """What one process of one job has recorded. `progress` is None where no training loop had begun."""

    path: Path
    resource: Mapping[str, Any]
    spans: tuple[RecordedSpan, ...]
    began_ns: int
    last_heard_ns: int
    progress: Mapping[str, Any] | None = None
    errors: tuple[str, ...] = field(default=())

    @property
    def session_tag(self) -> str:
        return str(self.resource.get("session_tag", ""))

    def total_s(self, *span_names: str) -> float:
        """Seconds in the spans of these names."""
        return sum(span.seconds for span in self.spans if span.name in span_names)


def read_lines(path: Path, *needed: str) -> Iterator[dict[str, Any]]:
    """The records of a file, in order; with `needed`, only those whose line holds one of these texts. A torn last line
    is left out."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if needed and not any(text in line for text in needed):
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def job_files(output_dir: Path, rank: int = 0) -> list[Path]:
    """The files of one rank of all jobs of an output directory, the oldest job first."""
    return sorted((output_dir / FOLDER).glob(f"*/rank{rank}.jsonl"))


def read_job(path: Path) -> RecordedJob | None:
    """One job as its file tells it; None where the file has no first line."""
    resource: Mapping[str, Any] | None = None
    began: dict[str, dict[str, Any]] = {}
    ended: dict[str, int] = {}
    errors, times = [], []
    # Updates are the most of a long file, and nothing here needs them.
    wanted = ('"type":"resource"', '"name":"span_st', '"name":"error"')
    for record in read_lines(path, *wanted):
        attributes = record.get("attributes") or {}
        times.append(record.get("time_ns") or 0)
        if record.get("type") == "resource":
            resource = attributes
        elif record.get("name") == names.SPAN_START:
            began[record["span_id"]] = record
        elif record.get("name") == names.SPAN_STOP:
            ended[record["span_id"]] = record["time_ns"]
        elif record.get("name") == names.ERROR:
            errors.append(str(attributes.get("error_message", "")))
    if resource is None:
        return None
    progress = read_progress(path.with_suffix(".progress"))
    last = max([*times, progress["time_ns"] if progress else 0])
    spans = tuple(
        RecordedSpan(
            record["attributes"].get("span_name", ""),
            span_id,
            record["attributes"].get("parent_span_id", ""),
            record["time_ns"],
            ended.get(span_id, last),
            span_id in ended,
        )
        for span_id, record in began.items()
    )
    first = min((span.start_ns for span in spans), default=times[0])
    return RecordedJob(path, resource, spans, min(first, times[0]), last, progress, tuple(errors))


BADPUT = (
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
class Goodput:
    """All jobs of one session. Times are seconds."""

    session_tag: str
    jobs: int
    total_s: float
    productive_s: float
    badput_s: dict[str, float]
    between_jobs_s: float
    lost_steps: int
    kept_steps: int
    disruptions: int
    """Jobs that ended before the training was done."""

    @property
    def goodput(self) -> float:
        """The share of productive time, 0 to 1."""
        return self.productive_s / self.total_s if self.total_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a record of the run."""
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
    """The goodput of a session of an output directory, by default of its last job's; None where nothing is recorded."""
    jobs = [job for path in job_files(output_dir) if (job := read_job(path))]
    if not jobs:
        return None
    tag = session_tag or jobs[-1].session_tag
    return goodput_of([job for job in jobs if job.session_tag == tag])


def measured_goodput(faults: TelemetryErrors, output_dir: Path, session_tag: str) -> Goodput | None:
    """`session_goodput`, with a fault noted where the files cannot be read."""
    try:
        return session_goodput(output_dir, session_tag)
    except Exception as error:  # noqa: BLE001  files of other jobs, in whatever state they are
        faults.note("reading what earlier jobs recorded", error)
        return None


def goodput_of(jobs: Sequence[RecordedJob]) -> Goodput | None:
    """The goodput of these jobs, in the order that they ran in."""
    if not jobs:
        return None
    badput = dict.fromkeys(BADPUT, 0.0)
    productive = total = 0.0
    kept_steps = lost_steps = disruptions = 0
    for index, job in enumerate(jobs):
        kept = _kept(job, jobs[index + 1 :])
        productive += kept.productive_s
        kept_steps += kept.steps
        lost_steps += kept.lost_steps
        disruptions += not _is_done(job)
        total += (job.last_heard_ns - job.began_ns) / 1e9
        for name, seconds in _badput(job, kept).items():
            badput[name] += seconds
    between = sum(max(after.began_ns - before.last_heard_ns, 0) / 1e9 for before, after in pairwise(jobs))
    return Goodput(
        jobs[0].session_tag,
        len(jobs),
        total,
        productive,
        badput,
        between,
        lost_steps,
        kept_steps,
        disruptions,
    )


@dataclass(frozen=True)
class _Kept:
    """What of a job's steps is part of the model: their number, and seconds of computing, waiting and warming up."""

    steps: int = 0
    lost_steps: int = 0
    productive_s: float = 0.0
    data_s: float = 0.0
    first_s: float = 0.0
    lost_s: float = 0.0


def _kept(job: RecordedJob, later: Sequence[RecordedJob]) -> _Kept:
    progress = job.progress
    if progress is None:
        return _Kept()
    start, step, total = int(progress["start"]), int(progress["step"]), float(progress["iterations_s"])
    done = step - start
    next_start = next((int(other.progress["start"]) for other in later if other.progress), None)
    if next_start is not None:
        steps = min(max(next_start - start, 0), done)
    elif _is_done(job):
        steps = done
    else:
        steps = max(int(progress["saved"]) - start, 0)
    if done <= 0:
        return _Kept()
    if steps == done:
        seconds = total
    elif steps == int(progress["saved"]) - start:
        seconds = float(progress["saved_s"])
    else:
        seconds = total * steps / done
    share = seconds / total if total > 0 else 0.0
    first = float(progress["first_s"])
    usual = (total - first) / (done - 1) if done > 1 else first
    first_excess = min(max(first - usual, 0.0), seconds)
    data = min(float(progress["data_s"]) * share, seconds - first_excess)
    return _Kept(steps, done - steps, seconds - data - first_excess, data, first_excess, total - seconds)


def _is_done(job: RecordedJob) -> bool:
    """Whether the training loop ended by itself, and the application after it."""
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    applications = [span for span in job.spans if span.name == names.APPLICATION]
    return bool(loops and applications) and all(span.ended for span in (*loops, *applications)) and not job.errors


def _badput(job: RecordedJob, kept: _Kept) -> dict[str, float]:
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    loop_begins = loops[0].start_ns if loops else job.last_heard_ns
    before = (loop_begins - job.began_ns) / 1e9
    loading = job.total_s(names.CHECKPOINT_LOAD)
    loading_before = sum(
        span.seconds for span in job.spans if span.name == names.CHECKPOINT_LOAD and span.start_ns < loop_begins
    )
    told = {
        "data_wait": kept.data_s,
        "first_step": kept.first_s,
        "lost_work": kept.lost_s,
        "checkpoint_save": job.total_s(names.CHECKPOINT_SAVE_SYNC, names.CHECKPOINT_SAVE_ASYNC),
        "checkpoint_load": loading,
        "evaluation": job.total_s(names.VALIDATION_LOOP, names.TESTING_LOOP),
        "initialization": max(before - loading_before, 0.0),
        "publication": job.total_s(names.MODEL_PUBLICATION),
    }
    elapsed = (job.last_heard_ns - job.began_ns) / 1e9
    told["other"] = max(elapsed - kept.productive_s - sum(told.values()), 0.0)
    return told
