"""`training_logs.jsonl`: the losses as they come, in the shape that fms-hf-tuning's users read."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

from finetuning.tracking.line_file import LineFile
from finetuning.tracking.sinks import LogEvent, Sink

FILE_NAME = "training_logs.jsonl"
_NAMES = {"loss": "training_loss", "eval_loss": "validation_loss"}


class LossLog(Sink):
    """One JSON object a line, keys sorted, appended and flushed at each log:

    `{"data": {"epoch": 1.0, "step": 3, "timestamp": "2026-01-01T12:00:00.123456", "value": 2.31},`
    ` "name": "training_loss"}`, or `validation_loss`.

    The file is there from the first loss on, and is never rewritten: a resumed run goes on below. A loss that is not
    finite is null, so that every line is JSON to every reader. The time is local, without a zone. On the main process
    only, as all sinks.

    Source: fms-hf-tuning, `tuning/trackers/filelogging_tracker.py`.
    """

    name = FILE_NAME

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
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
