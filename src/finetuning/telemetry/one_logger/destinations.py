"""Exporters of One Logger's API: where spans and events go."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.trace import SpanProcessor

from finetuning.config.redaction import redact_values
from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.error_guard import TelemetryErrors
from finetuning.telemetry.exporters import (
    BackgroundExport,
    JsonlEventProcessor,
    JsonlSpanProcessor,
    JsonlWriter,
    OtlpExport,
    Record,
    RecordWriter,
)
from finetuning.telemetry.metrics import ProgressFile
from finetuning.telemetry.one_logger.values import OneLoggerError

if TYPE_CHECKING:
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.trace.export import SpanExporter

    from finetuning.telemetry.spans import Clock


@dataclass
class Destination:
    """What an exporter adds to the recorder."""

    spans: SpanProcessor
    events: LogRecordProcessor | None
    progress: ProgressFile | None = None
    close: Callable[[], object] = lambda: None


class Exporter(ABC):
    """Where spans and events go. Subclasses are opened once, when the provider is configured."""

    @abstractmethod
    def open(self, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination:
        """Open the destination.

        Raises:
            OSError: it cannot be opened.
        """


class FileExporter(Exporter):
    """Writes JSON lines into a file. A process other than rank 0 adds its rank to the file's name.

    What an earlier job has written stays. A file whose name ends in `.progress` is for `session_goodput`.
    """

    def __init__(self, file_path: Path | str) -> None:
        self.file_path = Path(file_path)

    def open(self, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination:
        path = self.file_path
        if identity.rank:
            path = path.with_name(f"{path.stem}.rank{identity.rank}{path.suffix}")
        resource = redact_values(identity.resource_attributes())
        writer = JsonlWriter(path, errors, resource, clock.now_ns())
        progress = ProgressFile(writer.progress_path, clock.now_ns)
        return Destination(JsonlSpanProcessor(writer), JsonlEventProcessor(writer), progress)


class _LogWriter(RecordWriter):
    """Logs each record as a line of JSON."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, record: Record) -> None:
        self._logger.info("%s", json.dumps(record, separators=(",", ":"), default=str))

    def close(self) -> None:
        """Do nothing: the logger is the user's."""


class LoggerExporter(Exporter):
    """Writes JSON lines to a Python logger, at level INFO."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def open(self, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination:
        writer = _LogWriter(self._logger)
        writer.write({"type": "resource", "time_ns": clock.now_ns(), "attributes": identity.resource_attributes()})
        return Destination(JsonlSpanProcessor(writer), JsonlEventProcessor(writer))


class OtlpExporter(Exporter):
    """Sends spans and events to an OpenTelemetry collector, by OTLP over HTTP, in the background.

    Args:
        endpoint: URL of the collector; `/v1/traces` and `/v1/logs` are appended.
        timeout_s: timeout of a request, and how long closing waits, in seconds.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str] | None = None, timeout_s: float = 2.0) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise OneLoggerError(f"the endpoint must begin with http:// or https://, but is {endpoint!r}")
        self._endpoint = endpoint
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s

    def open(self, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination:
        export = OtlpExport(self._endpoint, self._headers, self._timeout_s, errors)
        return Destination(export.spans, export.events, close=export.close)


class OTelExporter(Exporter):
    """Sends spans by an exporter of the OpenTelemetry SDK, and events by its log exporter, in the background."""

    def __init__(
        self,
        otel_span_exporter: SpanExporter,
        otel_log_exporter: LogRecordExporter | None = None,
        timeout_s: float = 2.0,
    ) -> None:
        self._span_exporter = otel_span_exporter
        self._log_exporter = otel_log_exporter
        self._timeout_s = timeout_s

    def open(self, identity: JobIdentity, errors: TelemetryErrors, clock: Clock) -> Destination:
        export = BackgroundExport(self._span_exporter, self._log_exporter, self._timeout_s, errors)
        return Destination(export.spans, export.events, close=export.close)
