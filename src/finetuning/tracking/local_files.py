"""`training_logs.jsonl`: the losses as they come, in the shape that fms-hf-tuning's users read.

`metrics.jsonl`: every number that is logged, a line at each log.

A file of lines that is added to, never rewritten."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

from finetuning.tracking.tracker import LogEvent, Tracker


class LineFile:
    """Appends lines, each flushed. The file is made with the first line; a line that a killed writer left torn is
    ended first."""

    def __init__(self, path: Path):
        self.path = path
        self._stream: IO[str] | None = None

    def write(self, line: str) -> None:
        """Appends one line, given without its end."""
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = _ends_torn(self.path)
            self._stream = self.path.open("a", encoding="utf-8")
            line = "\n" + line if torn else line
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _ends_torn(path: Path) -> bool:
    """Whether the last line lacks its end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"


LOSS_LOG_NAME = "training_logs.jsonl"
_NAMES = {"loss": "training_loss", "eval_loss": "validation_loss"}


class LossLog(Tracker):
    """One JSON object a line, keys sorted, appended and flushed at each log:

    `{"data": {"epoch": 1.0, "step": 3, "timestamp": "2026-01-01T12:00:00.123456", "value": 2.31},`
    ` "name": "training_loss"}`, or `validation_loss`.

    The file is there from the first loss on, and is never rewritten: a resumed run goes on below. A loss that is not
    finite is null, so that every line is JSON to every reader. The time is local, without a zone. On the main process
    only, as all sinks.

    Source: fms-hf-tuning, `tuning/trackers/filelogging_tracker.py`.
    """

    name = LOSS_LOG_NAME

    def __init__(self, folder: Path):
        self.path = folder / LOSS_LOG_NAME
        self._lines = LineFile(self.path)

    def log(self, event: LogEvent) -> None:
        epoch = event.values.get("epoch")
        for key, name in _NAMES.items():
            if epoch is None or key not in event.values:
                continue
            value = event.values[key]
            data = {
                "epoch": round(epoch, 2),
                "step": event.metrics.step,
                "timestamp": datetime.now().isoformat(),
                "value": value if math.isfinite(value) else None,
            }
            self._lines.write(json.dumps({"data": data, "name": name}, sort_keys=True))

    def close(self) -> None:
        self._lines.close()


METRICS_LOG_NAME = "metrics.jsonl"


class MetricsLog(Tracker):
    """One JSON object a line, appended and flushed:

    `{"step": 10, "kind": "training", "time": 1767225600.0, "loss": 2.31, "learning_rate": 5e-05, …}`

    `kind` is training, validation, summary, or figures: those of telemetry. `time` is seconds since 1970. Numbers have
    the trainer's names; `tokens_per_s` and `tokens_seen` stand beside a training log's. One that is not finite is null.
    A resumed run goes on below, so that a step that was done again has a second line, which holds.
    """

    name = METRICS_LOG_NAME

    def __init__(self, folder: Path):
        self._lines = LineFile(folder / METRICS_LOG_NAME)

    def log(self, event: LogEvent) -> None:
        metrics = event.metrics
        more = {"tokens_per_s": metrics.tokens_per_s, "tokens_seen": metrics.tokens_seen, "epoch": metrics.epoch}
        known = {key: float(value) for key, value in more.items() if value is not None}
        if event.kind != "training":
            known = {key: value for key, value in known.items() if key == "epoch"}
        self._write(metrics.step, event.kind, {**known, **event.values})

    def figures(self, figures: Mapping[str, float], step: int) -> None:
        self._write(step, "figures", figures)

    def close(self) -> None:
        self._lines.close()

    def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        numbers = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **numbers}))
