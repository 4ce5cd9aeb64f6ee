"""The provider of One Logger's API: configured once per process, and found from everywhere in it."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar, Self

from finetuning.telemetry.config import Attributes, JobIdentity, environment_topology
from finetuning.telemetry.error_guard import TelemetryErrors
from finetuning.telemetry.metrics import ProgressFile
from finetuning.telemetry.one_logger.destinations import Destination, Exporter
from finetuning.telemetry.one_logger.job_settings import (
    OneLoggerConfig,
    TrainingTelemetryConfig,
    evaluate_or,
)
from finetuning.telemetry.one_logger.training_recorder import TrainingRecorder, plain_name
from finetuning.telemetry.one_logger.values import OneLoggerError
from finetuning.telemetry.one_logger.vocabulary import (
    ExportCustomizationMode,
    OneLoggerErrorHandlingStrategy,
    StandardTrainingJobSpanName,
)
from finetuning.telemetry.spans import Clock, SpanFilter, SpanRecorder, export_all, export_all_but, export_only
from finetuning.telemetry.telemetry import Telemetry

DEFAULT_SPANS_EXPORT_BLACKLIST: list[StandardTrainingJobSpanName] = [
    StandardTrainingJobSpanName.TRAINING_SINGLE_ITERATION,
    StandardTrainingJobSpanName.VALIDATION_SINGLE_ITERATION,
    StandardTrainingJobSpanName.TESTING_SINGLE_ITERATION,
    StandardTrainingJobSpanName.DATA_LOADING,
    StandardTrainingJobSpanName.MODEL_FORWARD,
    StandardTrainingJobSpanName.ZERO_GRAD,
    StandardTrainingJobSpanName.MODEL_BACKWARD,
    StandardTrainingJobSpanName.OPTIMIZER_UPDATE,
]
"""Spans that occur in each step. They are not exported by default."""


class TrainingTelemetryProvider:
    """Holds the telemetry of this process. Get it with `TrainingTelemetryProvider.instance()`."""

    _instance: ClassVar[TrainingTelemetryProvider | None] = None

    def __init__(self) -> None:
        self._base_config: OneLoggerConfig | None = None
        self._overrides: dict[str, Any] = {}
        self._exporters: list[Exporter] = []
        self._filter: SpanFilter | None = None
        self._config: OneLoggerConfig | None = None
        self._recorder: TrainingRecorder | None = None
        self._is_disabled = False

    @classmethod
    def instance(cls) -> Self:
        """Return the provider of this process."""
        if not isinstance(cls._instance, cls):
            cls._instance = cls()
        return cls._instance

    @classmethod
    def reset(cls) -> None:
        """Close the telemetry of this process, so that a new one can be configured, as in tests or notebooks."""
        provider, cls._instance = cls._instance, None
        if provider is not None and provider._recorder is not None:
            provider._recorder.close()

    # Configuration

    def with_base_config(self, one_logger_config: OneLoggerConfig) -> Self:
        """Set the config of the job."""
        self._require_unconfigured("with_base_config")
        if self._base_config is not None:
            raise OneLoggerError("with_base_config may be called once only")
        self._base_config = one_logger_config
        return self

    def with_config_override(self, partial_config: Attributes) -> Self:
        """Set single fields of the config; those of `telemetry_config` one by one."""
        self._require_unconfigured("with_config_override")
        nested = dict(self._overrides.get("telemetry_config", {}))
        nested |= partial_config.get("telemetry_config") or {}
        self._overrides |= partial_config
        if nested:
            self._overrides["telemetry_config"] = nested
        return self

    def with_exporter(self, exporter: Exporter) -> Self:
        """Add a destination for spans and events."""
        self._require_unconfigured("with_exporter")
        if not isinstance(exporter, Exporter):
            raise OneLoggerError(f"{type(exporter).__name__} is not an exporter of this package")
        self._exporters.append(exporter)
        return self

    def with_export_customization(
        self, export_customization_mode: ExportCustomizationMode, span_name_filter: Sequence[str | Enum] | None = None
    ) -> Self:
        """Set which spans are exported. The application span always is.

        Raises:
            OneLoggerError: the mode and the names do not fit, or a name differs from that of a standard span by a
                typing error.
        """
        self._require_unconfigured("with_export_customization")
        if self._filter is not None:
            raise OneLoggerError("with_export_customization may be called once only")
        is_all = export_customization_mode == ExportCustomizationMode.EXPORT_ALL_SPANS
        if is_all and span_name_filter is not None:
            raise OneLoggerError("with EXPORT_ALL_SPANS there must be no span_name_filter")
        if not is_all and not span_name_filter:
            raise OneLoggerError(f"{export_customization_mode.name} needs a span_name_filter")
        span_names = span_name_filter if isinstance(span_name_filter, str) else map(plain_name, span_name_filter or ())
        if is_all:
            self._filter = export_all()
        elif export_customization_mode == ExportCustomizationMode.WHITELIST_SPANS:
            self._filter = export_only(span_names)
        else:
            self._filter = export_all_but(span_names)
        return self

    def configure_provider(self) -> None:
        """Open the exporters. From now on spans can be recorded.

        Raises:
            OneLoggerError: the provider is configured already, or has no valid config.
        """
        self._require_unconfigured("configure_provider")
        self._config = config = self._build_config()
        identity = _identity(config)
        errors, clock = TelemetryErrors(), Clock()
        exporters = self._exporters if config.enable_for_current_rank else []
        opened = [
            destination
            for exporter in exporters
            if (destination := _open(exporter, identity, errors, clock)) is not None
        ]
        recorder = SpanRecorder(
            identity.resource_attributes(),
            [(destination.spans, destination.events) for destination in opened],
            self._filter or export_all_but(),
            clock,
        )
        progress: list[ProgressFile] = [item.progress for item in opened if item.progress is not None]

        def close() -> None:
            for destination in opened:
                destination.close()
            for file in progress[1:]:
                file.close()

        telemetry = Telemetry(recorder, identity, errors, progress[0] if progress else None, close)
        self._recorder = TrainingRecorder(telemetry)
        if config.telemetry_config is not None:
            telemetry.set_training_config(config.telemetry_config.training_config())

    def set_training_telemetry_config(self, training_telemetry_config: TrainingTelemetryConfig) -> None:
        """Set what the metrics need to know, after the application has started and before training does."""
        config = self.config
        if config.telemetry_config is not None:
            raise OneLoggerError("the training telemetry config has been set already")
        self._config = config.model_copy(update={"telemetry_config": training_telemetry_config})
        self.telemetry.set_training_config(training_telemetry_config.training_config())

    def prepare_training(self) -> None:
        """Ask for what had to wait until training starts.

        Raises:
            OneLoggerError: there is no training telemetry config, or a function in the configs raises.
        """
        config, telemetry = self.config, self.telemetry
        if config.telemetry_config is None:
            raise OneLoggerError(
                "set the training telemetry config before training starts: "
                "TrainingTelemetryProvider.instance().set_training_telemetry_config(...)"
            )
        world_size = config.telemetry_config.world_size_or_fn
        world_size = config.world_size_or_fn if world_size is None else world_size
        evaluated = int(evaluate_or(world_size, "world_size_or_fn"))
        if evaluated != telemetry.identity.world_size:
            telemetry.set_identity(replace(telemetry.identity, world_size=evaluated))

    # State

    @property
    def config(self) -> OneLoggerConfig:
        """The config of the job."""
        if self._config is None:
            raise OneLoggerError("call configure_provider first")
        return self._config

    @property
    def recorder(self) -> TrainingRecorder:
        """The recorder of spans and events."""
        if self._recorder is None:
            raise OneLoggerError("call TrainingTelemetryProvider.instance()...configure_provider() first")
        return self._recorder

    @property
    def telemetry(self) -> Telemetry:
        """The telemetry below One Logger's API: metrics, measuring with a function of yours, errors."""
        return self.recorder.telemetry

    @property
    def one_logger_ready(self) -> bool:
        """Whether the provider is configured."""
        return self._recorder is not None

    @property
    def one_logger_enabled(self) -> bool:
        """Whether this process records."""
        return self._recorder is not None and self.config.enable_for_current_rank and not self._is_disabled

    @property
    def is_quiet(self) -> bool:
        """Whether wrong use is recorded instead of raised."""
        strategy = self._config.error_handling_strategy if self._config else None
        return strategy == OneLoggerErrorHandlingStrategy.DISABLE_QUIETLY_AND_REPORT_METRIC_ERROR

    def force_disable_logging(self) -> None:
        """Export nothing more."""
        self._is_disabled = True
        self.telemetry.recorder.stop_exporting()

    def _require_unconfigured(self, method: str) -> None:
        if self._recorder is not None:
            raise OneLoggerError(f"{method} must be called before configure_provider, which is called once")

    def _build_config(self) -> OneLoggerConfig:
        if self._base_config is None and not self._overrides:
            raise OneLoggerError("there is no config: call with_base_config")
        if not self._overrides:
            assert self._base_config is not None
            return self._base_config
        values = dict(self._base_config or {})
        training = dict(values.get("telemetry_config") or {}) | self._overrides.get("telemetry_config", {})
        values |= self._overrides
        if training:
            values["telemetry_config"] = TrainingTelemetryConfig(**training)
        return OneLoggerConfig(**values)


OneLoggerProvider = TrainingTelemetryProvider
"""One Logger has a second provider for applications that do not train; here one is enough."""


def _identity(config: OneLoggerConfig) -> JobIdentity:
    topology = environment_topology()
    # A process group may not exist yet. It is asked for again when training starts.
    world_size = evaluate_or(config.world_size_or_fn, "world_size_or_fn", lambda: topology.world_size)
    return JobIdentity(
        config.application_name,
        f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}",
        str(evaluate_or(config.session_tag_or_fn, "session_tag_or_fn")),
        topology.rank,
        topology.local_rank,
        int(world_size),
        socket.gethostname(),
        bool(evaluate_or(config.is_baseline_run_or_fn, "is_baseline_run_or_fn")),
        config.custom_metadata or {},
        is_enabled=config.enable_for_current_rank,
        summary_schema=config.summary_data_schema_version,
    )


def _open(exporter: Exporter, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination | None:
    return errors.attempt(f"opening {type(exporter).__name__}", lambda: exporter.open(identity, errors, clock))
