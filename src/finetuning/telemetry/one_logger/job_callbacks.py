"""One Logger's callbacks: a job calls them where something begins or ends.

Times are milliseconds since 1970; without one, it is now. A callback that begins something returns its span. The
callbacks that end something take an error, which One Logger's do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from finetuning.telemetry import names
from finetuning.telemetry.one_logger.job_settings import evaluate_or
from finetuning.telemetry.one_logger.provider import TrainingTelemetryProvider
from finetuning.telemetry.one_logger.training_recorder import TelemetrySpan
from finetuning.telemetry.one_logger.values import OneLoggerError
from finetuning.telemetry.spans import OpenSpan, unrecorded_span
from finetuning.telemetry.telemetry import Telemetry

Error = BaseException | str | None
_P = ParamSpec("_P")
_R = TypeVar("_R")
_QUIET_SPAN = "unrecorded"


def respects_strategy(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Record wrong use instead of raising it, if the config's `error_handling_strategy` says so.

    Arguments that the function does not take are always an error.
    """
    returns_span = inspect.signature(function).return_annotation == "TelemetrySpan"

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            return function(*args, **kwargs)
        except OneLoggerError as error:
            provider = TrainingTelemetryProvider.instance()
            if not provider.is_quiet:
                raise
            if provider.one_logger_ready:
                provider.telemetry.errors.record(function.__name__, error)
            return TelemetrySpan(unrecorded_span(_QUIET_SPAN)) if returns_span else None

    return call


def _telemetry() -> Telemetry:
    return TrainingTelemetryProvider.instance().telemetry


def _ns(time_msec: float | None) -> int:
    return 0 if time_msec is None else round(time_msec * 1e6)


def _span(span: OpenSpan | None, name: str) -> TelemetrySpan:
    return TelemetrySpan(span or unrecorded_span(name))


def _begin(name: str, start_time_msec: float | None) -> TelemetrySpan:
    return _span(_telemetry().begin(name, at_ns=_ns(start_time_msec)), name)


