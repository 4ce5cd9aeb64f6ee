"""JSON lines on disk: one file per process and job, a record a write, so that a killed process loses none.

    {"type": "resource", "time_ns", "attributes": {…}}                                the first line: who writes
    {"type": "event", "name", "time_ns", "trace_id", "span_id", "attributes": {…}}    as soon as it happens
    {"type": "span", "name", "trace_id", "span_id", "parent_id", "start_ns", "end_ns", "status", "attributes": {…}}

A span is written when it ends; its `span_start` event, which holds its parent's id, when it begins.

OTLP over HTTP, in the background, with short patience: a collector that does not answer costs a run nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor, ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from finetuning.errors import Location, MissingPackageError
from finetuning.telemetry.error_guard import TelemetryErrors

# Made once: json.dumps makes one for each line.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)


class JsonLines:
    """An append-only file that swallows nothing and raises nothing: a failed write is a fault, and the last one.

    Raises:
        OSError: it cannot be opened, or its first line cannot be written.
    """

    def __init__(self, path: Path, faults: TelemetryErrors, resource: Mapping[str, Any], time_ns: int):
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


_EVERY_MS = 1000
_QUEUE = 8192


class _Told(SpanExporter, LogRecordExporter):
    """An exporter whose failures become one fault; after three in a row it is asked no more."""

    def __init__(self, exporter: Any, success: Any, failure: Any, what: str, faults: TelemetryErrors):
        self._exporter = exporter
        self._success = success
        self._failure = failure
        self._what = what
        self._faults = faults
        self._failures = 0

    def export(self, batch: Sequence[ReadableSpan] | Sequence[ReadableLogRecord]) -> Any:
        if self._failures >= 3:
            return self._failure
        try:
            result = self._exporter.export(batch)
            why = "the collector does not take it"
        except Exception as error:  # noqa: BLE001  the SDK would log a traceback for each batch
            result, why = self._failure, f"{type(error).__name__}: {error}"
        if result == self._success:
            self._failures = 0
            return result
        self._failures += 1
        self._faults.note(f"sending {self._what} by OTLP", why)
        return self._failure

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class OtlpLink:
    """The two processors that send to one collector.

    Raises:
        MissingPackageError: the exporter's package is not installed.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str], timeout_s: float, faults: TelemetryErrors):
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise MissingPackageError(
                f"telemetry.otlp needs {error.name}",
                place=Location(key="telemetry.otlp"),
                hint="Install it with: pip install 'finetuning[otlp]'",
            ) from error
        # The exporter warns at each of its tries; the fault is told once instead.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL + 1)
        base = endpoint.rstrip("/")
        spans = OTLPSpanExporter(f"{base}/v1/traces", headers=dict(headers), timeout=timeout_s)
        events = OTLPLogExporter(f"{base}/v1/logs", headers=dict(headers), timeout=timeout_s)
        self._timeout_s = timeout_s
        told_spans = _Told(spans, SpanExportResult.SUCCESS, SpanExportResult.FAILURE, "spans", faults)
        told_events = _Told(events, LogRecordExportResult.SUCCESS, LogRecordExportResult.FAILURE, "events", faults)
        self.spans: SpanProcessor = BatchSpanProcessor(told_spans, _QUEUE, _EVERY_MS)
        self.events: LogRecordProcessor = BatchLogRecordProcessor(
            told_events, schedule_delay_millis=_EVERY_MS, max_queue_size=_QUEUE
        )

    def close(self) -> bool:
        """Sends what is left, and says whether that was done in time."""
        return _all_within(self._timeout_s + 0.5, [self.spans.shutdown, self.events.shutdown])


def _all_within(seconds: float, calls: Sequence[Callable[[], Any]]) -> bool:
    """Makes the calls side by side; whether all came back in time. Those that did not are left to their fate."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in threads)
