"""What telemetry is told about a job and its training, at once or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Strategy = Literal["sync", "async"]
ValueOr = Callable[[], Any]

TELEMETRY_VERSION = "1.0"
SUMMARY_SCHEMA = "1.0.0"


@dataclass(frozen=True)
class JobIdentity:
    """Who records: written into every file's first line and sent with everything."""

    application_name: str
    job_id: str
    session_tag: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    node_name: str = ""
    is_baseline_run: bool = False
    custom_metadata: Mapping[str, str] = field(default_factory=dict)

    def resource(self) -> dict[str, Any]:
        """Resource attributes."""
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
        """Attributes of `one_logger_initialization`."""
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
            "custom_metadata": metadata(self.custom_metadata),
        }


@dataclass(frozen=True)
class TrainingConfig:
    """What the metrics of a training need to know. Each value may be a function without arguments, asked when the
    config is handed over; what is not known stays None, and what would need it is left out.

    `flops_per_sample` and `flops_per_token` count forward and backward; one of them is enough. `peak_tflops` is that
    of one device.
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

    def resolved(self) -> TrainingConfig:
        """The config with its functions asked.

        Raises:
            ValueError: a number that must be above zero is not.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        asked = replace(self, **{name: value() for name, value in values.items() if callable(value)})
        for name in ("global_batch_size", "log_every_n_train_iterations", "flops_per_sample", "flops_per_token"):
            value = getattr(asked, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        return asked

    def attributes(self) -> dict[str, Any]:
        """Attributes of `update_training_telemetry_config`; of a resolved config."""
        told = {item.name: getattr(self, item.name) for item in fields(self)}
        told["checkpoint_strategy"] = told.pop("save_checkpoint_strategy")
        told["custom_metadata"] = metadata(self.custom_metadata)
        return told


def metadata(values: Mapping[str, str]) -> list[str]:
    """One Logger's form of custom metadata: `key:value`."""
    return [f"{key}:{value}" for key, value in values.items()]


@dataclass(frozen=True)
class MeasuredConfig:
    """What this process has done since the job began, as far as it is known; memory in bytes by attribute name."""

    tokens: float | None = None
    flops: float | None = None
    loss: float | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
