"""Where spans and events go: JSON lines on disk, and an OTLP collector.

There is one file per process and job. Each record is written at once, so that a killed process loses none:

    {"type": "resource", "time_ns", "attributes": {…}}                                the first line: who writes
    {"type": "event", "name", "time_ns", "trace_id", "span_id", "attributes": {…}}    as it happens
    {"type": "span", "name", "trace_id", "span_id", "parent_id", "start_ns", "end_ns", "status", "attributes": {…}}

A span is written when it ends. Its `span_start` event, which has its parent's id, is written when it begins.

OTLP over HTTP runs in the background with short timeouts: a collector that does not respond does not delay training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opentelemetry.sdk._logs import LogRecordProcessor, ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from finetuning.errors import Location, MissingPackageError
from finetuning.telemetry.error_guard import TelemetryErrors

if TYPE_CHECKING:
    from opentelemetry.context import Context

_BATCH_INTERVAL_MS = 1000
_QUEUE_SIZE = 8192
_MAX_FAILURES = 3
# json.dumps would create an encoder for each line, because these are not its defaults.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)


class JsonlWriter:
    """An append-only file of JSON lines. The first write that fails is recorded as an error and closes the file.

    Raises:
        OSError: the file cannot be opened, or its first line cannot be written.
    """

    def __init__(self, path: Path, errors: TelemetryErrors, resource: Mapping[str, Any], time_ns: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._errors = errors
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._append({"type": "resource", "time_ns": time_ns, "attributes": dict(resource)})
        except OSError:
            self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        if self._descriptor < 0:
            return
        try:
            self._append(record)
        except OSError as error:
            self.close()
            self._errors.record(f"writing {self.path}", error)

    def close(self) -> None:
        """Close the file; later writes are ignored."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            text = _ENCODER.encode(record)
        except ValueError:  # NaN or infinity
            text = _ENCODER.encode(_replace_non_finite(record))
        line = text.encode("utf-8", "replace") + b"\n"
        # One unbuffered write per line: lines of several writers do not mix, and none is lost with the process.
        if os.write(self._descriptor, line) < len(line):
            raise OSError(f"no space left on device for a line of {len(line)} bytes")


def _replace_non_finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    return [_replace_non_finite(item) for item in value] if isinstance(value, list | tuple) else value


class JsonlSpanProcessor(SpanProcessor):
    """Writes each span when it ends."""

    def __init__(self, writer: JsonlWriter):
        self._writer = writer

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Do nothing: the recorder writes a `span_start` event."""

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        assert context is not None
        self._writer.write(
            {
                "type": "span",
                "name": span.name,
                "trace_id": f"{context.trace_id:032x}",
                "span_id": f"{context.span_id:016x}",
                "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
                "start_ns": span.start_time,
                "end_ns": span.end_time,
                "status": span.status.status_code.name,
                **({"status_description": span.status.description} if span.status.description else {}),
                "attributes": dict(span.attributes or {}),
            }
        )

    def shutdown(self) -> None:
        self._writer.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class JsonlEventProcessor(LogRecordProcessor):
    """Writes each event as it happens."""

    def __init__(self, writer: JsonlWriter):
        self._writer = writer

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        record = log_record.log_record
        self._writer.write(
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
        """Do nothing: `JsonlSpanProcessor` closes the file that both share."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Guard(Generic[_Item, _Result]):
    """Wraps an exporter: a failure is recorded as an error, and after three in a row it is not called again."""

    def __init__(self, exporter: Any, success: _Result, failure: _Result, content: str, errors: TelemetryErrors):
        self._exporter = exporter
        self._success = success
        self._failure = failure
        self._content = content
        self._errors = errors
        self._failures = 0

    def _export(self, batch: Sequence[_Item]) -> _Result:
        if self._failures >= _MAX_FAILURES:
            return self._failure
        try:
            result = self._exporter.export(batch)
            reason = "the collector rejected the data or did not respond"
        except Exception as error:  # noqa: BLE001  the SDK would log a traceback for each batch
            result, reason = self._failure, f"{type(error).__name__}: {error}"
        if result == self._success:
            self._failures = 0
            return result
        self._failures += 1
        self._errors.record(f"sending {self._content} by OTLP", reason)
        return self._failure

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _GuardedSpanExporter(_Guard[ReadableSpan, SpanExportResult], SpanExporter):
    """See `_Guard`."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._export(spans)


class _GuardedLogExporter(_Guard[ReadableLogRecord, LogRecordExportResult], LogRecordExporter):
    """See `_Guard`."""

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        return self._export(batch)


class OtlpExport:
    """The span and event processors that send to one OTLP collector.

    Raises:
        MissingPackageError: the exporter's package is not installed.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str], timeout_s: float, errors: TelemetryErrors):
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise MissingPackageError(
                f"telemetry.otlp needs {error.name}",
                location=Location(key="telemetry.otlp"),
                hint="Install it with: pip install 'finetuning[otlp]'",
            ) from error
        # The exporter logs a warning for each retry; `_Guard` reports the failure once instead.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL + 1)
        base = endpoint.rstrip("/")
        span_exporter = OTLPSpanExporter(f"{base}/v1/traces", headers=dict(headers), timeout=timeout_s)
        event_exporter = OTLPLogExporter(f"{base}/v1/logs", headers=dict(headers), timeout=timeout_s)
        self._timeout_s = timeout_s
        self.spans: SpanProcessor = BatchSpanProcessor(
            _GuardedSpanExporter(span_exporter, SpanExportResult.SUCCESS, SpanExportResult.FAILURE, "spans", errors),
            _QUEUE_SIZE,
            _BATCH_INTERVAL_MS,
        )
        self.events: LogRecordProcessor = BatchLogRecordProcessor(
            _GuardedLogExporter(
                event_exporter, LogRecordExportResult.SUCCESS, LogRecordExportResult.FAILURE, "events", errors
            ),
            schedule_delay_millis=_BATCH_INTERVAL_MS,
            max_queue_size=_QUEUE_SIZE,
        )

    def close(self) -> bool:
        """Send what is queued. Return whether that was done in time."""
        return _run_within(self._timeout_s + 0.5, [self.spans.shutdown, self.events.shutdown])


def _run_within(seconds: float, functions: Sequence[Callable[[], object]]) -> bool:
    """Run the functions in parallel. Return whether all ended in time; the others go on in daemon threads."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in threads)
