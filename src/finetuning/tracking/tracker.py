"""The tracker interface, the group that shields training from failing trackers, and the two trackers of local files.

A tracker is a destination for a run's metrics: MLflow, the trackers of accelerate, the progress display, or a file in
the output directory. Adding one means subclassing `Tracker`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

from finetuning.config.redaction import redact_text, redacted_json
from finetuning.config.sections.tracking import TrackingConfig
from finetuning.distributed import announce_wait
from finetuning.errors import parse_json

logger = logging.getLogger(__name__)

LOSS_LOG_NAME = "training_logs.jsonl"
METRICS_LOG_NAME = "metrics.jsonl"
RunIdentity = dict[str, str | None]
"""What identifies a run in a tracker: its id, name or address, by the keys of `NAME_tracker.json`."""

_RUN_TOTALS = ("first_step_s", "goodput")
_BADPUT_PREFIX = "badput_"
_REPORTED_BADPUT = ("badput_lost_work_s", "badput_checkpoint_save_s")
_RUN_SUMMARY = ("train_runtime", "train_loss")
_LOSS_NAMES = {"loss": "training_loss", "eval_loss": "validation_loss"}


@dataclass(frozen=True)
class StepMetrics:
    """Progress and throughput at one optimizer step. None marks a value that is not known (yet).

    `tokens_seen` counts tokens without padding, summed over all processes, since this job started. Times are seconds.
    `elapsed_s` is the wall time since the training loop began; `first_step_s` is its part up to the end of the first
    step. `tokens_per_s` and `seconds_left` exclude the first step, evaluation and checkpoint saving.
    """

    step: int
    max_steps: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_seen: int | None = None
    elapsed_s: float = 0.0
    first_step_s: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None


EventKind = Literal["training", "validation", "summary"]


@dataclass(frozen=True)
class LogEvent:
    """One call of `Trainer.log`: every number in it under the trainer's name, and the metrics of the step."""

    kind: EventKind
    metrics: StepMetrics
    values: Mapping[str, float] = field(default_factory=dict)


class Tracker:
    """A destination for metrics. Override what is needed; a tracker that raises is disabled (see `TrackerGroup`)."""

    name = "tracker"

    def on_train_begin(self, metrics: StepMetrics) -> None:
        """Called when the training loop begins; `metrics.step` is above 0 in a resumed run."""

    def on_step_end(self, metrics: StepMetrics) -> None:
        """Called after each optimizer step. Only counts and times are set in `metrics`."""

    def log(self, event: LogEvent) -> None:
        """Called at each log of the trainer."""

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        """Called with telemetry's metrics at an optimizer step: throughput, data wait, memory, goodput."""

    def on_save(self, step: int, folder: Path) -> None:
        """Called after a checkpoint was saved to `folder`."""

    def on_train_end(self, metrics: StepMetrics) -> None:
        """Called when the training loop has ended without an error."""

    def close(self) -> None:
        """Release resources. Called exactly once, also after a failure; nothing is called afterwards."""


class TrackerGroup:
    """Calls several trackers. One that raises is closed and not called again; training continues.

    `failures` maps the name of each disabled tracker to the error. It goes into the run record.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)
        self.failures: dict[str, str] = {}

    def call(self, method: str, *arguments: object) -> None:
        """Call a method of every tracker that is still enabled."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # noqa: BLE001  a tracker may raise anything, and training must continue
                self._disable(tracker, error, close=method != "close")

    def close(self) -> None:
        """Close every tracker. A second call does nothing."""
        names = ", ".join(tracker.name for tracker in self._trackers)
        with announce_wait(f"trackers to close ({names})"):
            self.call("close")
        self._trackers.clear()

    def _disable(self, tracker: Tracker, error: Exception, *, close: bool) -> None:
        # A second call may fail before the first has removed the tracker: callbacks run in several threads.
        if tracker not in self._trackers:
            return
        self._trackers.remove(tracker)
        self.failures[tracker.name] = redact_text(f"{type(error).__name__}: {error}")
        logger.warning("%s failed and is disabled: %s", tracker.name, self.failures[tracker.name])
        if close:
            try:
                tracker.close()
            except Exception as second:  # noqa: BLE001  the first error is the one to report
                logger.debug("closing %s failed as well: %s", tracker.name, second)


