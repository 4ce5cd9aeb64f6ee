"""The configuration classes of One Logger's API.

A field that ends in `_or_fn` takes a value or a function without arguments, and a property without the ending returns
the value. A function may be called when its value is not known yet: it is called again when training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetuning.telemetry.config import TrainingConfig, environment_topology
from finetuning.telemetry.one_logger.values import OneLoggerError
from finetuning.telemetry.one_logger.vocabulary import (
    ApplicationType,
    CheckPointStrategy,
    OneLoggerErrorHandlingStrategy,
)

IntOrFn = int | Callable[[], int]
FloatOrFn = float | Callable[[], float]
BoolOrFn = bool | Callable[[], bool]


def evaluate_value(value_or_fn: Any) -> Any:
    """Return the value, or what the function returns."""
    return value_or_fn() if callable(value_or_fn) else value_or_fn


class _Settings(BaseModel):
    """A class of settings. An unknown field is an error."""

    # NumPy and torch have numbers of their own, which the values are converted from.
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    def __getattr__(self, name: str) -> Any:
        field = f"{name}_or_fn"
        if field in type(self).model_fields:
            return evaluate_value(getattr(self, field))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @model_validator(mode="before")
    @classmethod
    def _convert_numbers(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        return {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in values.items()}


class LoggerConfig(_Settings):
    """How One Logger logs. Accepted for compatibility: messages go to Python's logging, and no file is written."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: str = "%(name)s - %(levelname)s - %(message)s"
    log_file_path_for_info: Path | str = "onelogger.log"
    log_file_path_for_err: Path | str = "onelogger.err"


class TrainingTelemetryConfig(_Settings):
    """What the metrics of a training need to know. See `finetuning.telemetry.TrainingConfig`."""

    perf_tag_or_fn: str | list[str] | Callable[[], str | list[str]]
    global_batch_size_or_fn: IntOrFn
    log_every_n_train_iterations: int = Field(default=50, gt=0)
    world_size_or_fn: IntOrFn | None = None
    """Overrides that of `OneLoggerConfig`."""
    micro_batch_size_or_fn: IntOrFn | None = None
    seq_length_or_fn: IntOrFn | None = None
    flops_per_sample_or_fn: FloatOrFn | None = None
    flops_per_token_or_fn: FloatOrFn | None = None
    """Beyond One Logger: for rows of different lengths, instead of `flops_per_sample_or_fn`."""
    peak_tflops_or_fn: FloatOrFn | None = None
    """Beyond One Logger: of one device, for the model FLOPs utilization."""
    train_iterations_target_or_fn: IntOrFn | None = None
    train_samples_target_or_fn: IntOrFn | None = None
    is_train_iterations_enabled_or_fn: BoolOrFn = True
    is_validation_iterations_enabled_or_fn: BoolOrFn = True
    is_test_iterations_enabled_or_fn: BoolOrFn = True
    is_save_checkpoint_enabled_or_fn: BoolOrFn = True
    is_log_throughput_enabled_or_fn: BoolOrFn = False
    save_checkpoint_strategy: CheckPointStrategy = CheckPointStrategy.SYNC
    custom_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainingTelemetryConfig:
        for name in ("global_batch_size_or_fn", "flops_per_sample_or_fn"):
            value = getattr(self, name)
            if value is not None and not callable(value) and value <= 0:
                raise ValueError(f"{name} must be above 0")
        is_counted = self.flops_per_sample_or_fn is not None or self.flops_per_token_or_fn is not None
        if self.is_log_throughput_enabled_or_fn is True and not is_counted:
            raise ValueError("flops_per_sample_or_fn must be set if is_log_throughput_enabled_or_fn is true")
        return self

    @property
    def app_type(self) -> ApplicationType:
        """What the application does."""
        return ApplicationType.TRAINING

    def training_config(self) -> TrainingConfig:
        """Return the same settings as telemetry's own class."""
        named = {name.removesuffix("_or_fn"): getattr(self, name) for name in type(self).model_fields}
        del named["world_size"]
        named["save_checkpoint_strategy"] = str(self.save_checkpoint_strategy)
        named["custom_metadata"] = self.custom_metadata or {}
        return TrainingConfig(**named)


class OneLoggerConfig(_Settings):
    """What identifies a job. `world_size_or_fn` is by default what the launcher has set in the environment."""

    application_name: str = Field(min_length=1)
    session_tag_or_fn: str | Callable[[], str]
    world_size_or_fn: IntOrFn = Field(default_factory=lambda: environment_topology().world_size)
    is_baseline_run_or_fn: BoolOrFn = False
    custom_metadata: dict[str, Any] | None = None
    error_handling_strategy: OneLoggerErrorHandlingStrategy = OneLoggerErrorHandlingStrategy.PROPAGATE_EXCEPTIONS
    enable_for_current_rank: bool = True
    logger_config: LoggerConfig = Field(default_factory=LoggerConfig)
    summary_data_schema_version: str = "1.0.0"
    telemetry_config: TrainingTelemetryConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> OneLoggerConfig:
        if not self.application_name.strip():
            raise ValueError("application_name must not be blank")
        if not callable(self.world_size_or_fn) and self.world_size_or_fn <= 0:
            raise ValueError("world_size_or_fn must be above 0")
        if any(not key.strip() for key in self.custom_metadata or {}):
            raise ValueError("keys of custom_metadata must not be blank")
        is_chosen = "error_handling_strategy" in self.model_fields_set
        if not self.enable_for_current_rank and not is_chosen:
            quiet = OneLoggerErrorHandlingStrategy.DISABLE_QUIETLY_AND_REPORT_METRIC_ERROR
            self.error_handling_strategy = quiet
        return self


def evaluate_or(value_or_fn: Any, name: str, fallback: Callable[[], Any] | None = None) -> Any:
    """Return the value, or what the function returns; if it raises, that of `fallback`.

    Raises:
        OneLoggerError: the function raises, and there is no fallback.
    """
    try:
        return evaluate_value(value_or_fn)
    except Exception as error:
        if fallback is not None:
            return fallback()
        raise OneLoggerError(f"{name}: its function raised {error!r}") from error