def _end(name: str, finish_time_msec: float | None, error: Error) -> None:
    _telemetry().end(name, error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_app_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the application starts."""
    return _span(_telemetry().on_app_start(_ns(start_time_msec)), names.APPLICATION)


@respects_strategy
def on_app_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the application ends. Files and connections are closed."""
    _telemetry().on_app_end(error, at_ns=_ns(finish_time_msec))
    _telemetry().close()


@respects_strategy
def on_distributed_init_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the process group is about to be created."""
    return _begin(names.DIST_INIT, start_time_msec)


@respects_strategy
def on_distributed_init_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the process group exists."""
    _end(names.DIST_INIT, finish_time_msec, error)


@respects_strategy
def on_model_init_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the model is about to be created."""
    return _begin(names.MODEL_INIT, start_time_msec)


@respects_strategy
def on_model_init_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the model exists."""
    _end(names.MODEL_INIT, finish_time_msec, error)


@respects_strategy
def on_dataloader_init_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the data loader is about to be created."""
    return _begin(names.DATA_LOADER_INIT, start_time_msec)


@respects_strategy
def on_dataloader_init_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the data loader exists."""
    _end(names.DATA_LOADER_INIT, finish_time_msec, error)


@respects_strategy
def on_optimizer_init_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the optimizer is about to be created."""
    return _begin(names.OPTIMIZER_INIT, start_time_msec)


@respects_strategy
def on_optimizer_init_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the optimizer exists."""
    _end(names.OPTIMIZER_INIT, finish_time_msec, error)


@respects_strategy
def on_load_checkpoint_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when a checkpoint is about to be loaded."""
    return _begin(names.CHECKPOINT_LOAD, start_time_msec)


@respects_strategy
def on_load_checkpoint_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when a checkpoint is loaded."""
    _end(names.CHECKPOINT_LOAD, finish_time_msec, error)


@respects_strategy
def on_train_start(
    train_iterations_start: int,
    train_samples_start: int | None = None,
    train_iterations_target_or_fn: int | Callable[[], int] | None = None,
    train_samples_target_or_fn: int | Callable[[], int] | None = None,
    start_time_msec: float | None = None,
) -> TelemetrySpan:
    """Call when the training loop begins, at this step. Targets are by default those of the config.

    Raises:
        OneLoggerError: the config is not complete.
    """
    provider = TrainingTelemetryProvider.instance()
    provider.prepare_training()
    span = provider.telemetry.on_train_start(
        train_iterations_start,
        train_samples_start,
        train_iterations_target=evaluate_or(train_iterations_target_or_fn, "train_iterations_target_or_fn"),
        train_samples_target=evaluate_or(train_samples_target_or_fn, "train_samples_target_or_fn"),
        at_ns=_ns(start_time_msec),
    )
    return _span(span, names.TRAINING_LOOP)


@respects_strategy
def on_train_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the training loop ends."""
    _telemetry().on_train_end(error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_training_single_iteration_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when an optimizer step begins."""
    span = _telemetry().on_training_single_iteration_start(at_ns=_ns(start_time_msec))
    return _span(span, names.TRAINING_SINGLE_ITERATION)


@respects_strategy
def on_training_single_iteration_end(
    finish_time_msec: float | None = None, *, tokens: float | None = None, loss: float | None = None
) -> None:
    """Call when an optimizer step ends. `tokens` and `loss` are those of this process, beyond One Logger."""
    _telemetry().on_training_single_iteration_end(tokens=tokens, loss=loss, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_validation_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when a validation loop begins."""
    return _span(_telemetry().on_validation_start(at_ns=_ns(start_time_msec)), names.VALIDATION_LOOP)


@respects_strategy
def on_validation_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when a validation loop ends."""
    _telemetry().on_validation_end(error=error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_validation_single_iteration_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when a batch of a validation loop begins."""
    span = _telemetry().on_validation_single_iteration_start(at_ns=_ns(start_time_msec))
    return _span(span, names.VALIDATION_SINGLE_ITERATION)


@respects_strategy
def on_validation_single_iteration_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when a batch of a validation loop ends."""
    _telemetry().on_validation_single_iteration_end(error=error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_testing_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when the testing loop begins."""
    return _span(_telemetry().on_testing_start(at_ns=_ns(start_time_msec)), names.TESTING_LOOP)


@respects_strategy
def on_testing_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when the testing loop ends."""
    _telemetry().on_testing_end(error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_testing_single_iteration_start(start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when a batch of the testing loop begins; beyond One Logger."""
    span = _telemetry().on_validation_single_iteration_start(names.TESTING_LOOP, at_ns=_ns(start_time_msec))
    return _span(span, names.TESTING_SINGLE_ITERATION)


@respects_strategy
def on_testing_single_iteration_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when a batch of the testing loop ends; beyond One Logger."""
    _telemetry().on_validation_single_iteration_end(names.TESTING_LOOP, error=error, at_ns=_ns(finish_time_msec))


@respects_strategy
def on_save_checkpoint_start(global_step: int, start_time_msec: float | None = None) -> TelemetrySpan:
    """Call when a checkpoint is about to be saved, after this many steps."""
    span = _telemetry().on_save_checkpoint_start(global_step, at_ns=_ns(start_time_msec))
    return _span(span, names.CHECKPOINT_SAVE_SYNC)


@respects_strategy
def on_save_checkpoint_success(
    global_step: int, time_msec: float | None = None, directory: Path | str | None = None
) -> None:
    """Call when a checkpoint is complete on disk. With `directory`, beyond One Logger, its size is recorded."""
    _telemetry().on_save_checkpoint_success(global_step, directory, at_ns=_ns(time_msec))


@respects_strategy
def on_save_checkpoint_end(finish_time_msec: float | None = None, error: Error = None) -> None:
    """Call when training goes on after a checkpoint."""
    _telemetry().on_save_checkpoint_end(error, at_ns=_ns(finish_time_msec))
