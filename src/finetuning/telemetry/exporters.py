"""Where spans and events go: JSON lines on disk, and an OTLP collector.

There is one file per process and job. Each record is written at once, so that a killed process loses none:

    {"type": "resource", "time_ns", "attributes": {…}, "progress"}                    a job's first line: who writes
    {"type": "event", "name", "time_ns", "trace_id", "span_id", "attributes": {…}}    as it happens
    {"type": "span", "name", "trace_id", "span_id", "parent_id", "start_ns", "end_ns", "status", "attributes": {…}}

A span is written when it ends. Its `span_start` event, which has its parent's id, is written when it begins.

OTLP over HTTP runs in the background with short timeouts: a collector that does not respond does not delay training.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from opentelemetry.sdk._logs import LogRecordProcessor, ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from finetuning.errors import Location, MissingPackageError
from finetuning.telemetry.config import Attributes
from finetuning.telemetry.error_guard import TelemetryErrors

if TYPE_CHECKING:
    from opentelemetry.context import Context

_BATCH_INTERVAL_MS = 1000
_QUEUE_SIZE = 8192
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_PAUSE_REPORTED_AFTER = 3
_MAX_REJECTIONS = 4
# json.dumps would create an encoder for each line, because these are not its defaults.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)


Record = dict[str, Any]
"""One line of a file."""


class RecordWriter(Protocol):
    """Where the processors of this module write the records of spans and events."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Write no more."""


