"""Names of spans, events and metrics: those of One Logger's training telemetry, and a few of ours.

Source: nv-one-logger-training-telemetry 2.3.1. Ours are `data_preparation` and `model_publication`. One Logger writes
`TESTING_SINGLE_ITERATION` in upper case; here it is lower case like the other names.
"""

from __future__ import annotations

APPLICATION = "application"
DIST_INIT = "distributed_code_initialization"
DATA_PREPARATION = "data_preparation"
DATA_LOADER_INIT = "data_loader_initialization"
MODEL_INIT = "model_initialization"
OPTIMIZER_INIT = "optimizer_initialization"
CHECKPOINT_LOAD = "checkpoint_load"
TRAINING_LOOP = "training_loop"
TRAINING_SINGLE_ITERATION = "training_single_iteration"
DATA_LOADING = "data_loading"
MODEL_FORWARD = "model_forward"
MODEL_BACKWARD = "model_backward"
OPTIMIZER_UPDATE = "optimizer_update"
ZERO_GRAD = "zero_grad"
CHECKPOINT_SAVE_SYNC = "checkpoint_save_sync"
CHECKPOINT_SAVE_ASYNC = "checkpoint_save_async"
CHECKPOINT_SAVE_FINALIZATION = "checkpoint_save_finalization"
VALIDATION_LOOP = "validation_loop"
VALIDATION_SINGLE_ITERATION = "validation_single_iteration"
TESTING_LOOP = "testing_loop"
TESTING_SINGLE_ITERATION = "testing_single_iteration"
MODEL_PUBLICATION = "model_publication"

ITERATION_PHASES = frozenset({DATA_LOADING, MODEL_FORWARD, MODEL_BACKWARD, OPTIMIZER_UPDATE, ZERO_GRAD})
ITERATIONS = frozenset({TRAINING_SINGLE_ITERATION, VALIDATION_SINGLE_ITERATION, TESTING_SINGLE_ITERATION})
SHORT_SPANS = ITERATION_PHASES | ITERATIONS
"""Spans that occur at least once per step. They are not exported by default."""
STANDARD_SPANS = SHORT_SPANS | {
    APPLICATION,
    DIST_INIT,
    DATA_PREPARATION,
    DATA_LOADER_INIT,
    MODEL_INIT,
    OPTIMIZER_INIT,
    CHECKPOINT_LOAD,
    TRAINING_LOOP,
    CHECKPOINT_SAVE_SYNC,
    CHECKPOINT_SAVE_ASYNC,
    CHECKPOINT_SAVE_FINALIZATION,
    VALIDATION_LOOP,
    TESTING_LOOP,
    MODEL_PUBLICATION,
}
"""The names in the config, `finetuning.config.sections.tracking.SpanName`."""

SPAN_START = "span_start"
SPAN_STOP = "span_stop"
ERROR = "error"
TELEMETRY_DATA_ERROR = "telemetry_data_error"
ONE_LOGGER_INITIALIZATION = "one_logger_initialization"
UPDATE_CONFIG = "update_training_telemetry_config"
TRAINING_METRICS_UPDATE = "training_metrics_update"
VALIDATION_METRICS_UPDATE = "validation_metrics_update"
TESTING_METRICS_UPDATE = "testing_metrics_update"
SAVE_CHECKPOINT_SUCCESS = "save_checkpoint_success"
SYNC_CHECKPOINT_METRICS_UPDATE = "sync_checkpoint_metrics_update"

PHASE_NAMES = {
    DATA_LOADING: "dataloader",
    MODEL_FORWARD: "forward",
    MODEL_BACKWARD: "backward",
    OPTIMIZER_UPDATE: "optimizer",
    ZERO_GRAD: "zero_grad",
}
"""The phases of an iteration, and their names in attributes."""
TRACKED_METRICS = {
    "tokens_per_second_per_device": "tokens_per_second_per_device",
    "tokens_per_second": "tokens_per_second",
    "train_throughput_per_gpu": "tflops_per_device",
    "mfu": "mfu",
    "window_avg_iteration_time_sec": "step_time_s",
    "first_iteration_time_sec": "first_step_s",
    "data_wait_share": "data_wait_share",
    "peak_memory_allocated_bytes": "peak_memory_allocated_bytes",
    "peak_memory_reserved_bytes": "peak_memory_reserved_bytes",
    "peak_host_memory_bytes": "peak_host_memory_bytes",
    "straggler_ratio": "straggler_ratio",
}
"""Attributes that also go to trackers, and their names there."""
