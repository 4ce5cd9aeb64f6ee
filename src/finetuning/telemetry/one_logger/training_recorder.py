"""The recorder and the spans of One Logger's API, on top of `Telemetry`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import overload

from opentelemetry._logs import SeverityNumber

from finetuning.telemetry import names
from finetuning.telemetry.one_logger.values import (
    Attribute,
    Attributes,
    OneLoggerError,
    TelemetryEvent,
    TracingTimestamp,
    values_of,
)
from finetuning.telemetry.spans import OpenSpan, unrecorded_span
from finetuning.telemetry.telemetry import Telemetry

_EVALUATION_LOOPS = {
    names.VALIDATION_SINGLE_ITERATION: names.VALIDATION_LOOP,
    names.TESTING_SINGLE_ITERATION: names.TESTING_LOOP,
}


def plain_name(name: object) -> str:
    """Return the name of a span or an event as text."""
    return str(getattr(name, "value", name))


class TelemetrySpan:
    """A span that has started. Unlike One Logger's, it does not keep its events."""

    def __init__(self, open_span: OpenSpan, attributes: Mapping[str, object] | None = None) -> None:
        self.open_span = open_span
        self.attributes = Attributes(values_of(attributes))
        self.error: str | None = None
        """What `TrainingRecorder.error` reported of it."""

    @property
    def name(self) -> str:
        return self.open_span.name

    @property
    def name_str(self) -> str:
        return self.open_span.name

    @property
    def id(self) -> str:
        """The id of the span in the trace, in hexadecimal."""
        return f"{self.open_span.span_context.span_id:016x}"

    @property
    def parent_span(self) -> TelemetrySpan | None:
        return TelemetrySpan(self.open_span.parent) if self.open_span.parent else None

    @property
    def active(self) -> bool:
        """Whether the span has not ended."""
        return not self.open_span.ended

    def add_attribute(self, name: str, value: object) -> Attribute:
        """Add an attribute, which is exported when the span ends."""
        self.open_span.set_attribute(plain_name(name), value)
        return self.attributes.add_attribute(Attribute(plain_name(name), value))

    def add_attributes(self, attributes: Attributes) -> None:
        """Add several attributes."""
        for name, value in values_of(attributes).items():
            self.add_attribute(name, value)

    def add_event(self, event: TelemetryEvent) -> TelemetryEvent:
        """Refuse: events are recorded by `TrainingRecorder.event`."""
        raise OneLoggerError("use recorder.event(span, event): a span does not keep its events")

    def duration_msec(self) -> int:
        """Return the duration of a span that has ended, in milliseconds.

        Raises:
            OneLoggerError: it has not ended.
        """
        if not self.open_span.ended:
            raise OneLoggerError(f"span {self.name} has not ended")
        return (self.open_span.end_ns - self.open_span.start_ns) // 1_000_000

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TelemetrySpan) and self.open_span is other.open_span

    def __hash__(self) -> int:
        return id(self.open_span)


class TrainingRecorder:
    """Starts and ends spans, and records events and errors."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry

    def start(
        self,
        span_name: str | Enum,
        span_attributes: Attributes | None = None,
        start_event_attributes: Attributes | None = None,
        start_time: TracingTimestamp | None = None,
        parent_span: TelemetrySpan | None = None,
    ) -> TelemetrySpan:
        """Start a span. Its parent is by default the one that is open in this thread or task.

        The time of a standard span of an iteration is added to the metrics.
        """
        name, values, at_ns = plain_name(span_name), values_of(span_attributes), start_time.ns if start_time else 0
        name = name.lower() if name.lower() in names.STANDARD_SPANS else name
        telemetry = self.telemetry
        if name in names.ITERATION_PHASES:
            span = telemetry.begin_phase(name, values, at_ns=at_ns)
        elif name == names.TRAINING_SINGLE_ITERATION:
            span = telemetry.on_training_single_iteration_start(at_ns=at_ns)
        elif name in _EVALUATION_LOOPS:
            span = telemetry.on_validation_single_iteration_start(_EVALUATION_LOOPS[name], at_ns=at_ns)
        else:
            span = telemetry.start_span(
                name,
                values,
                parent=parent_span.open_span if parent_span else None,
                at_ns=at_ns,
                event_attributes=values_of(start_event_attributes),
            )
        return TelemetrySpan(span or unrecorded_span(name), values)

    def stop(
        self,
        span: TelemetrySpan,
        stop_event_attributes: Attributes | None = None,
        stop_time: TracingTimestamp | None = None,
        error: BaseException | str | None = None,
    ) -> None:
        """End a span, with an error if one was reported."""
        name, at_ns, error = span.name, stop_time.ns if stop_time else 0, error or span.error
        telemetry = self.telemetry
        if name in names.ITERATION_PHASES:
            telemetry.end_phase(name, error, at_ns=at_ns)
        elif name == names.TRAINING_SINGLE_ITERATION and isinstance(error, BaseException):
            telemetry.fail_iteration(error)
        elif name == names.TRAINING_SINGLE_ITERATION:
            telemetry.on_training_single_iteration_end(at_ns=at_ns)
        elif name in _EVALUATION_LOOPS:
            telemetry.on_validation_single_iteration_end(_EVALUATION_LOOPS[name], error=error, at_ns=at_ns)
        else:
            telemetry.end_span(span.open_span, error, at_ns=at_ns, event_attributes=values_of(stop_event_attributes))

    @overload
    def event(self, span: TelemetrySpan, event: TelemetryEvent) -> TelemetryEvent: ...

    @overload
    def event(self, span: TelemetryEvent) -> TelemetryEvent: ...

    def event(self, span: TelemetrySpan | TelemetryEvent, event: TelemetryEvent | None = None) -> TelemetryEvent:
        """Record an event of a span: `event(span, event)`; or of the present span: `event(event)`."""
        happened, owner = (span, None) if isinstance(span, TelemetryEvent) else (event, span.open_span)
        if happened is None:
            raise TypeError("event() needs an event: recorder.event(span, Event.create(...))")
        self.telemetry.event(
            plain_name(happened.name), values_of(happened.attributes), owner, at_ns=happened.timestamp.ns
        )
        return happened

    def error(self, span: TelemetrySpan, error_message: str, exception: BaseException | None = None) -> None:
        """Record an error of the application. The span ends with it."""
        attributes: dict[str, object] = {"error_message": error_message}
        if exception is not None:
            attributes |= {"exception_type": type(exception).__name__, "exception_message": str(exception)}
        span.error = error_message
        self.telemetry.event(names.ERROR, attributes, span.open_span, severity=SeverityNumber.ERROR)

    def telemetry_data_error(self, error_message: str, attributes: Attributes | None = None) -> None:
        """Record that telemetry is not complete."""
        values = {"telemetry_data_error_type": "incomplete_telemetry_data", "error_message": error_message}
        self.telemetry.event(names.TELEMETRY_DATA_ERROR, {**values, **values_of(attributes)})

    def get_active_spans_by_name(self, span_name: str | Enum) -> list[TelemetrySpan]:
        """Return the spans of this name that have not ended."""
        name = plain_name(span_name)
        return [TelemetrySpan(span) for span in self.telemetry.recorder.open_spans if span.name == name]

    def close(self) -> None:
        """End all spans, and close files and connections."""
        self.telemetry.close()
