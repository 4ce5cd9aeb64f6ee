"""Goodput: the share of the time of a session's jobs that went into steps that are part of the final model.

Each second of a job is in exactly one category: productive steps; waiting for data; the excess time of the first step
(compilation, allocation); steps that were lost or repeated, and the step or hang that ended in a kill; saving and
loading checkpoints; evaluation; starting the process; initialization; publication of the model; or other. The time
between jobs is separate.

The source is the progress files of all jobs, also of those that were killed. They do not depend on which spans are
exported. Jobs of earlier versions, which wrote shorter files, are computed from their spans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetuning.errors import parse_json
from finetuning.telemetry import names
from finetuning.telemetry.error_guard import TelemetryErrors
from finetuning.telemetry.metrics import CATEGORIES, LOOP_NOT_STARTED, RUNNING, JobProgress, read_progress
from finetuning.telemetry.session import FOLDER

BADPUT: tuple[str, ...] = (
    "data_wait",
    "first_step",
    "lost_work",
    "checkpoint_save",
    "checkpoint_load",
    "evaluation",
    "startup",
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
    progress: JobProgress | None = None
    errors: tuple[str, ...] = field(default=())

    @property
    def accounts(self) -> JobProgress | None:
        """The progress, if it has the times of everything that the job did."""
        return self.progress if self.progress is not None and self.progress.application_start_ns else None

    @property
    def loop_start_step(self) -> int | None:
        """The step at which the last training loop began; None without one."""
        if self.progress is None or (self.accounts and self.progress.loop_state == LOOP_NOT_STARTED):
            return None
        return self.progress.start

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
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def job_files(output_dir: Path, rank: int = 0) -> list[Path]:
    """Return the files of one rank of all jobs of an output directory, in the order of their folders' names."""
    return sorted(path for path in (output_dir / FOLDER).glob(f"*/rank{rank}.jsonl") if path.is_file())


def read_job(path: Path) -> RecordedJob | None:
    """Read the last job of a file; None if there is none."""
    jobs = read_jobs(path)
    return jobs[-1] if jobs else None


def read_jobs(path: Path) -> list[RecordedJob]:
    """Read the jobs that have written to a file, one after the other."""
    jobs: list[list[dict[str, Any]]] = []
    # Most of a long file is updates, which are not needed: do not parse them.
    for record in _read_records(path, '"type":"resource"', '"name":"span_st', '"name":"error"'):
        if record.get("type") == "resource":
            jobs.append([])
        if jobs:
            jobs[-1].append(record)
    return [_job_of(path, records) for records in jobs]


def _job_of(path: Path, records: Sequence[dict[str, Any]]) -> RecordedJob:
    starts: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    errors: list[str] = []
    for record in records:
        if record.get("name") == names.SPAN_START:
            starts[record["span_id"]] = record
        elif record.get("name") == names.SPAN_STOP:
            ends[record["span_id"]] = record["time_ns"]
        elif record.get("name") == names.ERROR:
            errors.append(str((record.get("attributes") or {}).get("error_message", "")))
    times = [record.get("time_ns") or 0 for record in records]
    progress = read_progress(path.with_name(records[0].get("progress") or f"{path.stem}.progress"))
    last = max([*times, progress.time_ns if progress else 0])
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
    resource = records[0].get("attributes") or {}
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
    """Compute the goodput of a session, by default the last job's; None if nothing is recorded.

    Args:
        output_dir: an output directory, or a single file that one or more jobs have written.
    """
    files = [output_dir] if output_dir.is_file() else job_files(output_dir)
    jobs = sorted((job for path in files for job in read_jobs(path)), key=lambda job: job.start_ns)
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
    productive = total = between_s = 0.0
    kept_steps = lost_steps = disruptions = previous_ns = 0
    for index, job in enumerate(jobs):
        kept = _kept_work(job, jobs[index + 1 :])
        # A process may run several jobs: each begins where the last one ended.
        began_ns = max(_process_start_ns(job), min(previous_ns, job.start_ns))
        productive += kept.productive_s
        kept_steps += kept.steps
        lost_steps += kept.lost_steps
        disruptions += not _is_done(job)
        total += (job.last_record_ns - began_ns) / 1e9
        between_s += max(began_ns - previous_ns, 0) / 1e9 if index else 0.0
        for name, seconds in _badput(job, kept, began_ns).items():
            badput[name] += seconds
        previous_ns = job.last_record_ns
    if all(math.isnan(job.progress.data_s) for job in jobs if job.progress is not None):
        del badput["data_wait"]
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


