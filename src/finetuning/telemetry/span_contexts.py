"""Spans by name, and the context managers of a training; each is a decorator, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context

from finetuning.telemetry import names
from finetuning.telemetry.error_guard import TelemetryErrors, guarded
from finetuning.telemetry.spans import OpenSpan, SpanRecorder


class SpanContexts:
    """Opens and closes spans by name. At most one of a standard name is open: a second one ends the first, marked."""

    def __init__(self, recorder: SpanRecorder, faults: TelemetryErrors):
        self.recorder = recorder
        self.faults = faults
        self.began: dict[str, int] = {}
        self._active: dict[str, OpenSpan] = {}
        self._written = {name: recorder.exports(name) for name in names.STANDARD_SPANS}

    def active(self, name: str) -> OpenSpan | None:
        """The open span of a standard name."""
        span = self._active.get(name)
        return span if span is not None and not span.ended else None

    def writes(self, name: str) -> bool:
        """Whether spans of a standard name are written."""
        return self._written[name]

    @guarded
    def begin(self, name: str, attributes: Mapping[str, Any] | None = None, *, at_ns: int = 0) -> OpenSpan:
        """Opens the span of a standard name."""
        stale = self.active(name)
        if stale is not None:
            self.recorder.end(stale, error="begun again before it had ended")
        span = self._active[name] = self.recorder.start(name, attributes, at_ns=at_ns)
        return span

    @guarded
    def end(self, name: str, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """Closes the span of a standard name; nothing when there is none."""
        span = self._active.pop(name, None)
        if span is not None:
            self.recorder.end(span, error=error, at_ns=at_ns)

    @guarded
    def part_began(self, name: str) -> None:
        """A part of an iteration begins; it is a span only where such spans are written."""
        now = self.began[name] = self.recorder.clock.now_ns()
        if self._written[name]:
            self.begin(name, at_ns=now)

    @guarded
    def part_ended(self, name: str, error: BaseException | None = None) -> None:
        """The part ends, and its time is counted."""
        began = self.began.pop(name, None)
        if began is not None:
            now = self.recorder.clock.now_ns()
            self.meter.part(name, (now - began) / 1e9)
            if self._written[name]:
                self.end(name, error, at_ns=now)
        if error is not None:
            self.recorder.error(error)

    @guarded
    def event(self, name: str, attributes: Mapping[str, Any] | None = None, span: OpenSpan | None = None) -> None:
        """An event of your own."""
        self.recorder.event(name, attributes, span)

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> Iterator[OpenSpan]:
        """A span of your own, around a block."""
        span = self._started(name, attributes) or _no_span(name)
        yield from self._around(span)

    @guarded
    def _started(self, name: str, attributes: Mapping[str, Any] | None) -> OpenSpan:
        return self.recorder.start(name, attributes)

    def _around(self, span: OpenSpan) -> Iterator[OpenSpan]:
        try:
            yield span
        except BaseException as error:
            self._ended(span, error)
            raise
        self._ended(span, None)

    @guarded
    def _ended(self, span: OpenSpan, error: BaseException | None) -> None:
        if span in self.recorder.open_spans:
            self.recorder.end(span, error=error)

    @contextmanager
    def block(self, name: str, attributes: Mapping[str, Any] | None = None) -> Iterator[OpenSpan]:
        """The span of a standard name around a block."""
        span = self.begin(name, attributes) or _no_span(name)
        try:
            yield span
        except BaseException as error:
            self.end(name, error)
            raise
        self.end(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of an iteration around a block: `data_loading`, `model_forward`, and so on."""
        self.part_began(name)
        try:
            yield
        except BaseException as error:
            self.part_ended(name, error)
            raise
        self.part_ended(name)

    @contextmanager
    def application(self) -> Iterator[OpenSpan]:
        """The whole program. Nothing is let go of at its end: `close` does that."""
        span = self.on_app_start() or _no_span(names.APPLICATION)
        try:
            yield span
        except BaseException as error:
            self.on_app_end(error)
            raise
        self.on_app_end()

    @contextmanager
    def training_loop(self, train_iterations_start: int = 0, **attributes: Any) -> Iterator[OpenSpan]:
        """The training loop; `attributes` are added to its span."""
        span = self.on_train_start(train_iterations_start, **attributes) or _no_span(names.TRAINING_LOOP)
        try:
            yield span
        except BaseException as error:
            self.on_train_end(error)
            raise
        self.on_train_end()

    @contextmanager
    def training_iteration(self, tokens: float | None = None) -> Iterator[None]:
        """One step, with the number of its tokens where that is known."""
        self.on_training_single_iteration_start()
        try:
            yield
        except BaseException as error:
            self._failed_iteration(error)
            raise
        self.on_training_single_iteration_end(tokens=tokens)

    @guarded
    def _failed_iteration(self, error: BaseException) -> None:
        self.began.pop(names.TRAINING_SINGLE_ITERATION, None)
        self.recorder.error(error)
        self.end(names.TRAINING_SINGLE_ITERATION, error)

    @contextmanager
    def evaluation_loop(self, loop: str) -> Iterator[OpenSpan]:
        span = self.on_validation_start(loop) or _no_span(loop)
        try:
            yield span
        except BaseException as error:
            self.on_validation_end(loop, error)
            raise
        self.on_validation_end(loop)

    @contextmanager
    def evaluation_iteration(self, loop: str) -> Iterator[None]:
        self.on_validation_single_iteration_start(loop)
        yield
        self.on_validation_single_iteration_end(loop)

    def validation_loop(self) -> Any:
        return self.evaluation_loop(names.VALIDATION_LOOP)

    def validation_iteration(self) -> Any:
        return self.evaluation_iteration(names.VALIDATION_LOOP)

    def testing_loop(self) -> Any:
        return self.evaluation_loop(names.TESTING_LOOP)

    def testing_iteration(self) -> Any:
        return self.evaluation_iteration(names.TESTING_LOOP)

    @contextmanager
    def checkpoint_save(self, global_step: int | None = None, directory: Any = None) -> Iterator[OpenSpan]:
        """Saving a checkpoint. Without an exception it is a success, under the sync strategy; under the async one,
        `on_save_checkpoint_success` says so later."""
        span = self.on_save_checkpoint_start(global_step) or _no_span(names.CHECKPOINT_SAVE_SYNC)
        try:
            yield span
        except BaseException as error:
            self.on_save_checkpoint_end(error)
            raise
        if self.config.save_checkpoint_strategy == "sync":
            self.on_save_checkpoint_success(global_step, directory)
        self.on_save_checkpoint_end()

    @contextmanager
    def checkpoint_save_finalization(self) -> Iterator[OpenSpan]:
        """The part of an asynchronous save that runs in the background, in a thread of its own perhaps."""
        span = self._finalizing() or _no_span(names.CHECKPOINT_SAVE_FINALIZATION)
        yield from self._around(span)

    @guarded
    def _finalizing(self) -> OpenSpan:
        return self.recorder.start(names.CHECKPOINT_SAVE_FINALIZATION, parent=self.active(names.APPLICATION))


def _no_span(name: str) -> OpenSpan:
    """Something to put attributes on where there is no span."""
    return OpenSpan(name, 0, None, None, Context())
