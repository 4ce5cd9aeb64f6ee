"""The list of runs below a directory, with the state of each."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.atomic_io import try_lock
from finetuning.errors import ConfigError, Location, parse_json
from finetuning.report.run_folder import RECORD_NAME, FinalLosses, JsonRecord, read_run_record
from finetuning.tracking.tracker import METRICS_LOG_NAME as METRICS_NAME

_LOCK_NAME = ".finetuning.lock"
_TAIL_BYTES = 64 * 1024
_SKIPPED_FOLDERS = ("checkpoint-", "telemetry", "mlruns", "artifacts", ".")


@dataclass(frozen=True)
class RunState:
    """One run. `state` is running, dead (killed without a word), completed, interrupted, stopped (by a guard), failed,
    or `on HOST` for one that runs, or did, on another machine. None where a value is not known."""

    folder: str
    state: str
    method: str | None
    model: str | None
    step: int | None
    steps: int | None
    loss: float | None
    """The mean over the steps since the log before."""
    validation_loss: float | None
    losses: dict[str, str]
    """The losses of a run that has ended, as they are printed at its end, by label."""
    tokens_per_s: float | None
    goodput: float | None
    started: str | None


def list_runs(folder: Path) -> list[RunState]:
    """The runs in and below a directory, the newest first.

    Raises:
        ConfigError: there is no such directory.
    """
    if not folder.is_dir():
        raise ConfigError("no such directory", location=Location(str(folder)))
    states = [state for path in find_records(folder) if (state := read_state(path.parent)) is not None]
    return sorted(states, key=lambda state: (state.started or "", state.folder), reverse=True)


def read_state(folder: Path) -> RunState | None:
    """How one run does; None where its record cannot be read, or is not one of a run."""
    record = read_run_record(folder)
    if record is None or "status" not in record:
        return None
    jobs = record.get("jobs") or [{}]
    last = _last_values(last_rows(folder))
    step = last.get("step")
    telemetry = record.get("telemetry") or {}
    return RunState(
        folder=str(folder),
        state=_state(folder, str(record["status"]), jobs[-1]),
        method=record.get("method"),
        model=(record.get("model") or {}).get("name"),
        step=int(step) if step is not None else None,
        steps=((record.get("plan") or {}).get("steps") or {}).get("total"),
        loss=last.get("loss"),
        validation_loss=last.get("eval_loss"),
        losses=dict(_losses(record).lines()),
        tokens_per_s=last.get("tokens_per_s"),
        goodput=(telemetry.get("session") or {}).get("goodput"),
        started=jobs[0].get("started"),
    )


def _losses(record: JsonRecord) -> FinalLosses:
    losses = record.get("losses")
    try:
        return FinalLosses(**losses) if isinstance(losses, dict) else FinalLosses()
    except TypeError:
        # Of another version.
        return FinalLosses()


def find_records(folder: Path) -> Iterator[Path]:
    """Yield the records in and below a directory. Links to directories are not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(_SKIPPED_FOLDERS))
        if RECORD_NAME in files:
            yield Path(parent) / RECORD_NAME


def _state(folder: Path, status: str, job: JsonRecord) -> str:
    if status == "stopped by a guard":
        return "stopped"
    if status != "running":
        return status
    if job.get("host") != platform.node():
        return f"on {job.get('host')}"
    return "running" if _is_alive(job.get("pid")) and _is_locked(folder / _LOCK_NAME) else "dead"


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, TypeError, ValueError, OverflowError):
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Whether a run holds its output directory: a process id alone may long belong to another process."""
    try:
        with path.open("rb") as lock:
            return try_lock(lock.fileno(), shared=True) is False
    except OSError:
        return False


def last_rows(folder: Path) -> list[JsonRecord]:
    """Return the newest rows of a run's `metrics.jsonl`, oldest first. An incomplete line is left out."""
    path = folder / METRICS_NAME
    try:
        with path.open("rb") as stream:
            stream.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            lines = stream.read().splitlines()
    except OSError:
        return []
    rows: list[JsonRecord] = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _last_values(rows: Iterable[JsonRecord]) -> dict[str, float]:
    """The newest value of each number."""
    values: dict[str, float] = {}
    for row in rows:
        values |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    return values
