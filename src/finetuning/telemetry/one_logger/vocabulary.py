"""Names of spans, events and attributes, and the other enumerations of One Logger's API.

Source: nv-one-logger-core and nv-one-logger-training-telemetry 2.3.1. `TESTING_SINGLE_ITERATION` has a value in lower
case like all others; One Logger writes it in upper case.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto

from finetuning.telemetry import names


class StandardSpanName(StrEnum):
    """Spans that every application has."""

    APPLICATION = names.APPLICATION


class StandardTrainingJobSpanName(StrEnum):
    """Spans of a training job."""

    TRAINING_LOOP = names.TRAINING_LOOP
    VALIDATION_LOOP = names.VALIDATION_LOOP
    TESTING_LOOP = names.TESTING_LOOP
    DIST_INIT = names.DIST_INIT
    DATA_LOADER_INIT = names.DATA_LOADER_INIT
    MODEL_INIT = names.MODEL_INIT
    OPTIMIZER_INIT = names.OPTIMIZER_INIT
    CHECKPOINT_LOAD = names.CHECKPOINT_LOAD
    CHECKPOINT_SAVE_SYNC = names.CHECKPOINT_SAVE_SYNC
    CHECKPOINT_SAVE_ASYNC = names.CHECKPOINT_SAVE_ASYNC
    CHECKPOINT_SAVE_FINALIZATION = names.CHECKPOINT_SAVE_FINALIZATION
    TRAINING_SINGLE_ITERATION = names.TRAINING_SINGLE_ITERATION
    VALIDATION_SINGLE_ITERATION = names.VALIDATION_SINGLE_ITERATION
    TESTING_SINGLE_ITERATION = names.TESTING_SINGLE_ITERATION
    DATA_LOADING = names.DATA_LOADING
    MODEL_FORWARD = names.MODEL_FORWARD
    ZERO_GRAD = names.ZERO_GRAD
    MODEL_BACKWARD = names.MODEL_BACKWARD
    OPTIMIZER_UPDATE = names.OPTIMIZER_UPDATE


class StandardEventName(StrEnum):
    """Events that every span may have."""

    SPAN_START = names.SPAN_START
    SPAN_STOP = names.SPAN_STOP
    ERROR = names.ERROR
    TELEMETRY_DATA_ERROR = names.TELEMETRY_DATA_ERROR


class StandardTrainingJobEventName(StrEnum):
    """Events of a training job."""

    ONE_LOGGER_INITIALIZATION = names.ONE_LOGGER_INITIALIZATION
    UPDATE_TRAINING_TELEMETRY_CONFIG = names.UPDATE_CONFIG
    TRAINING_METRICS_UPDATE = names.TRAINING_METRICS_UPDATE
    VALIDATION_METRICS_UPDATE = names.VALIDATION_METRICS_UPDATE
    TESTING_METRICS_UPDATE = names.TESTING_METRICS_UPDATE
    SAVE_CHECKPOINT_SUCCESS = names.SAVE_CHECKPOINT_SUCCESS
    SYNC_CHECKPOINT_METRICS_UPDATE = names.SYNC_CHECKPOINT_METRICS_UPDATE


class StandardSpanAttributeName(StrEnum):
    """Attributes that every span may have."""

    DURATION_MSEC = "duration_msec"
    NVTX_COLOR = "nvtx_color"


class StandardEventAttributeName(StrEnum):
    """Attributes that every event may have."""

    TIMESTAMP_MSEC = "timestamp_msec"
    ERROR_MESSAGE = "error_message"
    EXCEPTION_TYPE = "exception_type"
    EXCEPTION_MESSAGE = "exception_message"
    EXCEPTION_TRACEBACK = "exception_traceback"
    TELEMETRY_DATA_ERROR_TYPE = "telemetry_data_error_type"


class CheckPointStrategy(StrEnum):
    """Whether training waits until a checkpoint is saved."""

    SYNC = "sync"
    ASYNC = "async"


class CheckPointType(StrEnum):
    """Whether a checkpoint outlives its node."""

    GLOBAL = "global"
    LOCAL = "local"


class ApplicationType(StrEnum):
    """What an application does."""

    TRAINING = "training"
    VALIDATION = "validation"
    BATCH_INFERENCE = "batch_inference"
    ONLINE_INFERENCE = "online_inference"
    DATA_PROCESSING = "data_processing"


class OneLoggerErrorHandlingStrategy(Enum):
    """What happens where telemetry is used wrongly: the error is raised, or only recorded."""

    PROPAGATE_EXCEPTIONS = "propagate_exceptions"
    DISABLE_QUIETLY_AND_REPORT_METRIC_ERROR = "disable_quietly_and_report_metric_error"


class ExportCustomizationMode(Enum):
    """Which spans are exported: all, only those of a list, or all but those of a list."""

    EXPORT_ALL_SPANS = auto()
    WHITELIST_SPANS = auto()
    BLACKLIST_SPANS = auto()
