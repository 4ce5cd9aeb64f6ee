"""`session_tag` and `perf_tag`: which jobs make one model, and which are as fast as each other ought to be."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