def _process_start_ns(job: RecordedJob) -> int:
    started = job.accounts.process_start_ns if job.accounts else 0
    return min(started, job.start_ns) or job.start_ns


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
    done, total = progress.step - progress.start, progress.iterations_s
    # A later job resumed from the last checkpoint that it had: steps after it were lost.
    next_start = next((item.loop_start_step for item in later if item.loop_start_step is not None), None)
    if next_start is not None:
        steps = min(max(next_start - progress.start, 0), done)
    elif _is_done(job):
        steps = done
    else:
        steps = max(progress.saved - progress.start, 0)
    earlier = _KeptWork(
        progress.earlier_steps, progress.earlier_lost_steps, progress.earlier_s, lost_s=progress.earlier_lost_s
    )
    unfinished_s = _unfinished_s(job)
    if done <= 0:
        return replace(earlier, lost_s=earlier.lost_s + unfinished_s)
    # Seconds are known up to the end and up to the last checkpoint; otherwise assume equally long steps.
    if steps == done:
        seconds = total
    elif steps == progress.saved - progress.start:
        seconds = progress.saved_s
    else:
        seconds = total * steps / done
    share = seconds / total if total > 0 else 0.0
    first = progress.first_s
    typical = (total - first) / (done - 1) if done > 1 else first
    first_excess = min(max(first - typical, 0.0), seconds)
    data_s = 0.0 if math.isnan(progress.data_s) else progress.data_s
    data = min(data_s * share, seconds - first_excess)
    return _KeptWork(
        steps + earlier.steps,
        done - steps + earlier.lost_steps,
        seconds - data - first_excess + earlier.productive_s,
        data,
        first_excess,
        total - seconds + earlier.lost_s + unfinished_s,
    )


def _unfinished_s(job: RecordedJob) -> float:
    """Return the seconds of the step, or the hang in it, during which a job was killed."""
    work = job.accounts
    if work is None or work.loop_state != RUNNING or work.open_category >= 0:
        return 0.0
    return max(job.last_record_ns - work.marked_ns, 0) / 1e9


def _is_done(job: RecordedJob) -> bool:
    """Return whether the training loop and then the application ended without an error."""
    if job.accounts is not None:
        return job.accounts.is_completed
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    applications = [span for span in job.spans if span.name == names.APPLICATION]
    return bool(loops and applications) and all(span.ended for span in (*loops, *applications)) and not job.errors


def _badput(job: RecordedJob, kept: _KeptWork, began_ns: int) -> dict[str, float]:
    """Return the seconds of each category of `BADPUT`."""
    times = _times_of_spans(job) if job.accounts is None else _times_of_progress(job, job.accounts)
    badput = {
        "data_wait": kept.data_s,
        "first_step": kept.first_s,
        "lost_work": kept.lost_s,
        "startup": max(job.start_ns - began_ns, 0) / 1e9,
        **times,
    }
    elapsed = (job.last_record_ns - began_ns) / 1e9
    badput["other"] = max(elapsed - kept.productive_s - sum(badput.values()), 0.0)
    return badput


def _times_of_progress(job: RecordedJob, work: JobProgress) -> dict[str, float]:
    times = {
        "checkpoint_save": work.checkpoint_save_s,
        "checkpoint_load": work.checkpoint_load_s,
        "evaluation": work.evaluation_s,
        "publication": work.publication_s,
    }
    loop_start_ns = work.loop_start_ns or job.last_record_ns
    initial_load_s = work.initial_load_s
    # What was going on when the job was killed took until then.
    if work.open_category >= 0:
        category, seconds = CATEGORIES[work.open_category], (job.last_record_ns - work.open_since_ns) / 1e9
        times[category] += seconds
        if not work.loop_start_ns:
            initial_load_s += seconds
    times["initialization"] = max((loop_start_ns - job.start_ns) / 1e9 - initial_load_s, 0.0)
    return times


def _times_of_spans(job: RecordedJob) -> dict[str, float]:
    loops = [span for span in job.spans if span.name == names.TRAINING_LOOP]
    loop_start_ns = loops[0].start_ns if loops else job.last_record_ns
    loading_before = sum(
        span.seconds for span in job.spans if span.name == names.CHECKPOINT_LOAD and span.start_ns < loop_start_ns
    )
    return {
        "checkpoint_save": job.total_s(names.CHECKPOINT_SAVE_SYNC, names.CHECKPOINT_SAVE_ASYNC),
        "checkpoint_load": job.total_s(names.CHECKPOINT_LOAD),
        "evaluation": job.total_s(names.VALIDATION_LOOP, names.TESTING_LOOP),
        "initialization": max((loop_start_ns - job.start_ns) / 1e9 - loading_before, 0.0),
        "publication": job.total_s(names.MODEL_PUBLICATION),
    }
