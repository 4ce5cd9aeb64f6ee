"""NVIDIA One Logger's API on this package's telemetry.

A training loop that uses One Logger runs on it after changing its imports: all names of `nv_one_logger`, from whatever
module they were imported, are here.

    from finetuning.telemetry.one_logger import OneLoggerConfig, TrainingTelemetryProvider, application, training_loop

`docs/reference/one-logger.md` lists the names, and what is different.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuning.telemetry.one_logger.contexts import (
    application,
    checkpoint_load,
    checkpoint_save,
    data_loading,
    dataloader_init,
    distributed_init,
    get_recorder,
    model_init,
    optimizer_init,
    testing_iteration,
    testing_loop,
    timed_span,
    training_iteration,
    training_loop,
    validation_iteration,
    validation_loop,
)
from finetuning.telemetry.one_logger.destinations import (
    Exporter,
    FileExporter,
    LoggerExporter,
    OTelExporter,
    OtlpExporter,
)
from finetuning.telemetry.one_logger.job_callbacks import (
    on_app_end,
    on_app_start,
    on_dataloader_init_end,
    on_dataloader_init_start,
    on_distributed_init_end,
    on_distributed_init_start,
    on_load_checkpoint_end,
    on_load_checkpoint_start,
    on_model_init_end,
    on_model_init_start,
    on_optimizer_init_end,
    on_optimizer_init_start,
    on_save_checkpoint_end,
    on_save_checkpoint_start,
    on_save_checkpoint_success,
    on_testing_end,
    on_testing_single_iteration_end,
    on_testing_single_iteration_start,
    on_testing_start,
    on_train_end,
    on_train_start,
    on_training_single_iteration_end,
    on_training_single_iteration_start,
    on_validation_end,
    on_validation_single_iteration_end,
    on_validation_single_iteration_start,
    on_validation_start,
)
from finetuning.telemetry.one_logger.job_settings import LoggerConfig, OneLoggerConfig, TrainingTelemetryConfig
from finetuning.telemetry.one_logger.provider import (
    DEFAULT_SPANS_EXPORT_BLACKLIST,
    OneLoggerProvider,
    TrainingTelemetryProvider,
)
from finetuning.telemetry.one_logger.training_recorder import TelemetrySpan as Span
from finetuning.telemetry.one_logger.training_recorder import TrainingRecorder
from finetuning.telemetry.one_logger.values import (
    Attribute,
    Attributes,
    CheckpointSaveSpanAttributes,
    OneLoggerError,
    OneLoggerInitializationAttributes,
    SaveCheckpointSuccessEventAttributes,
    SyncCheckpointMetricsUpdateAttributes,
    TestingMetricsUpdateAttributes,
    TracingTimestamp,
    TrainingLoopAttributes,
    TrainingMetricsUpdateAttributes,
    TrainingTelemetryAttributes,
    ValidationMetricsUpdateAttributes,
)
from finetuning.telemetry.one_logger.values import TelemetryEvent as Event
from finetuning.telemetry.one_logger.vocabulary import (
    ApplicationType,
    CheckPointStrategy,
    CheckPointType,
    ExportCustomizationMode,
    OneLoggerErrorHandlingStrategy,
    StandardEventAttributeName,
    StandardEventName,
    StandardSpanAttributeName,
    StandardSpanName,
    StandardTrainingJobEventName,
    StandardTrainingJobSpanName,
)

if TYPE_CHECKING:
    from finetuning.telemetry.hf_callback import TelemetryCallback as TelemetryCallback
    from finetuning.telemetry.one_logger.lightning_trainer import OneLoggerPTLTrainer as OneLoggerPTLTrainer
    from finetuning.telemetry.one_logger.lightning_trainer import TimeEventCallback as TimeEventCallback
    from finetuning.telemetry.one_logger.lightning_trainer import hook_trainer_cls as hook_trainer_cls

__all__ = [
    "DEFAULT_SPANS_EXPORT_BLACKLIST",
    "ApplicationType",
    "Attribute",
    "Attributes",
    "CheckPointStrategy",
    "CheckPointType",
    "CheckpointSaveSpanAttributes",
    "Event",
    "ExportCustomizationMode",
    "Exporter",
    "FileExporter",
    "LoggerConfig",
    "LoggerExporter",
    "OTelExporter",
    "OneLoggerConfig",
    "OneLoggerError",
    "OneLoggerErrorHandlingStrategy",
    "OneLoggerInitializationAttributes",
    "OneLoggerProvider",
    "OtlpExporter",
    "SaveCheckpointSuccessEventAttributes",
    "Span",
    "StandardEventAttributeName",
    "StandardEventName",
    "StandardSpanAttributeName",
    "StandardSpanName",
    "StandardTrainingJobEventName",
    "StandardTrainingJobSpanName",
    "SyncCheckpointMetricsUpdateAttributes",
    "TestingMetricsUpdateAttributes",
    "TracingTimestamp",
    "TrainingLoopAttributes",
    "TrainingMetricsUpdateAttributes",
    "TrainingRecorder",
    "TrainingTelemetryAttributes",
    "TrainingTelemetryConfig",
    "TrainingTelemetryProvider",
    "ValidationMetricsUpdateAttributes",
    "application",
    "checkpoint_load",
    "checkpoint_save",
    "data_loading",
    "dataloader_init",
    "distributed_init",
    "get_recorder",
    "model_init",
    "on_app_end",
    "on_app_start",
    "on_dataloader_init_end",
    "on_dataloader_init_start",
    "on_distributed_init_end",
    "on_distributed_init_start",
    "on_load_checkpoint_end",
    "on_load_checkpoint_start",
    "on_model_init_end",
    "on_model_init_start",
    "on_optimizer_init_end",
    "on_optimizer_init_start",
    "on_save_checkpoint_end",
    "on_save_checkpoint_start",
    "on_save_checkpoint_success",
    "on_testing_end",
    "on_testing_single_iteration_end",
    "on_testing_single_iteration_start",
    "on_testing_start",
    "on_train_end",
    "on_train_start",
    "on_training_single_iteration_end",
    "on_training_single_iteration_start",
    "on_validation_end",
    "on_validation_single_iteration_end",
    "on_validation_single_iteration_start",
    "on_validation_start",
    "optimizer_init",
    "testing_iteration",
    "testing_loop",
    "timed_span",
    "training_iteration",
    "training_loop",
    "validation_iteration",
    "validation_loop",
]


def __getattr__(name: str) -> object:
    """Import what needs Lightning or transformers when it is asked for."""
    if name in ("OneLoggerPTLTrainer", "TimeEventCallback", "hook_trainer_cls"):
        from finetuning.telemetry.one_logger import lightning_trainer

        return getattr(lightning_trainer, name)
    if name == "TelemetryCallback":
        from finetuning.telemetry.hf_callback import TelemetryCallback

        return TelemetryCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
