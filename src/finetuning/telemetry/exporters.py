"""JSON lines on disk: one file per process and job, a record a write, so that a killed process loses none.

    {"type": "resource", "time_ns", "attributes": {…}}                                the first line: who writes
    {"type": "event", "name", "time_ns", "trace_id", "span_id", "attributes": {…}}    as soon as it happens
    {"type": "span", "name", "trace_id", "span_id", "parent_id", "start_ns", "end_ns", "status", "attributes": {…}}

A span is written when it ends; its `span_start` event, which holds its parent's id, when it begins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor, ReadWriteLogRecord
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from finetuning.telemetry.error_guard import Faults

# Made once: json.dumps makes one for each line.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)


class JsonLines:
    """An append-only file that swallows nothing and raises nothing: a failed write is a fault, and the last one.

    Raises:
        OSError: it cannot be opened, or its first line cannot be written.
    """

    def __init__(self, path: Path, faults: Faults, resource: Mapping[str, Any], time_ns: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._faults = faults
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._append({"type": "resource", "time_ns": time_ns, "attributes": dict(resource)})
        except OSError:
            self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        if self._descriptor < 0:
            return
        try:
            self._append(record)
        except OSError as error:
            self.close()
            self._faults.note(f"writing {self.path}", error)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            text = _ENCODER.encode(record)
        except ValueError:
            text = _ENCODER.encode(_finite(record))
        line = text.encode("utf-8", "replace") + b"\n"
        if os.write(self._descriptor, line) < len(line):
            raise OSError(f"no room left for a line of {len(line)} bytes")


def _finite(value: Any) -> Any:
    """The value with words for numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class SpanLines(SpanProcessor):
    """Writes each span as it ends."""

    def __init__(self, lines: JsonLines):
        self._lines = lines

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        """Nothing: the recorder tells it as an event."""

    def on_end(self, span: ReadableSpan) -> None:
        self._lines.write(
            {
                "type": "span",
                "name": span.name,
                "trace_id": f"{span.context.trace_id:032x}",
                "span_id": f"{span.context.span_id:016x}",
                "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
                "start_ns": span.start_time,
                "end_ns": span.end_time,
                "status": span.status.status_code.name,
                **({"status_description": span.status.description} if span.status.description else {}),
                "attributes": dict(span.attributes or {}),
            }
        )

    def shutdown(self) -> None:
        self._lines.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class EventLines(LogRecordProcessor):
    """Writes each event as it happens."""

    def __init__(self, lines: JsonLines):
        self._lines = lines

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        record = log_record.log_record
        self._lines.write(
            {
                "type": "event",
                "name": record.event_name,
                "time_ns": record.timestamp,
                "trace_id": f"{record.trace_id or 0:032x}",
                "span_id": f"{record.span_id or 0:016x}",
                "attributes": dict(record.attributes or {}),
            }
        )

    def shutdown(self) -> None:
        """Nothing: the spans close the file."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True
