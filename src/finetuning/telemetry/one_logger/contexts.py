"""One Logger's context managers. Each is also a decorator, also of functions that are defined before the provider is
configured. An exception in the block is recorded, and the span ends with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from finetuning.telemetry.one_logger import job_callbacks as callbacks
from finetuning.telemetry.one_logger.provider import TrainingTelemetryProvider
from finetuning.telemetry.one_logger.training_recorder import TelemetrySpan, TrainingRecorder
from finetuning.telemetry.one_logger.values import Attributes

_Function = TypeVar("_Function", bound=Callable[..., object])


class SpanContext(Protocol):
    """A context manager that is also a decorator, as `contextlib.contextmanager` makes them."""

    def __enter__(self) -> TelemetrySpan: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> bool | None: ...
    def __call__(self, function: _Function, /) -> _Function: ...


@contextmanager
def _block(
    start: Callable[[], TelemetrySpan], end: Callable[[BaseException | None], object]
) -> Iterator[TelemetrySpan]:
    span = start()
    try:
        yield span
    except BaseException as error:
        end(error)
        raise
    end(None)


def application() -> SpanContext:
    """Record the whole program. At its end, files and connections are closed."""
    return _block(callbacks.on_app_start, lambda error: callbacks.on_app_end(error=error))


def distributed_init() -> SpanContext:
    """Record the creation of the process group; beyond One Logger."""
    return _block(callbacks.on_distributed_init_start, lambda error: callbacks.on_distributed_init_end(error=error))


def model_init() -> SpanContext:
    """Record the creation of the model."""
    return _block(callbacks.on_model_init_start, lambda error: callbacks.on_model_init_end(error=error))


def dataloader_init() -> SpanContext:
    """Record the creation of the data loader."""
    return _block(callbacks.on_dataloader_init_start, lambda error: callbacks.on_dataloader_init_end(error=error))


def optimizer_init() -> SpanContext:
    """Record the creation of the optimizer."""
    return _block(callbacks.on_optimizer_init_start, lambda error: callbacks.on_optimizer_init_end(error=error))


def training_loop(
    train_iterations_start: int,
    train_samples_start: int | None = None,
    train_iterations_target_or_fn: int | Callable[[], int] | None = None,
    train_samples_target_or_fn: int | Callable[[], int] | None = None,
) -> SpanContext:
    """Record the training loop, which begins at this step. Targets are by default those of the config."""
    return _block(
        lambda: callbacks.on_train_start(
            train_iterations_start, train_samples_start, train_iterations_target_or_fn, train_samples_target_or_fn
        ),
        lambda error: callbacks.on_train_end(error=error),
    )


@contextmanager
def training_iteration(tokens: float | None = None) -> Iterator[TelemetrySpan]:
    """Record an optimizer step, with the tokens of this process if they are known."""
    span = callbacks.on_training_single_iteration_start()
    try:
        yield span
    except BaseException as error:
        TrainingTelemetryProvider.instance().telemetry.fail_iteration(error)
        raise
    callbacks.on_training_single_iteration_end(tokens=tokens)


def validation_loop() -> SpanContext:
    """Record a validation loop."""
    return _block(callbacks.on_validation_start, lambda error: callbacks.on_validation_end(error=error))


def validation_iteration() -> SpanContext:
    """Record a batch of a validation loop."""
    return _block(
        callbacks.on_validation_single_iteration_start,
        lambda error: callbacks.on_validation_single_iteration_end(error=error),
    )


def testing_loop() -> SpanContext:
    """Record the testing loop."""
    return _block(callbacks.on_testing_start, lambda error: callbacks.on_testing_end(error=error))


def testing_iteration() -> SpanContext:
    """Record a batch of the testing loop."""
    return _block(
        callbacks.on_testing_single_iteration_start,
        lambda error: callbacks.on_testing_single_iteration_end(error=error),
    )


def data_loading() -> SpanContext:
    """Record loading the data of a step."""
    return timed_span("data_loading")


def checkpoint_load() -> SpanContext:
    """Record loading a checkpoint."""
    return _block(callbacks.on_load_checkpoint_start, lambda error: callbacks.on_load_checkpoint_end(error=error))


def checkpoint_save(global_step: int, directory: Path | str | None = None) -> SpanContext:
    """Record saving a checkpoint after this many steps. With the synchronous strategy it succeeds when the block does
    not raise; with the other, call `on_save_checkpoint_success` when it is complete."""

    def end(error: BaseException | None) -> None:
        config = TrainingTelemetryProvider.instance().telemetry.config
        if error is None and config.save_checkpoint_strategy == "sync":
            callbacks.on_save_checkpoint_success(global_step, directory=directory)
        callbacks.on_save_checkpoint_end(error=error)

    return _block(lambda: callbacks.on_save_checkpoint_start(global_step), end)


@contextmanager
def timed_span(
    name: str | Enum, span_attributes: Attributes | None = None, start_event_attributes: Attributes | None = None
) -> Iterator[TelemetrySpan]:
    """Record a span of your own, in any thread, or a standard one that has no context manager."""
    recorder = get_recorder()
    span = recorder.start(name, span_attributes, start_event_attributes)
    try:
        yield span
    except BaseException as error:
        recorder.stop(span, error=error)
        raise
    recorder.stop(span)


def get_recorder() -> TrainingRecorder:
    """Return the recorder of this process."""
    return TrainingTelemetryProvider.instance().recorder
