"""`metrics.jsonl`: every number that is logged, a line at each log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from finetuning.tracking.line_file import LineFile
from finetuning.tracking.sinks import LogEvent, Sink

FILE_NAME = "metrics.jsonl"


class MetricsLog(Sink):
    """One JSON object a line, appended and flushed:

    `{"step": 10, "kind": "training", "time": 1767225600.0, "loss": 2.31, "learning_rate": 5e-05, …}`

    `kind` is training, validation, summary, or figures: those of telemetry. `time` is seconds since 1970. Numbers have
    the trainer's names; `tokens_per_s` and `tokens_seen` stand beside a training log's. One that is not finite is null.
    A resumed run goes on below, so that a step that was done again has a second line, which holds.
    """

    name = FILE_NAME

    def __init__(self, folder: Path):
        self._lines = LineFile(folder / FILE_NAME)

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
