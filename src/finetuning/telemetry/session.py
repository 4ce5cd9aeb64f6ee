"""Opens the telemetry of one process, by hand or from the engine's config, and computes its tags.

`session_tag` identifies the jobs that train one model; `perf_tag` identifies jobs that should be equally fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.trace import SpanProcessor

from finetuning.config.redaction import redact_values
from finetuning.errors import parse_json
from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.error_guard import TelemetryErrors
from finetuning.telemetry.exporters import JsonlEventProcessor, JsonlSpanProcessor, JsonlWriter, OtlpExport
from finetuning.telemetry.metrics import ProgressFile
from finetuning.telemetry.spans import Clock, SpanFilter, SpanRecorder, export_all_but, preset_filter
from finetuning.telemetry.telemetry import Telemetry

if TYPE_CHECKING:
    from finetuning.config.sections.tracking import TelemetryConfig
    from finetuning.distributed import ProcessTopology

FOLDER = "telemetry"
SESSION_NAME = "session.json"

# Config keys that do not change the time of a step.
_SPEED_NEUTRAL_KEYS = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "beta",
        "center_rewards_coefficient",
        "cpo_alpha",
        "data_seed",
        "desirable_weight",
        "final_checkpoint_name",
        "greater_is_better",
        "label_smoothing",
        "label_smoothing_factor",
        "learning_rate",
        "load_best_model_at_end",
        "loss_weights",
        "lr_batch_size_scaling",
        "lr_multiplier",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_steps",
        "max_time",
        "metric_for_best_model",
        "model",
        "num_train_epochs",
        "output_dir",
        "path",
        "per_device_eval_batch_size",
        "report_to",
        "resume_from_checkpoint",
        "run_name",
        "seed",
        "simpo_gamma",
        "telemetry",
        "tokenizer",
        "tracking",
        "undesirable_weight",
        "validation_data",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
    }
)
_SPEED_NEUTRAL_PREFIXES = ("eval_", "hub_", "logging_", "push_to_hub", "save_")


def new_job_id() -> str:
    """Return a unique id that sorts by time."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}{nanoseconds:09}-{secrets.token_hex(4)}"


def session_tag(output_dir: Path, requested: str | None, *, resumed: bool, checkpoint: Path | None = None) -> str:
    """Return the tag of this job's session, and store it in the output directory.

    A resumed job keeps the tag of its checkpoint's output directory, or of its own. Any other job gets a new one.

    Args:
        requested: the tag that the user has set; it wins.

    Raises:
        OSError: the tag cannot be stored.
    """
    path = output_dir / FOLDER / SESSION_NAME
    tag = requested
    if tag is None and resumed:
        origins = [checkpoint.parent / FOLDER / SESSION_NAME] if checkpoint else []
        tag = next((stored for origin in [*origins, path] if (stored := _read_session_tag(origin))), None)
    tag = tag or f"session-{new_job_id()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{SESSION_NAME}.partial")
    staging.write_text(json.dumps({"session_tag": tag}) + "\n", encoding="utf-8")
    os.replace(staging, path)
    return tag


