"""What a user of telemetry describes: the job, the training, and what a process has done so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from finetuning.config.redaction import redact_values

Strategy = Literal["sync", "async"]
ValueOr = Callable[[], Any]
"""A function that returns the value, for what is not known when the config is created."""
Attributes = Mapping[str, Any]
"""OpenTelemetry attributes: text, numbers, booleans and sequences of them. None is left out."""

TELEMETRY_VERSION = "1.0"
SUMMARY_SCHEMA = "1.0.0"


@dataclass(frozen=True)
class JobIdentity:
    """Identifies one process of a job. It is the first line of each file, and sent with all spans and events."""

    application_name: str
    job_id: str
    session_tag: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    node_name: str = ""
    is_baseline_run: bool = False
    custom_metadata: Mapping[str, str] = field(default_factory=dict)

    def resource_attributes(self) -> dict[str, Any]:
        """Return the attributes of the OpenTelemetry resource."""
        return {
            "service.name": self.application_name,
            "job_id": self.job_id,
            "session_tag": self.session_tag,
            "rank": self.rank,
            "local_rank": self.local_rank,
            "world_size": self.world_size,
            "node_name": self.node_name,
        }

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the `one_logger_initialization` event."""
        return {
            "application_name": self.application_name,
            "world_size": self.world_size,
            "rank": self.rank,
            "node_name": self.node_name,
            "session_tag": self.session_tag,
            "is_baseline_run": self.is_baseline_run,
            "enable_for_current_rank": True,
            "one_logger_training_telemetry_version": TELEMETRY_VERSION,
            "summary_data_schema_version": SUMMARY_SCHEMA,
            "custom_metadata": _metadata(self.custom_metadata),
        }


@dataclass(frozen=True)
class TrainingConfig:
    """What the metrics of a training need to know.

    A value may be a function without arguments, which `resolve` calls. A metric whose inputs are None is left out.
    `flops_per_sample` and `flops_per_token` count forward and backward pass; one of them is enough. `peak_tflops` is
    per device.
    """

    perf_tag: str | Sequence[str] | ValueOr | None = None
    global_batch_size: int | ValueOr | None = None
    log_every_n_train_iterations: int | ValueOr = 50
    micro_batch_size: int | ValueOr | None = None
    seq_length: int | ValueOr | None = None
    flops_per_sample: float | ValueOr | None = None
    flops_per_token: float | ValueOr | None = None
    peak_tflops: float | ValueOr | None = None
    train_iterations_target: int | ValueOr | None = None
    train_samples_target: int | ValueOr | None = None
    save_checkpoint_strategy: Strategy = "sync"
    is_train_iterations_enabled: bool = True
    is_validation_iterations_enabled: bool = True
    is_test_iterations_enabled: bool = True
    is_save_checkpoint_enabled: bool = True
    is_log_throughput_enabled: bool = True
    custom_metadata: Mapping[str, str] = field(default_factory=dict)

    def resolve(self) -> ResolvedTrainingConfig:
        """Return the config with every function replaced by its value.

        Raises:
            ValueError: a number that must be positive is not.
        """
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        values |= {name: value() for name, value in values.items() if callable(value)}
        for name in ("global_batch_size", "log_every_n_train_iterations", "flops_per_sample", "flops_per_token"):
            value = values[name]
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, but is {value}")
        return ResolvedTrainingConfig(**values)


@dataclass(frozen=True)
class ResolvedTrainingConfig:
    """A `TrainingConfig` with plain values."""

    perf_tag: str | Sequence[str] | None = None
    global_batch_size: int | None = None
    log_every_n_train_iterations: int = 50
    micro_batch_size: int | None = None
    seq_length: int | None = None
    flops_per_sample: float | None = None
    flops_per_token: float | None = None
    peak_tflops: float | None = None
    train_iterations_target: int | None = None
    train_samples_target: int | None = None
    save_checkpoint_strategy: Strategy = "sync"
    is_train_iterations_enabled: bool = True
    is_validation_iterations_enabled: bool = True
    is_test_iterations_enabled: bool = True
    is_save_checkpoint_enabled: bool = True
    is_log_throughput_enabled: bool = True
    custom_metadata: Mapping[str, str] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the `update_training_telemetry_config` event."""
        attributes = {item.name: getattr(self, item.name) for item in fields(self)}
        attributes["checkpoint_strategy"] = attributes.pop("save_checkpoint_strategy")
        attributes["custom_metadata"] = _metadata(self.custom_metadata)
        return attributes


@dataclass(frozen=True)
class ProcessTotals:
    """What this process has done since the job began; None for what is not known.

    `memory` maps attribute names to bytes.
    """

    tokens: float | None = None
    flops: float | None = None
    loss: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)


def _metadata(values: Mapping[str, str]) -> list[str]:
    """Return custom metadata in One Logger's form, `key:value`, without secrets."""
    return [f"{key}:{value}" for key, value in redact_values(values).items()]
