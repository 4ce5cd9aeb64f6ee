"""The spool: everything that a tracker is to be told, one JSON object a line, kept beside the run.

The training process alone appends; the worker (or a later `sync`) alone reads, and alone writes the delivery, a small
file that says how much of the spool has arrived. Both live in the output directory:

    mlflow_spool.jsonl   orders: run, params, tags, metrics, artifact, end
    mlflow_run.json      id and address of the MLflow run, bytes delivered, what could not be

A line is one write, so that a killed process leaves at most one torn line, at the end; readers leave out a line that
is no JSON, and a writer starts on a line of its own.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SPOOL_NAME = "mlflow_spool.jsonl"
DELIVERY_NAME = "mlflow_run.json"
_READ_BYTES = 1 << 20
_ASIDE = re.compile(r"^mlflow_spool\.(\d+)\.jsonl$")


@dataclass(frozen=True)
class Order:
    """One line of the spool: what to do, its fields, and the byte after it."""

    kind: str
    fields: dict[str, Any]
    end: int


@dataclass
class Delivery:
    """How far the spool has been delivered. Positions are bytes of the spool; times are seconds since 1970."""

    run_id: str | None = None
    run_name: str | None = None
    experiment_id: str | None = None
    url: str | None = None
    records_sent: int = 0
    files_sent: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)
    files_left: list[dict[str, Any]] = field(default_factory=list)
    files_gone: list[str] = field(default_factory=list)
    error: str | None = None
    alive_at: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Delivery:
        """The delivery in this file; an empty one when there is none, or when it is not ours."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls()
        known = {item.name for item in fields(cls)}
        return (
            cls(**{key: value for key, value in values.items() if key in known}) if isinstance(values, dict) else cls()
        )

    def write(self, path: Path) -> None:
        staging = path.with_name(f".{path.name}.partial")
        staging.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(staging, path)


class SpoolWriter:
    """Appends orders to a spool. An append costs one JSON dump and one write, and waits for nobody."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = self.size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def append(self, kind: str, **values: Any) -> None:
        """One order, stamped with the time in milliseconds.

        Raises:
            OSError: the disk is full or gone.
        """
        record = {"do": kind, "time": time.time_ns() // 1_000_000, **values}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._torn = written < len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        os.close(self._descriptor)


def read_orders(path: Path, start: int, limit: int | None = None) -> Iterator[Order]:
    """The whole lines of a spool from byte `start` to byte `limit`, as they are now; about a megabyte at most."""
    with path.open("rb") as stream:
        stream.seek(start)
        position = start
        for line in stream:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            if limit is not None and position > limit:
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = {}
            values = record if isinstance(record, dict) else {}
            yield Order(values.pop("do", "unreadable"), values, position)
            if position - start > _READ_BYTES:
                return


def whole_bytes(path: Path) -> int:
    """The size of a spool without the torn line that a killed process may have left at its end."""
    with path.open("rb") as stream:
        position = stream.seek(0, os.SEEK_END)
        while position > 0:
            start = max(position - _READ_BYTES, 0)
            stream.seek(start)
            if (newline := stream.read(position - start).rfind(b"\n")) >= 0:
                return start + newline + 1
            position = start
    return 0


def plain_metrics(values: Mapping[str, Any]) -> dict[str, float | str]:
    """The numbers among the values, in words where JSON has none: "NaN", "Infinity", "-Infinity"."""
    return {
        key: float(value) if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
        for key, value in values.items()
        if isinstance(value, int | float)
    }


def delivery_path(spool: Path) -> Path:
    """The delivery file of this spool."""
    return spool.with_name(spool.name.replace("mlflow_spool", "mlflow_run").replace(".jsonl", ".json"))


def set_aside(folder: Path) -> None:
    """Nothing; the folder's spool and its delivery are renamed to the next free number, and can still be delivered."""
    spool = folder / SPOOL_NAME
    if not spool.exists():
        (folder / DELIVERY_NAME).unlink(missing_ok=True)
        return
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _ASIDE.match(path.name))]
    aside = folder / f"mlflow_spool.{max(numbers, default=0) + 1}.jsonl"
    if delivery_path(spool).exists():
        os.replace(delivery_path(spool), delivery_path(aside))
    os.replace(spool, aside)


def spools(folder: Path) -> list[Path]:
    """The spools of a run's folder, the oldest first."""
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _ASIDE.match(path.name))]
    aside = [path for _, path in sorted(numbered)]
    current = folder / SPOOL_NAME
    return [*aside, current] if current.exists() else aside


def latest_run(spool: Path) -> tuple[dict[str, Any] | None, bool]:
    """The newest `run` order of a spool, None when it has none, and whether an `end` has followed it."""
    run, ended, position = None, False, 0
    while batch := list(read_orders(spool, position)) if spool.exists() else []:
        position = batch[-1].end
        for order in batch:
            if order.kind == "run":
                run, ended = order.fields, False
            elif order.kind == "end":
                ended = True
    return run, ended
