"""Attributes, events and timestamps of One Logger's API, and the attribute classes of its standard spans and events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

from finetuning.telemetry.error_guard import TelemetryUsageError

OneLoggerError = TelemetryUsageError
"""Raised where telemetry is used wrongly. Faults of telemetry itself are never raised."""


@dataclass
class Attribute:
    """A named value: text, a number, a boolean, or a list of values of one type."""

    name: str
    value: object


class Attributes(dict[str, Attribute]):
    """The attributes of a span or an event, by name."""

    def __init__(self, dictionary: Mapping[str, object] | None = None) -> None:
        super().__init__()
        for name, value in (dictionary or {}).items():
            self.add(name, value)

    def add(self, name: str, value: object) -> Attributes:
        """Add a value. Return the attributes."""
        self.add_attribute(Attribute(name, value))
        return self

    def add_attribute(self, attribute: Attribute) -> Attribute:
        """Add an attribute, and return it."""
        self[attribute.name] = attribute
        return attribute

    def add_attributes(self, other_attributes: Attributes) -> None:
        """Add all attributes of another object."""
        for attribute in other_attributes.values():
            self.add_attribute(attribute)

    def to_json(self) -> dict[str, object]:
        """Return the values by name."""
        return {attribute.name: attribute.value for attribute in self.values()}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """Return attributes with the values of a dictionary."""
        attributes = cls()
        for name, value in data.items():
            attributes.add(name, value)
        return attributes

    @classmethod
    def merge(cls, attributes: Attributes | None = None, more: Attributes | None = None) -> Self:
        """Return the attributes of both; where they have the same name, those of the second."""
        merged = cls()
        for source in (attributes, more):
            merged.add_attributes(source or Attributes())
        return merged


def values_of(attributes: Mapping[str, object] | None) -> dict[str, object]:
    """Return the plain values of attributes, or of a dictionary of values."""
    items = (attributes or {}).items()
    return {str(name): item.value if isinstance(item, Attribute) else item for name, item in items}


class StandardAttributes(Attributes):
    """Attributes with known names: `create` makes them, and each is also a property. One that is absent is None."""

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def create(cls, *positional: object, **named: object) -> Self:
        """Return attributes with these values, in the order of `required` and `optional`, or by name.

        Raises:
            TypeError: a required value is missing, or there is no such attribute.
        """
        supported = (*cls.required, *cls.optional)
        values = dict(zip(supported, positional, strict=False))
        if len(positional) > len(supported) or set(values) & set(named) or set(named) - set(supported):
            raise TypeError(
                f"{cls.__name__}.create takes each of {', '.join(supported)} once, and got {', '.join(named)}"
            )
        values |= named
        if missing := [name for name in cls.required if values.get(name) is None]:
            raise TypeError(f"{cls.__name__}.create needs {', '.join(missing)}")
        metadata = values.get("custom_metadata")
        if isinstance(metadata, Mapping):
            values["custom_metadata"] = [f"{key}:{value}" for key, value in metadata.items()]
        return cls.from_json({name: values[name] for name in supported if values.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self.required or name in self.optional:
            return self[name].value if name in self else None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class TrainingLoopAttributes(StandardAttributes):
    """Attributes of the span `training_loop`."""

    required = ("train_iterations_start", "train_samples_start")
    optional = (
        "train_tokens_target",
        "completed_floating_point_operations_overall",
        "train_iterations_target",
        "train_samples_target",
    )


class CheckpointSaveSpanAttributes(StandardAttributes):
    """Attributes of the spans `checkpoint_save_sync` and `checkpoint_save_async`."""

    required = ("checkpoint_strategy", "current_iteration", "save_checkpoint_attempt_count")


class OneLoggerInitializationAttributes(StandardAttributes):
    """Attributes of the event `one_logger_initialization`."""

    required = (
        "world_size",
        "one_logger_training_telemetry_version",
        "enable_for_current_rank",
        "session_tag",
        "is_baseline_run",
        "summary_data_schema_version",
        "node_name",
        "rank",
    )
    optional = ("custom_metadata",)


class TrainingTelemetryAttributes(StandardAttributes):
    """Attributes of the event `update_training_telemetry_config`."""

    required = ("perf_tag", "global_batch_size", "log_every_n_train_iterations")
    optional = (
        "micro_batch_size",
        "seq_length",
        "flops_per_sample",
        "train_iterations_target",
        "train_samples_target",
        "checkpoint_strategy",
        "is_train_iterations_enabled",
        "is_validation_iterations_enabled",
        "is_test_iterations_enabled",
        "is_save_checkpoint_enabled",
        "is_log_throughput_enabled",
        "custom_metadata",
    )


class TrainingMetricsUpdateAttributes(StandardAttributes):
    """Attributes of the event `training_metrics_update`."""

    required = (
        "train_iterations_start",
        "current_iteration",
        "num_iterations",
        "train_samples_start",
        "num_train_samples",
        "interval",
        "avg_iteration_time_sec",
        "min_iteration_time_sec",
        "max_iteration_time_sec",
        "total_iteration_time_sec",
    )
    optional = (
        "avg_forward_time_sec",
        "avg_backward_time_sec",
        "avg_dataloader_time_sec",
        "avg_tflops",
        "train_tokens",
        "avg_tokens_per_second",
        "latest_loss",
        "avg_batch_size",
        "completed_floating_point_operations_overall",
        "total_flops",
        "train_throughput_per_gpu",
        "train_throughput_per_gpu_max",
        "train_throughput_per_gpu_min",
        "first_logged_train_iterations_finish_timestamp_sec",
        "last_logged_train_iterations_finish_timestamp_sec",
    )


class ValidationMetricsUpdateAttributes(StandardAttributes):
    """Attributes of the event `validation_metrics_update`."""

    required = ("current_iteration", "interval")
    optional = (
        "avg_iteration_time_sec",
        "min_iteration_time_sec",
        "max_iteration_time_sec",
        "total_iteration_time_sec",
    )


class TestingMetricsUpdateAttributes(StandardAttributes):
    """Attributes of the event `testing_metrics_update`."""

    __test__ = False
    required = ("current_iteration", "interval")


class SaveCheckpointSuccessEventAttributes(StandardAttributes):
    """Attributes of the event `save_checkpoint_success`."""

    required = (
        "checkpoint_strategy",
        "current_iteration",
        "first_successful_save_checkpoint_timestamp_sec",
        "latest_successful_save_checkpoint_timestamp_sec",
        "save_checkpoint_success_count",
        "productive_train_iterations",
        "productive_train_samples",
        "productive_train_iterations_sec",
        "productive_validation_iterations_sec",
    )
    optional = (
        "productive_train_tflops",
        "checkpoint_size",
        "checkpoint_directory",
        "training_start_timestamp_sec",
    )


class SyncCheckpointMetricsUpdateAttributes(StandardAttributes):
    """Attributes of the event `sync_checkpoint_metrics_update`."""

    required = (
        "save_checkpoint_sync_time_total_sec",
        "save_checkpoint_sync_time_min_sec",
        "save_checkpoint_sync_time_max_sec",
    )


@dataclass(frozen=True)
class TracingTimestamp:
    """A point in time: seconds since 1970, and the value of the performance counter then."""

    seconds_since_epoch: float
    perf_counter_seconds: float

    @property
    def milliseconds_since_epoch(self) -> int:
        return int(self.seconds_since_epoch * 1000)

    @property
    def ns(self) -> int:
        """Nanoseconds since 1970."""
        return round(self.seconds_since_epoch * 1e9)

    @classmethod
    def now(cls) -> TracingTimestamp:
        """Return the present."""
        return cls(time.time(), time.perf_counter())

    @classmethod
    def for_timestamp(
        cls, timestamp_sec: float, perf_counter: float | None = None, validate_timestamp: bool = True
    ) -> TracingTimestamp:
        """Return a point in time, in seconds since 1970. Any is valid, also one of long ago."""
        if perf_counter is None:
            perf_counter = time.perf_counter() - (time.time() - timestamp_sec)
        return cls(timestamp_sec, perf_counter)


class TelemetryEvent:
    """Something that happens at a point in time. Create one with `Event.create`."""

    def __init__(self, name: str | Enum, timestamp: TracingTimestamp, attributes: Attributes | None = None) -> None:
        self.name = name
        self.timestamp = timestamp
        self.attributes = attributes if attributes is not None else Attributes()

    @property
    def name_str(self) -> str:
        """The name as text."""
        return str(getattr(self.name, "value", self.name))

    @classmethod
    def create(
        cls, name: str | Enum, attributes: Attributes | None = None, timestamp: TracingTimestamp | None = None
    ) -> TelemetryEvent:
        """Return an event of now, or of a given point in time."""
        return cls(name, timestamp or TracingTimestamp.now(), attributes)
