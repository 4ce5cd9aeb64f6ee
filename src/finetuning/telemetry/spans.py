"""Spans and events on the OpenTelemetry SDK.

The tracer and logger providers are private: the global ones, which MLflow's tracing uses, are not touched.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from finetuning.config.redaction import redact_text
from finetuning.telemetry import names
from finetuning.telemetry.config import Attributes, attribute_values
from finetuning.telemetry.error_guard import TelemetryErrors, TelemetryUsageError, guarded
from finetuning.telemetry.metrics import IterationMeter

_SCOPE = "finetuning.telemetry"
_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_MAX_TRACEBACK = 16_000
_RECORDED_BY = "_recorded_by_telemetry"
"""Key in the `__dict__` of an exception: the ids of the recorders that have recorded it."""

SpanFilter = Callable[[str], bool]
"""Returns whether spans of this name are exported."""


SpanListener = Callable[["OpenSpan", BaseException | str | None], None]
"""Called with each span when it begins and when it ends, and with the error that it ends with."""


def export_all() -> SpanFilter:
    """Return a filter that exports every span."""
    return lambda name: True


def export_only(span_names: Iterable[str]) -> SpanFilter:
    """Return a filter that exports the spans of these names, and the application span, which is their root.

    Raises:
        TelemetryUsageError: a name differs from that of a standard span by a typing error.
    """
    included = _span_names(span_names) | {names.APPLICATION}
    return lambda name: name in included


def export_all_but(span_names: Iterable[str] = names.SHORT_SPANS) -> SpanFilter:
    """Return a filter that exports all spans except those of these names.

    Raises:
        TelemetryUsageError: a name differs from that of a standard span by a typing error.
    """
    excluded = _span_names(span_names) - {names.APPLICATION}
    return lambda name: name not in excluded


def _span_names(span_names: Iterable[str]) -> frozenset[str]:
    """Return the names as they are recorded. Spans of the user's own may have any name."""
    if isinstance(span_names, str):
        raise TelemetryUsageError(f"span names are a list, not the text {span_names!r}")
    plain = {str(getattr(name, "value", name)) for name in span_names}
    recorded = {name.lower() if name.lower() in names.STANDARD_SPANS else name for name in plain}
    for name in recorded - names.STANDARD_SPANS:
        likely = difflib.get_close_matches(name.lower(), names.STANDARD_SPANS, 1, cutoff=0.85)
        # `model_forward_2` is a span of the user's own.
        if likely and likely[0] not in name.lower():
            raise TelemetryUsageError(f"there is no span {name!r}: did you mean {likely[0]!r}?")
    return frozenset(recorded)


