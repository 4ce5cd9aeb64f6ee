"""OTLP over HTTP, in the background, with short patience: a collector that does not answer costs a run nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor, ReadableLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from finetuning.errors import MissingPackageError, Place
from finetuning.telemetry.error_guard import Faults

_EVERY_MS = 1000
_QUEUE = 8192


class _Told(SpanExporter, LogRecordExporter):
    """An exporter whose failures become one fault; after three in a row it is asked no more."""

    def __init__(self, exporter: Any, success: Any, failure: Any, what: str, faults: Faults):
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

    def __init__(self, endpoint: str, headers: Mapping[str, str], timeout_s: float, faults: Faults):
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise MissingPackageError(
                f"telemetry.otlp needs {error.name}",
                place=Place(key="telemetry.otlp"),
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
