"""Spans and events on the OpenTelemetry SDK, with providers of its own: MLflow's tracing lives beside it untouched."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from finetuning.config.redaction import without_user_info
from finetuning.telemetry import names
from finetuning.telemetry.error_guard import Clock, SystemIds

_SCOPE = "finetuning.telemetry"
_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_LONGEST_TRACEBACK = 16_000


class OpenSpan:
    """A span that has begun. `is_written` is false where the filter leaves it out; it is then timed all the same."""

    __slots__ = ("_otel", "context", "ended", "name", "parent", "start_ns")

    def __init__(self, name: str, start_ns: int, parent: OpenSpan | None, otel: Any, context: Context):
        self.name = name
        self.start_ns = start_ns
        self.parent = parent
        self.ended = False
        self.context = context
        self._otel = otel

    @property
    def is_written(self) -> bool:
        return self._otel is not None

    def set_attribute(self, key: str, value: Any) -> None:
        """Adds to the span; it is written when the span ends."""
        if self._otel is not None and value is not None:
            self._otel.set_attribute(key, value)

    def set_attributes(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self.set_attribute(key, value)

    def finish(self, status: Status, end_ns: int) -> None:
        """Ends the SDK's span; for the recorder."""
        self.ended = True
        if self._otel is not None:
            self._otel.set_status(status)
            self._otel.end(end_ns)

    @property
    def ids(self) -> SpanContext:
        """The ids of this span, or of the one above it that is written."""
        return trace.get_current_span(self.context).get_span_context()


class SpanRecorder:
    """Opens and closes spans and tells events, to the processors that it is given.

    A span's parent is the one that is open in the same context (thread, task), or else the outermost one. A span that
    the filter leaves out costs two attribute writes; its children hang on the span above it.
    """

    def __init__(
        self,
        resource: Mapping[str, Any],
        processors: Sequence[tuple[SpanProcessor, LogRecordProcessor]],
        exports: names.SpanFilter,
        clock: Clock,
        traceparent: str | None = None,
    ):
        described = Resource(dict(resource))
        self.clock = clock
        self._exports = exports
        # Other tools' environment variables must not cut what is told here.
        limits = SpanLimits(max_attributes=SpanLimits.UNSET, max_span_attributes=SpanLimits.UNSET)
        self._tracers = TracerProvider(
            resource=described, id_generator=SystemIds(), shutdown_on_exit=False, span_limits=limits
        )
        self._loggers = LoggerProvider(resource=described, shutdown_on_exit=False)
        for spans, events in processors:
            self._tracers.add_span_processor(spans)
            self._loggers.add_log_record_processor(events)
        self._is_heard = bool(processors)
        self._tracer = self._tracers.get_tracer(_SCOPE)
        self._logger = self._loggers.get_logger(_SCOPE)
        self._root_context = _context_of(traceparent)
        self._current: ContextVar[OpenSpan | None] = ContextVar("current_span", default=None)
        self._open: list[OpenSpan] = []
        self._told_error: int | None = None

    def exports(self, name: str) -> bool:
        """Whether spans of this name are written."""
        return self._is_heard and self._exports(name)

    @property
    def current(self) -> OpenSpan | None:
        span = self._current.get()
        if span is not None and not span.ended:
            return span
        return self._open[0] if self._open else None

    @property
    def open_spans(self) -> list[OpenSpan]:
        """The spans that have not ended, the outermost first."""
        return list(self._open)

    def start(
        self, name: str, attributes: Mapping[str, Any] | None = None, *, parent: OpenSpan | None = None, at_ns: int = 0
    ) -> OpenSpan:
        """A new span, told at once by its `span_start` event."""
        start_ns = at_ns or self.clock.now_ns()
        above = parent or self.current
        context = above.context if above else self._root_context
        otel = None
        if self.exports(name):
            above_id = trace.get_current_span(context).get_span_context().span_id
            otel = self._tracer.start_span(
                name, context, SpanKind.INTERNAL, _plain(attributes), start_time=start_ns, record_exception=False
            )
            context = trace.set_span_in_context(otel, context)
        span = OpenSpan(name, start_ns, above, otel, context)
        self._open.append(span)
        self._current.set(span)
        if otel is not None:
            parent_id = f"{above_id:016x}" if above_id else ""
            self.event(names.SPAN_START, {"span_name": name, "parent_span_id": parent_id}, span, at_ns=start_ns)
        return span

    def end(self, span: OpenSpan, *, error: BaseException | str | None = None, at_ns: int = 0) -> None:
        """Ends the span and, first, those that were left open inside it. An exception is told once, where it arose."""
        if span.ended:
            return
        for inner in [other for other in reversed(self._open) if other is not span and _is_inside(other, span)]:
            self.end(inner, error=error or "left open", at_ns=at_ns)
        if isinstance(error, BaseException):
            self.error(error, span)
        end_ns = max(at_ns or self.clock.now_ns(), span.start_ns)
        if span.is_written:
            span.set_attribute("duration_msec", round((end_ns - span.start_ns) / 1e6, 3))
            self.event(names.SPAN_STOP, {"span_name": span.name}, span, at_ns=end_ns)
        span.finish(_status(error), end_ns)
        self._open.remove(span)
        if self._current.get() is span:
            self._current.set(span.parent)

    def event(
        self,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        span: OpenSpan | None = None,
        *,
        at_ns: int = 0,
        severity: SeverityNumber = SeverityNumber.INFO,
    ) -> None:
        """One event of a span, by default of the current one. Values of None are left out."""
        if not self._is_heard:
            return
        above = span or self.current
        now = at_ns or self.clock.now_ns()
        told = {"timestamp_msec": now // 1_000_000, **(_plain(attributes) or {})}
        self._logger.emit(
            timestamp=now,
            observed_timestamp=now,
            context=above.context if above else self._root_context,
            severity_number=severity,
            attributes=told,
            event_name=name,
        )

    def error(self, error: BaseException, span: OpenSpan | None = None) -> None:
        """The `error` event of an exception; a second call with the same one tells nothing."""
        if self._told_error == id(error):
            return
        self._told_error = id(error)
        text = without_user_info(str(error))
        lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        attributes = {
            "error_message": text or type(error).__name__,
            "exception_type": type(error).__name__,
            "exception_message": text,
            "exception_traceback": without_user_info(lines[-_LONGEST_TRACEBACK:]),
        }
        self.event(names.ERROR, attributes, span, severity=SeverityNumber.ERROR)

    def shut_down(self) -> None:
        """Ends the processors."""
        self._tracers.shutdown()
        self._loggers.shutdown()


def _status(error: BaseException | str | None) -> Status:
    if error is None:
        return Status(StatusCode.OK)
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Status(StatusCode.ERROR, without_user_info(text))


def _is_inside(span: OpenSpan, other: OpenSpan) -> bool:
    above = span.parent
    while above is not None and above is not other:
        above = above.parent
    return above is other


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {key: value for key, value in attributes.items() if value is not None} if attributes else None


def _context_of(traceparent: str | None) -> Context:
    """The context that a W3C `traceparent` names; an empty one without."""
    match = _TRACEPARENT.match(traceparent or "")
    if match is None:
        return Context()
    above = SpanContext(int(match[1], 16), int(match[2], 16), is_remote=True, trace_flags=TraceFlags(1))
    return trace.set_span_in_context(trace.NonRecordingSpan(above), Context())