class TelemetryNames:
    """Gives telemetry's metrics their names in a tracker: `telemetry/NAME` for series, `totals/NAME` for run totals.

    Of the badput categories, only the sum and those that a user can act on are reported. A total is reported again
    only when it has changed.
    """

    def __init__(self) -> None:
        self._reported: dict[str, float] = {}

    def rename(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics to report, by their names in the tracker."""
        badput = {name: value for name, value in values.items() if name.startswith(_BADPUT_PREFIX)}
        series = {name: value for name, value in values.items() if name not in {*badput, *_RUN_TOTALS}}
        totals = {name: values[name] for name in _RUN_TOTALS if name in values}
        totals |= {name: value for name, value in badput.items() if name in _REPORTED_BADPUT and value}
        if badput:
            totals["badput_s"] = sum(badput.values())
        changed = {name: value for name, value in totals.items() if self._reported.get(name) != value}
        self._reported |= totals
        return {
            **{f"telemetry/{name}": value for name, value in series.items()},
            **{f"totals/{name}": value for name, value in changed.items()},
        }


def summary_totals(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of the trainer's final summary that describe the whole run, as `totals/NAME`."""
    return {f"totals/{name}": value for name, value in values.items() if name in _RUN_SUMMARY}


def write_identity(output_dir: Path, section: TrackingConfig, name: str, identity: RunIdentity) -> None:
    """Write `NAME_tracker.json` into `output_dir` and into `tracking.run_uri_export_path`, if that is set."""
    folders = [output_dir, *([Path(section.run_uri_export_path)] if section.run_uri_export_path else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}_tracker.json").write_text(redacted_json(identity, indent=1) + "\n", encoding="utf-8")


def read_identities(output_dir: Path, names: Sequence[str]) -> dict[str, RunIdentity]:
    """Read what earlier jobs of this output directory recorded about their runs, by tracker."""
    identities: dict[str, RunIdentity] = {}
    for name in names:
        try:
            value = parse_json((output_dir / f"{name}_tracker.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict):
            identities[name] = value
    return identities


class LineFile:
    """An append-only text file, flushed after each line and created with the first one."""

    def __init__(self, path: Path):
        self.path = path
        self._stream: IO[str] | None = None

    def write(self, line: str) -> None:
        """Append one line, passed without its newline."""
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_partial = _ends_in_partial_line(self.path)
            self._stream = self.path.open("a", encoding="utf-8")
            line = "\n" + line if is_partial else line
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._stream is not None:
            self._stream.close()


def _ends_in_partial_line(path: Path) -> bool:
    """Return whether the last line has no newline, as after a writer that was killed."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"


class LossLog(Tracker):
    """Writes losses to `training_logs.jsonl` in the format of fms-hf-tuning, one JSON object per line:

    `{"data": {"epoch": 1.0, "step": 3, "timestamp": "2026-01-01T12:00:00.123456", "value": 2.31},`
    ` "name": "training_loss"}`, or `validation_loss`.

    The file is created with the first loss; a resumed run appends to it. A loss that is not finite is null, so that
    strict JSON parsers can read the file. Timestamps are local time without a zone.

    Source: fms-hf-tuning, `tuning/trackers/filelogging_tracker.py`.
    """

    name = LOSS_LOG_NAME

    def __init__(self, folder: Path, file_name: str = LOSS_LOG_NAME):
        self.path = folder / file_name
        self._lines = LineFile(self.path)

    def log(self, event: LogEvent) -> None:
        epoch = event.values.get("epoch")
        for key, name in _LOSS_NAMES.items():
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


class MetricsLog(Tracker):
    """Writes every logged number to `metrics.jsonl`, one JSON object per line:

    `{"step": 10, "kind": "training", "time": 1767225600.0, "loss": 2.31, "learning_rate": 5e-05, …}`

    `kind` is training, validation, summary or figures (telemetry's metrics); `time` is seconds since 1970. Numbers have
    the trainer's names, and a training log also has `tokens_per_s` and `tokens_seen`. A number that is not finite is
    null. A resumed run appends: where a step has several lines, the last one is valid.
    """

    name = METRICS_LOG_NAME

    def __init__(self, folder: Path):
        self._lines = LineFile(folder / METRICS_LOG_NAME)

    def log(self, event: LogEvent) -> None:
        metrics = event.metrics
        derived = {"epoch": metrics.epoch}
        if event.kind == "training":
            derived = {"tokens_per_s": metrics.tokens_per_s, "tokens_seen": metrics.tokens_seen, **derived}
        numbers = {key: float(value) for key, value in derived.items() if value is not None}
        self._write(metrics.step, event.kind, {**numbers, **event.values})

    def log_telemetry(self, values: Mapping[str, float], step: int) -> None:
        self._write(step, "figures", values)

    def close(self) -> None:
        self._lines.close()

    def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        numbers = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **numbers}))
