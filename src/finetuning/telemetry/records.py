"""The files that telemetry has written, read again: of jobs that ended well, and of those that were killed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.meters import read_progress
from finetuning.telemetry.tags import FOLDER


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
