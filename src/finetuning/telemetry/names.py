"""Names on the wire: the spans and events of One Logger's training telemetry, and the few that we add.

Source: the span and event names of nv-one-logger-training-telemetry 2.3.1. Ours: `data_preparation`,
`model_publication`, `custom` names of users; `testing_single_iteration` is in lower case as all others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

from finetuning.config.sections.tracking import SpanName

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

STANDARD_SPANS = frozenset(get_args(SpanName))
INSIDE_A_STEP = frozenset({DATA_LOADING, MODEL_FORWARD, MODEL_BACKWARD, OPTIMIZER_UPDATE, ZERO_GRAD})
STEPS = frozenset({TRAINING_SINGLE_ITERATION, VALIDATION_SINGLE_ITERATION, TESTING_SINGLE_ITERATION})
SHORT_SPANS = INSIDE_A_STEP | STEPS

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

SpanFilter = Callable[[str], bool]
"""Whether the span of this name is written."""


def export_all() -> SpanFilter:
    """Every span."""
    return lambda name: True


def export_only(names: Iterable[str]) -> SpanFilter:
    """The spans of these names, and the application's, which holds the others."""
    wanted = frozenset(names) | {APPLICATION}
    return lambda name: name in wanted


def export_all_but(names: Iterable[str] = SHORT_SPANS) -> SpanFilter:
    """All spans but those of these names; by default but the short ones."""
    unwanted = frozenset(names) - {APPLICATION}
    return lambda name: name not in unwanted


def preset_filter(preset: str, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> SpanFilter:
    """The filter that `telemetry.spans`, `include_spans` and `exclude_spans` ask for."""
    include = frozenset(include)
    if preset == "none":
        return export_only(include - frozenset(exclude))
    left_out = {"default": SHORT_SPANS, "per_step": INSIDE_A_STEP, "all": frozenset()}[preset]
    return export_all_but((left_out - include) | frozenset(exclude))