class JsonlWriter(RecordWriter):
    """A file of JSON lines that one process appends to.

    If another process is writing to the file, or the process has forked, a number or the process id is added to the
    name. After a write that fails, lines are dropped and counted until writing works again.

    Raises:
        OSError: the file cannot be opened, or its first line cannot be written.
    """

    def __init__(
        self, path: Path, errors: TelemetryErrors, resource: Attributes, time_ns: int, *, retry_s: float = 10.0
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._errors = errors
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._is_torn = False
        self.lost = 0
        """Lines that could not be written."""
        self._first = {"type": "resource", "time_ns": time_ns, "attributes": dict(resource)}
        self._open(path)

    def _open(self, path: Path) -> None:
        self.path, self._descriptor = _open_unshared(path)
        self._pid = os.getpid()
        self.progress_path = _unused_path(self.path.with_suffix(".progress"))
        try:
            self._append({**self._first, "progress": self.progress_path.name})
        except OSError:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Append one line."""
        if self._descriptor < 0:
            return
        if self._retry_at and time.monotonic() < self._retry_at:
            self.lost += 1
            return
        try:
            if os.getpid() != self._pid:
                self._leave_to_parent()
            self._append(record)
        except OSError as error:
            self.lost += 1
            self._retry_at = time.monotonic() + self._retry_s
            self._errors.record(f"writing {self.path}", error)
            return
        if self._retry_at:
            self._retry_at = 0.0
            text = f"telemetry is written to {self.path} again; {self.lost} lines were lost"
            self._errors.report(f"wrote {self.path} again", text)

    def _leave_to_parent(self) -> None:
        """Continue in a file of this process's own: the parent of a fork goes on with the present one."""
        os.close(self._descriptor)
        self._open(self.path.with_name(f"{self.path.stem}.{os.getpid()}{self.path.suffix}"))

    def close(self) -> None:
        """Close the file; later writes are ignored."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _append(self, record: Record) -> None:
        try:
            text = _ENCODER.encode(record)
        except ValueError:  # NaN or infinity
            text = _ENCODER.encode(_replace_non_finite(record))
        line = (b"\n" if self._is_torn else b"") + text.encode("utf-8", "replace") + b"\n"
        # One unbuffered write per line: lines of several threads do not mix, and none is lost with the process.
        written = os.write(self._descriptor, line)
        self._is_torn = 0 < written < len(line) or (self._is_torn and written == 0)
        if written < len(line):
            raise OSError(f"no space left on device for a line of {len(line)} bytes")


def _unused_path(path: Path) -> Path:
    """Return the path, with a number at its end if an earlier job has a file there."""
    number = 1
    while (unused := path.with_name(path.name + (f".{number}" if number > 1 else ""))).exists():
        number += 1
    return unused


def _open_unshared(path: Path) -> tuple[Path, int]:
    """Open a file for appending that no other process has open in this way. Return its path and descriptor."""
    for number in range(1, 1000):
        free = path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")
        descriptor = os.open(free, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # the file system has no locks
            pass
        return free, descriptor
    raise OSError(f"{path} and 998 files like it are in use")


def _replace_non_finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    return [_replace_non_finite(item) for item in value] if isinstance(value, list | tuple) else value


class JsonlSpanProcessor(SpanProcessor):
    """Writes each span when it ends."""

    def __init__(self, writer: RecordWriter):
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

    def __init__(self, writer: RecordWriter):
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


@dataclass
class _Batch(Generic[_Item]):
    """Records that wait to be sent."""

    items: list[_Item]
    rejections: int = 0
    """How often it failed after others had succeeded."""
    successes_before: int = 0


class _RetryingExporter(Generic[_Item, _Result]):
    """Wraps an exporter: after a failure it is paused, for longer each time, and what it missed is sent afterwards.

    A pause doubles from `_FIRST_PAUSE_S` up to `_LONGEST_PAUSE_S`. At most `_QUEUE_SIZE` records wait; of more, the
    oldest are lost. A batch that is rejected `_MAX_REJECTIONS` times while others succeed is lost as well.
    """

    def __init__(
        self,
        exporter: Any,
        results: tuple[_Result, _Result],
        content: str,
        errors: TelemetryErrors,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._exporter = exporter
        self._success, self._failure = results
        self._content = content
        self._errors = errors
        self._clock = clock
        self._waiting: deque[_Batch[_Item]] = deque()
        self._failures = self._successes = self._in_flight = 0
        self._failed_since = self._retry_at = 0.0
        self.lost = 0
        """Records that will never be sent."""

    def _export(self, batch: Sequence[_Item]) -> _Result:
        self._waiting.append(_Batch(list(batch), successes_before=self._successes))
        if self._clock() >= self._retry_at:
            self._send_waiting()
        self._drop_oldest()
        # The SDK only counts failures, and these records may still be sent.
        return self._success

    def _send_waiting(self) -> None:
        while self._waiting:
            batch = self._waiting.popleft()
            self._in_flight = len(batch.items)
            reason = self._try(batch.items)
            self._in_flight = 0
            if reason is None:
                self._successes += 1
                self._recover()
                continue
            self._pause(reason)
            # A batch that the collector rejects must not hold up the others.
            batch.rejections += self._successes > batch.successes_before
            batch.successes_before = self._successes
            if batch.rejections < _MAX_REJECTIONS:
                self._waiting.append(batch)
            else:
                self.lost += len(batch.items)
            return

    def _try(self, batch: list[_Item]) -> str | None:
        """Send a batch. Return why it failed; None if it did not."""
        try:
            if self._exporter.export(batch) == self._success:
                return None
        except Exception as error:  # noqa: BLE001  the SDK would log a traceback for each batch
            return f"{type(error).__name__}: {error}"
        return "the collector rejected the data or did not respond"

    def _pause(self, reason: str) -> None:
        now = self._clock()
        if not self._failures:
            self._failed_since = now
        seconds = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S)
        self._failures += 1
        self._retry_at = now + seconds
        self._errors.record(f"sending {self._content} by OTLP", reason, kind="OTLP failed")
        if self._failures == _PAUSE_REPORTED_AFTER:
            text = f"sending telemetry by OTLP is paused; it is tried again every {_LONGEST_PAUSE_S:g} s at most"
            self._errors.report("OTLP paused", text)

    def _recover(self) -> None:
        if self._failures:
            seconds = self._clock() - self._failed_since
            self._failures, self._retry_at = 0, 0.0
            self._errors.report("OTLP works again", f"sending telemetry by OTLP works again after {seconds:.1f} s")

    def _drop_oldest(self) -> None:
        while sum(len(batch.items) for batch in self._waiting) > _QUEUE_SIZE:
            self.lost += len(self._waiting.popleft().items)

    def shutdown(self) -> None:
        """Try once more to send what waits, and close the exporter."""
        self._send_waiting()
        self.count_waiting_as_lost()
        self._exporter.shutdown()

    def count_waiting_as_lost(self) -> None:
        """Give up on what waits, and on what is being sent."""
        self.lost += self._in_flight
        while self._waiting:
            self.lost += len(self._waiting.popleft().items)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class RetryingSpanExporter(_RetryingExporter[ReadableSpan, SpanExportResult], SpanExporter):
    """See `_RetryingExporter`."""

    def __init__(self, exporter: SpanExporter, errors: TelemetryErrors, clock: Callable[[], float] = time.monotonic):
        super().__init__(exporter, (SpanExportResult.SUCCESS, SpanExportResult.FAILURE), "spans", errors, clock)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._export(spans)


class RetryingEventExporter(_RetryingExporter[ReadableLogRecord, LogRecordExportResult], LogRecordExporter):
    """See `_RetryingExporter`."""

    def __init__(
        self, exporter: LogRecordExporter, errors: TelemetryErrors, clock: Callable[[], float] = time.monotonic
    ):
        results = (LogRecordExportResult.SUCCESS, LogRecordExportResult.FAILURE)
        super().__init__(exporter, results, "events", errors, clock)

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        return self._export(batch)


class BackgroundExport:
    """The span and event processors that send by exporters of the OpenTelemetry SDK, in the background.

    Args:
        events: None to send no events.
        timeout_s: how long closing waits for what is queued, in seconds.
    """

    def __init__(
        self, spans: SpanExporter, events: LogRecordExporter | None, timeout_s: float, errors: TelemetryErrors
    ):
        self._timeout_s = timeout_s
        self._errors = errors
        span_exporter = RetryingSpanExporter(spans, errors)
        self._exporters: list[RetryingSpanExporter | RetryingEventExporter] = [span_exporter]
        self.spans: SpanProcessor = BatchSpanProcessor(span_exporter, _QUEUE_SIZE, _BATCH_INTERVAL_MS)
        self.events: LogRecordProcessor | None = None
        if events is not None:
            event_exporter = RetryingEventExporter(events, errors)
            self._exporters.append(event_exporter)
            self.events = BatchLogRecordProcessor(
                event_exporter, schedule_delay_millis=_BATCH_INTERVAL_MS, max_queue_size=_QUEUE_SIZE
            )

    def close(self) -> bool:
        """Send what is queued, in at most the timeout and half a second. Return whether that was done in time."""
        processors = [self.spans, *([self.events] if self.events else [])]
        in_time = _run_within(self._timeout_s + 0.5, [processor.shutdown for processor in processors])
        if not in_time:
            for exporter in self._exporters:
                exporter.count_waiting_as_lost()
        if lost := sum(exporter.lost for exporter in self._exporters):
            self._errors.report("OTLP lost", f"sending telemetry by OTLP: {lost} spans and events were lost")
        return in_time


def require_otlp() -> None:
    """Raise MissingPackageError unless the exporter's package is installed."""
    try:
        importlib.import_module("opentelemetry.exporter.otlp.proto.http._log_exporter")
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise MissingPackageError(
            f"telemetry.otlp needs {error.name}",
            location=Location(key="telemetry.otlp"),
            hint="Install it with: pip install 'finetuning[otlp]'",
        ) from error


class OtlpExport(BackgroundExport):
    """Sends to an OTLP collector over HTTP.

    Raises:
        MissingPackageError: the exporter's package is not installed.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str], timeout_s: float, errors: TelemetryErrors):
        require_otlp()
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        # The exporter logs a warning for each retry; the failure is reported once instead.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL + 1)
        base = endpoint.rstrip("/")
        super().__init__(
            OTLPSpanExporter(f"{base}/v1/traces", headers=dict(headers), timeout=timeout_s),
            OTLPLogExporter(f"{base}/v1/logs", headers=dict(headers), timeout=timeout_s),
            timeout_s,
            errors,
        )


def _run_within(seconds: float, functions: Sequence[Callable[[], object]]) -> bool:
    """Run the functions in parallel. Return whether all ended in time; the others go on in daemon threads."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    return not any(thread.is_alive() for thread in threads)