def preset_filter(preset: str, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> SpanFilter:
    """Return the filter for `telemetry.spans`, `include_spans` and `exclude_spans`."""
    include = frozenset(include)
    if preset == "none":
        return export_only(include - frozenset(exclude))
    preset_excludes = {"default": names.SHORT_SPANS, "per_step": names.ITERATION_PHASES, "all": frozenset[str]()}
    return export_all_but((preset_excludes[preset] - include) | frozenset(exclude))


class Clock:
    """Nanoseconds since 1970: the wall clock, read once, advanced by the monotonic counter."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, counter_ns: Callable[[], int] = time.perf_counter_ns):
        self._counter_ns = counter_ns
        self._offset = wall_ns() - counter_ns()

    def now_ns(self) -> int:
        return self._offset + self._counter_ns()


class SystemIdGenerator(IdGenerator):
    """Draws ids from the operating system.

    The SDK's generator draws from `random`: after `set_seed` every run would get the same ids, and training would get
    different random numbers than without telemetry.
    """

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8), "big") or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(os.urandom(16), "big") or 1


class OpenSpan:
    """A span that has started. One that the filter excludes is timed but not exported."""

    __slots__ = ("_otel_span", "context", "end_ns", "ended", "name", "parent", "start_ns")

    def __init__(
        self, name: str, start_ns: int, parent: OpenSpan | None, otel_span: trace.Span | None, context: Context
    ):
        self.name = name
        self.start_ns = start_ns
        self.end_ns = start_ns
        self.parent = parent
        self.ended = False
        self.context = context
        self._otel_span = otel_span

    @property
    def is_exported(self) -> bool:
        """Whether the span is exported when it ends."""
        return self._otel_span is not None

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute, which is exported when the span ends. None is ignored."""
        if self._otel_span is not None:
            for name, redacted in attribute_values({key: value}).items():
                self._otel_span.set_attribute(name, redacted)

    def set_attributes(self, values: Attributes) -> None:
        """Set several attributes."""
        for key, value in values.items():
            self.set_attribute(key, value)

    def finish(self, status: Status, end_ns: int) -> None:
        """End the SDK's span. Only the recorder calls this."""
        self.ended, self.end_ns = True, end_ns
        if self._otel_span is not None:
            self._otel_span.set_status(status)
            self._otel_span.end(end_ns)

    @property
    def span_context(self) -> SpanContext:
        """Trace and span id of this span, or of its nearest exported ancestor."""
        return trace.get_current_span(self.context).get_span_context()


class SpanRecorder:
    """Starts and ends spans and emits events, for a list of processors.

    The parent of a span is the open one of the same context (thread, task), or else the outermost one. A span that the
    filter excludes is not created in the SDK; its children have its nearest exported ancestor as their parent.
    """

    def __init__(
        self,
        resource: Attributes,
        processors: Sequence[tuple[SpanProcessor, LogRecordProcessor | None]],
        span_filter: SpanFilter,
        clock: Clock,
        traceparent: str | None = None,
    ):
        otel_resource = Resource(dict(resource))
        self.clock = clock
        self._span_filter = span_filter
        # OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT and the like are for other tools in this process.
        limits = SpanLimits(max_attributes=SpanLimits.UNSET, max_span_attributes=SpanLimits.UNSET)
        self._tracer_provider = TracerProvider(
            resource=otel_resource, id_generator=SystemIdGenerator(), shutdown_on_exit=False, span_limits=limits
        )
        self._logger_provider = LoggerProvider(resource=otel_resource, shutdown_on_exit=False)
        for span_processor, event_processor in processors:
            self._tracer_provider.add_span_processor(span_processor)
            if event_processor is not None:
                self._logger_provider.add_log_record_processor(event_processor)
        self._has_processors = bool(processors)
        self._tracer = self._tracer_provider.get_tracer(_SCOPE)
        self._logger = self._logger_provider.get_logger(_SCOPE)
        self._root_context = _parse_traceparent(traceparent)
        self._current: ContextVar[OpenSpan | None] = ContextVar("current_span", default=None)
        self._open: list[OpenSpan] = []
        self._id = secrets.token_hex(8)
        self.on_span: SpanListener = lambda span, error: None

    def exports(self, name: str) -> bool:
        """Return whether spans of this name are exported."""
        return self._has_processors and self._span_filter(name)

    @property
    def current(self) -> OpenSpan | None:
        """The innermost open span of this context, or else the outermost open span."""
        span = self._current.get()
        if span is not None and not span.ended:
            return span
        return self._open[0] if self._open else None

    @property
    def open_spans(self) -> list[OpenSpan]:
        """The spans that have not ended, outermost first."""
        return list(self._open)

    def start(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        parent: OpenSpan | None = None,
        at_ns: int = 0,
        event_attributes: Attributes | None = None,
    ) -> OpenSpan:
        """Start a span, now or at a time in ns since 1970, and emit its `span_start` event."""
        start_ns = at_ns or self.clock.now_ns()
        parent = parent or self.current
        context = parent.context if parent else self._root_context
        if not self.exports(name):
            return self._open_span(OpenSpan(name, start_ns, parent, None, context))
        parent_id = trace.get_current_span(context).get_span_context().span_id
        otel_span = self._tracer.start_span(
            name, context, SpanKind.INTERNAL, attribute_values(attributes), start_time=start_ns, record_exception=False
        )
        context = trace.set_span_in_context(otel_span, context)
        span = self._open_span(OpenSpan(name, start_ns, parent, otel_span, context))
        event = {"span_name": name, "parent_span_id": f"{parent_id:016x}" if parent_id else ""}
        self._emit(names.SPAN_START, event | attribute_values(event_attributes), span, start_ns, SeverityNumber.INFO)
        return span

    def _open_span(self, span: OpenSpan) -> OpenSpan:
        self._open.append(span)
        self._current.set(span)
        self.on_span(span, None)
        return span

    def end(
        self,
        span: OpenSpan,
        *,
        error: BaseException | str | None = None,
        at_ns: int = 0,
        event_attributes: Attributes | None = None,
    ) -> None:
        """End a span, and first those inside it that are still open. An exception is recorded as an event once."""
        if span.ended:
            return
        for inner in [item for item in reversed(self._open) if item is not span and _is_inside(item, span)]:
            self.end(inner, error=error or "left open", at_ns=at_ns)
        if isinstance(error, BaseException):
            self.error(error, span)
        end_ns = max(at_ns or self.clock.now_ns(), span.start_ns)
        if span.is_exported:
            span.set_attribute("duration_msec", round((end_ns - span.start_ns) / 1e6, 3))
            event = {"span_name": span.name, **attribute_values(event_attributes)}
            self._emit(names.SPAN_STOP, event, span, end_ns, SeverityNumber.INFO)
        span.finish(_status(error), end_ns)
        self._open.remove(span)
        if self._current.get() is span:
            self._current.set(span.parent)
        self.on_span(span, error)

    def event(
        self,
        name: str,
        attributes: Attributes | None = None,
        span: OpenSpan | None = None,
        *,
        at_ns: int = 0,
        severity: SeverityNumber = SeverityNumber.INFO,
    ) -> None:
        """Emit an event of a span, by default of the current one. Attributes that are None are left out."""
        if self._has_processors:
            now = at_ns or self.clock.now_ns()
            self._emit(name, attribute_values(attributes), span or self.current, now, severity)

    def _emit(
        self, name: str, attributes: Attributes, span: OpenSpan | None, now_ns: int, severity: SeverityNumber
    ) -> None:
        self._logger.emit(
            timestamp=now_ns,
            observed_timestamp=now_ns,
            context=span.context if span else self._root_context,
            severity_number=severity,
            attributes={"timestamp_msec": now_ns // 1_000_000, **attributes},
            event_name=name,
        )

    def error(self, error: BaseException, span: OpenSpan | None = None) -> None:
        """Emit the `error` event of an exception, unless it has been emitted before."""
        # The mark is in the exception: `id` repeats, and a reference would keep the memory of its frames.
        recorded_by = error.__dict__.setdefault(_RECORDED_BY, [])
        if self._id in recorded_by:
            return
        recorded_by.append(self._id)
        message = redact_text(str(error))
        lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        attributes = {
            "error_message": message or type(error).__name__,
            "exception_type": type(error).__name__,
            "exception_message": message,
            "exception_traceback": redact_text(lines[-_MAX_TRACEBACK:]),
        }
        self.event(names.ERROR, attributes, span, severity=SeverityNumber.ERROR)

    def stop_exporting(self) -> None:
        """Export nothing more. Open spans are still timed."""
        self._has_processors = False

    def shut_down(self) -> None:
        """Shut the processors down."""
        self._tracer_provider.shutdown()
        self._logger_provider.shutdown()


class StandardSpans:
    """Starts and ends spans by One Logger's names. At most one span of a name is open at a time.

    The times of an iteration's phases are measured whether or not their spans are exported.
    """

    def __init__(self, recorder: SpanRecorder, errors: TelemetryErrors):
        self.recorder = recorder
        self.errors = errors
        self.meter = IterationMeter()
        self._started_ns: dict[str, int] = {}
        self._active: dict[str, OpenSpan] = {}
        self._exported = {name: recorder.exports(name) for name in names.STANDARD_SPANS}

    def active(self, name: str) -> OpenSpan | None:
        """Return the open span of a standard name."""
        span = self._active.get(name)
        return span if span is not None and not span.ended else None

    @guarded
    def begin(self, name: str, attributes: Attributes | None = None, *, at_ns: int = 0) -> OpenSpan:
        """Start the span of a standard name. One that is still open ends with an error.

        Raises:
            TelemetryUsageError: the name is not a standard one; spans of your own begin with `span`.
        """
        _check_name(name, names.STANDARD_SPANS, "standard span")
        stale = self.active(name)
        if stale is not None:
            self.recorder.end(stale, error="started again before it had ended")
        span = self._active[name] = self.recorder.start(name, attributes, at_ns=at_ns)
        return span

    @guarded
    def end(self, name: str, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """End the span of a standard name, if it is open."""
        span = self._active.pop(name, None)
        if span is not None:
            self.recorder.end(span, error=error, at_ns=at_ns)

    @guarded
    def begin_phase(self, name: str, attributes: Attributes | None = None, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin a phase of an iteration, such as `data_loading` or `model_forward`.

        Raises:
            TelemetryUsageError: there is no such phase.
        """
        _check_name(name, names.ITERATION_PHASES, "phase of an iteration")
        now = self._started_ns[name] = at_ns or self.recorder.clock.now_ns()
        return self.begin(name, attributes, at_ns=now) if self._exported[name] else None

    @guarded
    def end_phase(self, name: str, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """End a phase and add its time to the iteration."""
        started = self._started_ns.pop(name, None)
        if started is not None:
            now = at_ns or self.recorder.clock.now_ns()
            self.meter.add_phase(name, (now - started) / 1e9)
            if self._exported[name]:
                self.end(name, error, at_ns=now)
        if isinstance(error, BaseException):
            self.recorder.error(error)

    @guarded
    def event(
        self,
        name: str,
        attributes: Attributes | None = None,
        span: OpenSpan | None = None,
        *,
        at_ns: int = 0,
        severity: SeverityNumber = SeverityNumber.INFO,
    ) -> None:
        """Emit an event of your own."""
        self.recorder.event(name, attributes, span, at_ns=at_ns, severity=severity)

    @guarded
    def start_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        parent: OpenSpan | None = None,
        at_ns: int = 0,
        event_attributes: Attributes | None = None,
    ) -> OpenSpan:
        """Start a span of your own, or a standard one. `event_attributes` are added to its `span_start` event."""
        if stale := self.active(name):
            self.recorder.end(stale, error="started again before it had ended")
        span = self.recorder.start(name, attributes, parent=parent, at_ns=at_ns, event_attributes=event_attributes)
        if name in names.STANDARD_SPANS:
            self._active[name] = span
        return span

    @guarded
    def end_span(
        self,
        span: OpenSpan,
        error: BaseException | str | None = None,
        *,
        at_ns: int = 0,
        event_attributes: Attributes | None = None,
    ) -> None:
        """End a span. `event_attributes` are added to its `span_stop` event."""
        if span in self.recorder.open_spans:
            self.recorder.end(span, error=error, at_ns=at_ns, event_attributes=event_attributes)

    @contextmanager
    def standard_span(self, name: str, attributes: Attributes | None = None) -> Iterator[OpenSpan]:
        """Record the block as the span of a standard name."""
        span = self.begin(name, attributes) or unrecorded_span(name)
        try:
            yield span
        except BaseException as error:
            self.end(name, error)
            raise
        self.end(name)


def _check_name(name: str, supported: frozenset[str], kind: str) -> None:
    if name not in supported:
        likely = difflib.get_close_matches(name, supported, 1)
        hint = f"did you mean {likely[0]!r}?" if likely else f"there are {', '.join(sorted(supported))}"
        raise TelemetryUsageError(f"{name!r} is no {kind}: {hint}")


def unrecorded_span(name: str) -> OpenSpan:
    """Return a span that is not recorded, for code that sets attributes when telemetry has failed."""
    return OpenSpan(name, 0, None, None, Context())


def _status(error: BaseException | str | None) -> Status:
    if error is None:
        return Status(StatusCode.OK)
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Status(StatusCode.ERROR, redact_text(text))


def _is_inside(span: OpenSpan, ancestor: OpenSpan) -> bool:
    parent = span.parent
    while parent is not None and parent is not ancestor:
        parent = parent.parent
    return parent is ancestor


def _parse_traceparent(traceparent: str | None) -> Context:
    """Return the context that a W3C `traceparent` names; an empty one without it."""
    match = _TRACEPARENT.match(traceparent or "")
    if match is None:
        return Context()
    parent = SpanContext(int(match[1], 16), int(match[2], 16), is_remote=True, trace_flags=TraceFlags(1))
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())