def _read_session_tag(path: Path) -> str | None:
    try:
        tag = parse_json(path.read_text(encoding="utf-8"))["session_tag"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tag if isinstance(tag, str) else None


def perf_tag(
    config: Mapping[str, Any],
    model: str,
    versions: Mapping[str, str],
    device: str,
    world_size: int,
    tokens_per_row: float | None = None,
) -> str:
    """Return a digest of what determines how long a step takes.

    That is the config without `_SPEED_NEUTRAL_KEYS`, the model's shape, the package versions, the device, the number of
    processes, and the mean length of the training rows. The length is rounded to a fourth of a power of two, so that
    another random split of the same rows has the same tag.
    """
    inputs = {
        "config": _without_neutral_keys(config),
        "model": _model_shape(model),
        "versions": dict(versions),
        "device": device,
        "world_size": world_size,
        "row_length": round(4 * math.log2(tokens_per_row)) if tokens_per_row else None,
    }
    text = json.dumps(inputs, sort_keys=True, default=str)
    return f"perf-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _without_neutral_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_neutral_keys(item) for key, item in value.items() if not _is_neutral(str(key))}
    return [_without_neutral_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _is_neutral(key: str) -> bool:
    return key in _SPEED_NEUTRAL_KEYS or key.startswith(_SPEED_NEUTRAL_PREFIXES)


def _model_shape(model: str) -> str | dict[str, Any]:
    """Return the config of a model on disk, independent of its path; the name of a model on the hub."""
    try:
        shape = parse_json((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return model
    return {key: item for key, item in shape.items() if not key.startswith("_")} if isinstance(shape, dict) else model


@dataclass(frozen=True)
class TelemetryJob:
    """What all processes of a job share. The main process creates it and broadcasts it."""

    job_id: str
    session_tag: str
    traceparent: str | None = None


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment variable OTEL_SDK_DISABLED disables OpenTelemetry."""
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def begin_job(section: TelemetryConfig, output_dir: Path, *, resumed: bool, checkpoint: Path | None) -> TelemetryJob:
    """Create the job on the main process. The session's tag is stored in the output directory if possible."""
    job_id = new_job_id()
    try:
        tag = session_tag(output_dir, section.session_tag, resumed=resumed, checkpoint=checkpoint)
    except OSError:
        # Opening this job's file in the same folder fails as well, and reports it.
        tag = section.session_tag or f"session-{job_id}"
    return TelemetryJob(job_id, tag, os.environ.get("TRACEPARENT"))


def writes_telemetry(section: TelemetryConfig, topology: ProcessTopology) -> bool:
    """Return whether `telemetry.ranks` includes this process."""
    is_local_zero = topology.local_rank == 0
    return section.ranks == "all" or topology.rank == 0 or (section.ranks == "local_zero" and is_local_zero)


def start_telemetry(
    section: TelemetryConfig, job: TelemetryJob, output_dir: Path, topology: ProcessTopology
) -> Telemetry:
    """Open the telemetry of this process as the config describes it. If nothing can be written it still measures.

    Raises:
        MissingPackageError: OTLP is configured, and its package is not installed.
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
    span_filter = preset_filter(section.spans, section.include_spans, section.exclude_spans)
    if not writes_telemetry(section, topology):
        return open_telemetry(identity, None, span_filter)
    errors = TelemetryErrors()
    otlp = None
    if section.otlp is not None:
        headers = {name: value.get_secret_value() for name, value in section.otlp.headers.items()}
        otlp = OtlpExport(section.otlp.endpoint, headers, section.otlp.timeout_s, errors)
    return open_telemetry(
        identity,
        output_dir / FOLDER / job.job_id,
        span_filter,
        otlp=otlp,
        errors=errors,
        traceparent=job.traceparent,
    )


def open_telemetry(
    identity: JobIdentity,
    folder: Path | None,
    span_filter: SpanFilter | None = None,
    *,
    otlp: OtlpExport | None = None,
    errors: TelemetryErrors | None = None,
    traceparent: str | None = None,
    clock: Clock | None = None,
) -> Telemetry:
    """Return telemetry that writes `rank<R>.jsonl` into a folder, and to an OTLP collector if there is one.

    Args:
        folder: None to write no file.
        span_filter: which spans are exported; by default all except those of each step.
        traceparent: the W3C trace context of the span that started this process.
    """
    errors, clock = errors or TelemetryErrors(), clock or Clock()
    processors: list[tuple[SpanProcessor, LogRecordProcessor | None]] = []
    resource = redact_values(identity.resource_attributes())
    progress = None
    if folder is not None:
        try:
            writer = JsonlWriter(folder / f"rank{identity.rank}.jsonl", errors, resource, clock.now_ns())
            processors.append((JsonlSpanProcessor(writer), JsonlEventProcessor(writer)))
            progress = ProgressFile(writer.progress_path, clock.now_ns)
        except OSError as error:
            errors.record(f"opening {folder}", error)
    if otlp is not None:
        processors.append((otlp.spans, otlp.events))
    recorder = SpanRecorder(resource, processors, span_filter or export_all_but(), clock, traceparent)
    if otlp is None:
        return Telemetry(recorder, identity, errors, progress)
    return Telemetry(recorder, identity, errors, progress, otlp.close)
