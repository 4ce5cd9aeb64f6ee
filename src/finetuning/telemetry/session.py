"""Telemetry of one process, from the config.

`session_tag` and `perf_tag`: which jobs make one model, and which are as fast as each other ought to be."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.trace import SpanProcessor

from finetuning.config.sections import tracking as config
from finetuning.distributed import ProcessTopology
from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.error_guard import Clock, TelemetryErrors
from finetuning.telemetry.exporters import EventLines, JsonLines, OtlpLink, SpanLines
from finetuning.telemetry.metrics import ProgressFile
from finetuning.telemetry.names import SpanFilter, export_all_but, preset_filter
from finetuning.telemetry.spans import SpanRecorder
from finetuning.telemetry.telemetry import Telemetry

FOLDER = "telemetry"
SESSION_NAME = "session.json"

# What may differ between two runs that are as fast as each other.
_INCIDENTAL = {
    "output_dir",
    "logging_dir",
    "seed",
    "data_seed",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "lr_multiplier",
    "lr_batch_size_scaling",
    "weight_decay",
    "warmup_steps",
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "num_train_epochs",
    "max_steps",
    "beta",
    "label_smoothing",
    "report_to",
    "run_name",
    "tracking",
    "telemetry",
    "path",
    "tokenizer",
    "model",
    "resume_from_checkpoint",
    "final_checkpoint_name",
    "save_name_if_new_basemodel",
}


def new_job_id() -> str:
    """A name that no other job has, and that sorts by time."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}{nanoseconds:09}-{secrets.token_hex(4)}"


def session_tag(output_dir: Path, wanted: str | None, *, goes_on: bool, checkpoint: Path | None = None) -> str:
    """The tag of this job's session, kept in the output directory.

    A job that goes on keeps the tag of the checkpoint's directory, or of its own; any other gets a new one.

    Raises:
        OSError: it cannot be kept.
    """
    own = output_dir / FOLDER / SESSION_NAME
    tag = wanted
    if tag is None and goes_on:
        origins = [checkpoint.parent / FOLDER / SESSION_NAME] if checkpoint else []
        tag = next((kept for path in [*origins, own] if (kept := _read(path))), None)
    tag = tag or f"session-{new_job_id()}"
    own.parent.mkdir(parents=True, exist_ok=True)
    staging = own.with_name(f".{SESSION_NAME}.partial")
    staging.write_text(json.dumps({"session_tag": tag}) + "\n", encoding="utf-8")
    os.replace(staging, own)
    return tag


def _read(path: Path) -> str | None:
    try:
        tag = json.loads(path.read_text(encoding="utf-8"))["session_tag"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tag if isinstance(tag, str) else None


def perf_tag(config: Mapping[str, Any], model: str, versions: Mapping[str, str], device: str, world_size: int) -> str:
    """A digest of what moves the speed: the config but for paths, seeds and rates, the model's shape, the packages,
    the device, and the number of processes."""
    told = {
        "config": _without_incidentals(config),
        "model": _shape(model),
        "versions": dict(versions),
        "device": device,
        "world_size": world_size,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return f"perf-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_incidentals(item) for key, item in value.items() if key not in _INCIDENTAL}
    return [_without_incidentals(item) for item in value] if isinstance(value, list | tuple) else value


def _shape(model: str) -> Any:
    """What a model on disk is like, wherever it lies; a name from the hub as it is."""
    try:
        shape = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return model
    return {key: item for key, item in shape.items() if not key.startswith("_")} if isinstance(shape, dict) else model


@dataclass(frozen=True)
class TelemetryJob:
    """What all processes of a job have in common; the main one decides it and tells the others."""

    job_id: str
    session_tag: str
    traceparent: str | None = None


def is_switched_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OTEL_SDK_DISABLED switches OpenTelemetry off."""
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def begin_job(
    section: config.TelemetryConfig, output_dir: Path, *, goes_on: bool, checkpoint: Path | None
) -> TelemetryJob:
    """The job that the main process begins. Its session's tag is kept in the output directory, if that can be."""
    job_id = new_job_id()
    try:
        tag = session_tag(output_dir, section.session_tag, goes_on=goes_on, checkpoint=checkpoint)
    except OSError:
        # The files of this job lie in the same folder: that they cannot be written is told there.
        tag = section.session_tag or f"session-{job_id}"
    return TelemetryJob(job_id, tag, os.environ.get("TRACEPARENT"))


def writes_telemetry(section: config.TelemetryConfig, topology: ProcessTopology) -> bool:
    """Whether this process is one of those that write."""
    local = topology.local_rank == 0
    return section.ranks == "all" or topology.rank == 0 or (section.ranks == "local_zero" and local)


def start_telemetry(
    section: config.TelemetryConfig, job: TelemetryJob, output_dir: Path, topology: ProcessTopology
) -> Telemetry:
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
    if not writes_telemetry(section, topology):
        return open_telemetry(identity, None, exports)
    faults = TelemetryErrors()
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
    faults: TelemetryErrors | None = None,
    traceparent: str | None = None,
    clock: Clock | None = None,
) -> Telemetry:
    """Telemetry that writes `rank<R>.jsonl` in a folder, and to a link where there is one."""
    faults, clock = faults or TelemetryErrors(), clock or Clock()
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
    recorder = SpanRecorder(identity.resource(), processors, exports or export_all_but(), clock, traceparent)
    return Telemetry(recorder, identity, faults, progress, close_links)


def _nothing() -> Any:
    """There is no link to close."""
