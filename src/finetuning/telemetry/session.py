"""Telemetry of one process, from the config."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.trace import SpanProcessor

from finetuning.config.sections import tracking as config
from finetuning.distributed import Topology
from finetuning.telemetry.clock import Clock
from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.error_guard import Faults
from finetuning.telemetry.exporters import EventLines, JsonLines, SpanLines
from finetuning.telemetry.meters import ProgressFile
from finetuning.telemetry.names import SpanFilter, export_all_but, preset_filter
from finetuning.telemetry.otlp import OtlpLink
from finetuning.telemetry.spans import Recorder
from finetuning.telemetry.tags import FOLDER, new_job_id, session_tag
from finetuning.telemetry.telemetry import Telemetry


@dataclass(frozen=True)
class Job:
    """What all processes of a job have in common; the main one decides it and tells the others."""

    job_id: str
    session_tag: str
    traceparent: str | None = None


def is_switched_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OTEL_SDK_DISABLED switches OpenTelemetry off."""
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def begin_job(section: config.Telemetry, output_dir: Path, *, goes_on: bool, checkpoint: Path | None) -> Job:
    """The job that the main process begins. Its session's tag is kept in the output directory, if that can be."""
    job_id = new_job_id()
    try:
        tag = session_tag(output_dir, section.session_tag, goes_on=goes_on, checkpoint=checkpoint)
    except OSError:
        # The files of this job lie in the same folder: that they cannot be written is told there.
        tag = section.session_tag or f"session-{job_id}"
    return Job(job_id, tag, os.environ.get("TRACEPARENT"))


def writes(section: config.Telemetry, topology: Topology) -> bool:
    """Whether this process is one of those that write."""
    local = topology.local_rank == 0
    return section.ranks == "all" or topology.rank == 0 or (section.ranks == "local_zero" and local)


def start_telemetry(section: config.Telemetry, job: Job, output_dir: Path, topology: Topology) -> Telemetry:
    """Telemetry of this process as the config has it. Where nothing can be written it counts all the same.

    Raises:
        MissingPackageError: OTLP is asked for, and its package is not installed.
    """
    identity = JobIdentity(
        section.application_name,
        job.job_id,
        job.session_tag,
        topology.rank,
        topology.local_rank,
        topology.world_size,
        socket.gethostname(),
        section.is_baseline_run,
        section.custom_metadata,
    )
    exports = preset_filter(section.spans, section.include_spans, section.exclude_spans)
    if not writes(section, topology):
        return open_telemetry(identity, None, exports)
    faults = Faults()
    link = None
    if section.otlp is not None:
        headers = {name: value.get_secret_value() for name, value in section.otlp.headers.items()}
        link = OtlpLink(section.otlp.endpoint, headers, section.otlp.timeout_s, faults)
    return open_telemetry(
        identity, output_dir / FOLDER / job.job_id, exports, link=link, faults=faults, traceparent=job.traceparent
    )


def open_telemetry(
    identity: JobIdentity,
    folder: Path | None,
    exports: SpanFilter | None = None,
    *,
    link: OtlpLink | None = None,
    faults: Faults | None = None,
    traceparent: str | None = None,
    clock: Clock | None = None,
) -> Telemetry:
    """Telemetry that writes `rank<R>.jsonl` in a folder, and to a link where there is one."""
    faults, clock = faults or Faults(), clock or Clock()
    processors: list[tuple[SpanProcessor, LogRecordProcessor]] = []
    progress = None
    if folder is not None:
        try:
            lines = JsonLines(folder / f"rank{identity.rank}.jsonl", faults, identity.resource(), clock.now_ns())
            processors.append((SpanLines(lines), EventLines(lines)))
            progress = ProgressFile(folder / f"rank{identity.rank}.progress")
        except OSError as error:
            faults.note(f"opening {folder}", error)
    close_links = _nothing
    if link is not None:
        processors.append((link.spans, link.events))
        close_links = link.close
    recorder = Recorder(identity.resource(), processors, exports or export_all_but(), clock, traceparent)
    return Telemetry(recorder, identity, faults, progress, close_links)


def _nothing() -> Any:
    """There is no link to close."""
