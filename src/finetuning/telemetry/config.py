"""What a user of telemetry describes: the job, the training, and what a process has done so far."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import lru_cache
from typing import Any, Literal

from finetuning.config.redaction import is_secret_key, redact_values
from finetuning.distributed import ProcessTopology, read_topology
from finetuning.telemetry.error_guard import TelemetryUsageError

Strategy = Literal["sync", "async"]
ValueOr = Callable[[], Any]
"""A function that returns the value, for what is not known when the config is created."""
Attributes = Mapping[str, Any]
"""OpenTelemetry attributes: text, numbers, booleans and sequences of them. None is left out."""

AttributeValues = dict[str, Any]
"""Attributes that a function makes."""

TELEMETRY_VERSION = "1.0"
SUMMARY_SCHEMA = "1.0.0"
_POSITIVE = (
    "global_batch_size",
    "log_every_n_train_iterations",
    "micro_batch_size",
    "seq_length",
    "flops_per_sample",
    "flops_per_token",
    "peak_tflops",
)


def environment_topology(environ: Mapping[str, str] = os.environ) -> ProcessTopology:
    """Return rank and world size from the environment, each even where it does not fit the other.

    Raises:
        ConfigError: a variable is not an integer.
    """
    # A user may give one of the two and leave the other to the launcher.
    ranks = read_topology({**environ, "WORLD_SIZE": str(2**31)})
    return ProcessTopology(ranks.rank, ranks.local_rank, read_topology({**environ, "RANK": "0"}).world_size)


@dataclass(frozen=True)
class JobIdentity:
    """Identifies one process of a job. It is the first line of each file, and sent with all spans and events.

    Ranks and world size are by default those that the launcher has set in the environment.
    """

    application_name: str
    job_id: str
    session_tag: str
    rank: int = field(default_factory=lambda: environment_topology().rank)
    local_rank: int = field(default_factory=lambda: environment_topology().local_rank)
    world_size: int = field(default_factory=lambda: environment_topology().world_size)
    node_name: str = field(default_factory=socket.gethostname)
    is_baseline_run: bool = False
    custom_metadata: Attributes = field(default_factory=dict)
    is_enabled: bool = True
    """Whether this process records; otherwise it measures only."""
    version: str = TELEMETRY_VERSION
    summary_schema: str = SUMMARY_SCHEMA

    def resource_attributes(self) -> AttributeValues:
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

    def attributes(self) -> AttributeValues:
        """Return the attributes of the `one_logger_initialization` event."""
        return {
            "application_name": self.application_name,
            "world_size": self.world_size,
            "rank": self.rank,
            "node_name": self.node_name,
            "session_tag": self.session_tag,
            "is_baseline_run": self.is_baseline_run,
            "enable_for_current_rank": self.is_enabled,
            "one_logger_training_telemetry_version": self.version,
            "summary_data_schema_version": self.summary_schema,
            "custom_metadata": _metadata(self.custom_metadata),
        }


@dataclass(frozen=True)
class TrainingConfig:
    """What the metrics of a training need to know.

    A value may be a function without arguments, which `resolve` calls. A metric whose inputs are None is left out.
    `flops_per_sample` and `flops_per_token` count forward and backward pass; one of them is enough. `peak_tflops` is
    per device.

    Raises:
        TelemetryUsageError: a value is impossible.
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
    is_train_iterations_enabled: bool | ValueOr = True
    is_validation_iterations_enabled: bool | ValueOr = True
    is_test_iterations_enabled: bool | ValueOr = True
    is_save_checkpoint_enabled: bool | ValueOr = True
    is_log_throughput_enabled: bool | ValueOr = True
    custom_metadata: Attributes = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_values({name: value for name, value in self._values().items() if not callable(value)})

    def _values(self) -> AttributeValues:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def resolve(self, *, is_complete: bool = True) -> ResolvedTrainingConfig:
        """Return the config with every function replaced by its value.

        Args:
            is_complete: False if a function may still fail, or return None; its value then is not known yet.

        Raises:
            TelemetryUsageError: a value is impossible, or a function raises.
        """
        values: AttributeValues = {}
        for name, value in self._values().items():
            if callable(value):
                try:
                    value = value()
                except Exception as error:
                    if is_complete:
                        raise TelemetryUsageError(f"{name}: its function raised {error!r}") from error
                    value = None
                if value is None and name.startswith(("is_", "log_")):
                    continue
            values[name] = plain_value(value) if name != "custom_metadata" else value
        _check_values(values)
        return ResolvedTrainingConfig(**values)


def _check_values(values: Attributes) -> None:
    for name, value in values.items():
        number = plain_value(value)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if name in _POSITIVE and value is not None and not (is_number and number > 0):
            raise TelemetryUsageError(f"{name} must be a number above 0, but is {value!r}")
        if name.startswith("is_") and not isinstance(number, bool):
            raise TelemetryUsageError(f"{name} must be true or false, but is {value!r}")
    if (strategy := plain_value(values.get("save_checkpoint_strategy", "sync"))) not in ("sync", "async"):
        raise TelemetryUsageError(f"save_checkpoint_strategy must be 'sync' or 'async', but is {strategy!r}")


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
    custom_metadata: Attributes = field(default_factory=dict)

    def attributes(self) -> AttributeValues:
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


def attribute_values(attributes: Attributes | None) -> AttributeValues:
    """Return the attributes as OpenTelemetry takes them, without None and without secrets."""
    values = {str(plain_value(key)): plain_value(value) for key, value in (attributes or {}).items()}
    present = {key: value for key, value in values.items() if value is not None}
    # Looking for secrets takes much longer than the rest. In numbers there are none, unless the name says so.
    if all(type(value) in (int, float, bool) and not _is_secret_key(key) for key, value in present.items()):
        return present
    return redact_values(present)


_is_secret_key = lru_cache(4096)(is_secret_key)


def plain_value(value: Any) -> Any:
    """Return a value as text, number, boolean, or list of values of one of these types.

    Scalars of NumPy and torch become numbers. None stays None.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Enum):
        return plain_value(value.value)
    # Of a scalar it returns a number.
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    if isinstance(value, list | tuple | set | frozenset):
        return _plain_list([plain_value(item) for item in value])
    if isinstance(value, bool | int | float | str):
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    return str(value)


def _plain_list(values: list[Any]) -> Sequence[object]:
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        kind = float if kinds == {int, float} else str
        return [kind(value) for value in values]
    return [str(value) for value in values] if kinds & {list, type(None)} else values


def _metadata(values: Attributes) -> list[str] | None:
    """Return custom metadata in One Logger's form, `key:value`, without secrets; None if there is none."""
    return None if not values else [f"{key}:{value}" for key, value in redact_values(dict(values)).items()]
