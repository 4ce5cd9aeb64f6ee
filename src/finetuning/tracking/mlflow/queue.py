"""The queue of an MLflow run: one JSON object per line, in the run's output directory.

    mlflow_queue.jsonl   records that the training process appends: run, params, tags, metrics, datasets, artifact, end
    mlflow_run.json      the upload state: the run's id and URL, the bytes uploaded, the last error

A record is one write, so a killed process leaves at most one incomplete line. Readers skip what is not JSON.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from finetuning.config.redaction import redact_values
from finetuning.errors import parse_json

logger = logging.getLogger(__name__)

# What the uploader opens. `resolve_tracking` refuses an address with a password.
_NEEDED_AS_IS = frozenset({"uri", "path", "to", "run_id", "parent_run_id", "key", "parent"})
QUEUE_NAME = "mlflow_queue.jsonl"
# Keys of the upload state in earlier versions, which called the queue `mlflow_spool.jsonl`.
_OLD_KEYS = {"records_sent": "offset", "files_left": "pending_files"}


@dataclass(frozen=True)
class QueuedRecord:
    """One line of the queue. `end` is the offset of the byte after it."""

    kind: str
    fields: dict[str, Any]
    end: int


class Queue:
    """Appends records to a queue file: one JSON dump and one write each, which never waits and never raises.

    The first write that fails, as on a full disk, is logged and kept in `error`; later records are dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.error: str | None = None
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        if os.fstat(self._file).st_size:
            os.write(self._file, b"\n")  # a killed process may have left an incomplete line

    def append(self, kind: str, **values: object) -> None:
        """Append a record, stamped with the time in milliseconds."""
        if self.error:
            return
        redacted = {key: value if key in _NEEDED_AS_IS else redact_values(value) for key, value in values.items()}
        record = {"kind": kind, "time": time.time_ns() // 1_000_000, **redacted}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            self.error = "No space left on device" if os.write(self._file, line) < len(line) else None
        except OSError as error:
            self.error = error.strerror or str(error)
        if self.error:
            logger.warning("MLflow: cannot write %s: %s. Training continues untracked.", self.path, self.error)


def numbers_in(values: Mapping[str, object]) -> dict[str, float | str]:
    """Return the numbers among the values; those that JSON lacks as "NaN", "Infinity" and "-Infinity"."""
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    return {key: value if math.isfinite(value) else json.dumps(value) for key, value in numbers.items()}


@dataclass
class UploadState:
    """How much of a queue has been uploaded: its first `offset` bytes, except for the pending files."""

    run_id: str | None = None
    run_name: str | None = None
    url: str | None = None
    offset: int = 0
    pending_files: list[dict[str, str]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def read(cls, queue: Path) -> UploadState:
        """Return the saved state of this queue; an empty one if there is none."""
        values: dict[str, Any] = {}
        with suppress(OSError, ValueError, AttributeError):
            saved: dict[str, Any] = parse_json(state_path(queue).read_text(encoding="utf-8"))
            values = {_OLD_KEYS.get(key, key): value for key, value in saved.items()}
        state = cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
        if "files_sent" in values and queue.exists():
            records = read_records(queue, values["files_sent"])
            state.pending_files += [r.fields for r in records if r.kind == "artifact" and r.end <= state.offset]
        return state

    def write_error(self, queue: Path, error: Exception) -> None:
        self.error = (" ".join(str(error).split()) or type(error).__name__)[:500]
        self.write(queue)

    def write(self, queue: Path) -> None:
        del self.rejected[100:]
        staging = state_path(queue).with_suffix(".partial")
        values = asdict(self) | {"rejected": redact_values(self.rejected), "error": redact_values(self.error)}
        staging.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        staging.replace(state_path(queue))


def read_records(queue: Path, start: int = 0) -> Iterator[QueuedRecord]:
    """Yield the complete lines from byte `start` on."""
    with queue.open("rb") as stream:
        end = stream.seek(start)
        for line in stream:
            end += len(line)
            try:
                values = parse_json(line)
                if "do" in values:  # written by an earlier version
                    values |= {"kind": values.pop("do"), "parent": values.pop("umbrella", None)}
                yield QueuedRecord(values.pop("kind"), values, end)
            except (ValueError, TypeError, AttributeError, KeyError):  # incomplete, or not a JSON object of ours
                continue


def latest_run(queue: Path) -> tuple[QueuedRecord | None, bool]:
    """Return the newest `run` record, None if there is none, and whether an `end` record follows it."""
    records = [r for r in read_records(queue) if r.kind in ("run", "end")] if queue.exists() else []
    run = next((record for record in reversed(records) if record.kind == "run"), None)
    return run, bool(records) and records[-1].kind == "end"


def state_path(queue: Path) -> Path:
    """Return the path of the upload state of this queue."""
    return queue.with_name(queue.name.replace("queue", "run").replace(".jsonl", ".json"))


def list_queues(folder: Path) -> list[Path]:
    """Return the queues in a run's folder, the current one last; those of earlier versions are renamed."""
    for path in folder.glob("mlflow_spool*.jsonl"):
        if not (renamed := path.with_name(path.name.replace("spool", "queue"))).exists():  # old name
            path.rename(renamed)
    return sorted(folder.glob("mlflow_queue*.jsonl"))


def rotate(folder: Path) -> None:
    """Rename the folder's current queue and its upload state, for a run of their own."""
    rotation = f".{time.time_ns()}."
    for path in (state_path(folder / QUEUE_NAME), folder / QUEUE_NAME):
        if path.exists():
            path.rename(path.with_name(path.name.replace(".", rotation, 1)))
