"""Reads a run's output directory: its record, logged metrics, preview rows and telemetry."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from finetuning.errors import ConfigError, Location, parse_json
from finetuning.report.console import loss
from finetuning.tracking.tracker import LOSS_LOG_NAME, METRICS_LOG_NAME

if TYPE_CHECKING:
    from finetuning.data.preview import PreviewRow

Value = TypeVar("Value")
JsonRecord: TypeAlias = dict[str, Any]
"""One JSON object of a file of a run."""
Series = dict[str, list[tuple[int, float]]]
"""For each metric, (step, value) in the order of steps."""

_NO_VALUES = frozenset({"step", "kind", "time", "epoch"})


def read_series(folder: Path) -> Series:
    """Read all metrics that a run has logged.

    The source is `metrics.jsonl`, else the state of the newest checkpoint, else the losses in `training_logs.jsonl`.
    Steps that a resumed job repeated have their last value.
    """
    series = _collect(_rows(folder / METRICS_LOG_NAME))
    if not series:
        series = _collect(_state_rows(folder))
    return series or _collect(_loss_rows(folder / LOSS_LOG_NAME))


@dataclass(frozen=True)
class FinalLosses:
    """The losses at the end of a run, and what they are of."""

    training: float | None = None
    training_steps: tuple[int, int] = (0, 0)
    """The first and last step of the last logged window: the loss is the mean over it."""
    validation: float | None = None
    validation_step: int = 0
    best: float | None = None
    """The lowest validation loss."""
    best_step: int = 0
    best_checkpoint: str | None = None
    """The name of the checkpoint with the lowest validation loss, if it was kept."""

    def lines(self) -> list[tuple[str, str]]:
        """Return each loss with its label.

        >>> [text for _, text in FinalLosses(0.25, (81, 84), 0.5, 84, 0.5, 84, "checkpoint-84").lines()]
        ['0.2500, mean over steps 81 to 84', '0.5000 at step 84, the best, checkpoint-84']
        """
        lines: list[tuple[str, str]] = []
        first, last = self.training_steps
        if self.training is not None:
            what = f"step {last}" if first == last else f"mean over steps {first} to {last}"
            lines.append(("final loss", f"{loss(self.training)}, {what}"))
        if self.validation is not None:
            text = f"{loss(self.validation)} at step {self.validation_step}"
            best = f"{loss(self.best)} at step {self.best_step}, the best"
            text = best if self.best_step == self.validation_step else f"{text}; {best}"
            lines.append(("validation loss", text + (f", {self.best_checkpoint}" if self.best_checkpoint else "")))
        return lines


def final_losses(series: Series, folder: Path) -> FinalLosses:
    """Return the last losses that a run in `folder` has logged."""
    points, validation = series.get("loss") or [], series.get("eval_loss") or []
    losses = FinalLosses()
    if points:
        before = points[-2][0] if len(points) > 1 else 0
        losses = replace(losses, training=points[-1][1], training_steps=(before + 1, points[-1][0]))
    if validation:
        step, best = min(validation, key=lambda point: (point[1], -point[0]))
        name = f"checkpoint-{step}"
        losses = replace(
            losses,
            validation=validation[-1][1],
            validation_step=validation[-1][0],
            best=best,
            best_step=step,
            best_checkpoint=name if (folder / name).is_dir() else None,
        )
    return losses


def series_of_history(history: Iterable[JsonRecord]) -> Series:
    """Return the metrics of the Trainer's `log_history`."""
    return _collect((int(entry.get("step", 0)), _without_step(entry)) for entry in history)


def downsample(points: list[tuple[int, float]], limit: int = 600) -> list[tuple[int, float]]:
    """Return about `limit` points: the minimum and maximum of each group of neighbors, and the first and last point."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept: dict[int, float] = {points[0][0]: points[0][1]}
    for start in range(0, len(points), size):
        group = points[start : start + size]
        for step, value in sorted([min(group, key=_value), max(group, key=_value)]):
            kept[step] = value
    kept[points[-1][0]] = points[-1][1]
    return list(kept.items())


def read_json_lines(path: Path) -> Iterator[JsonRecord]:
    """Yield the objects of a JSON lines file, if it exists. Lines that are incomplete are skipped."""
    if not path.is_file():
        return
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with stream:
        for line in stream:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _collect(rows: Iterable[tuple[int, Mapping[str, object]]]) -> Series:
    by_name: dict[str, dict[int, float]] = {}
    for step, values in rows:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                by_name.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for row in read_json_lines(path):
        if isinstance(row.get("step"), int):
            yield row["step"], _without_step(row)


def _without_step(row: JsonRecord) -> JsonRecord:
    return {key: value for key, value in row.items() if key not in _NO_VALUES}


def _state_rows(folder: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _number(path.parent) >= 0]
    for path in sorted(states, key=lambda path: _number(path.parent))[-1:]:
        try:
            history = parse_json(path.read_text(encoding="utf-8")).get("log_history") or []
        except (OSError, ValueError):
            return
        for entry in history:
            yield int(entry.get("step", 0)), _without_step(entry)


def _loss_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    names = {"training_loss": "loss", "validation_loss": "eval_loss"}
    for row in read_json_lines(path):
        data = row.get("data")
        if isinstance(data, dict) and row.get("name") in names and isinstance(data.get("step"), int):
            yield data["step"], {names[row["name"]]: data.get("value")}


def _number(folder: Path) -> int:
    name = folder.name.rpartition("-")[2]
    return int(name) if name.isdecimal() else -1


RECORD_NAME = "run.json"
COMPLETE_MARKER = ".complete"
"""An empty file in the output directory of a run that has succeeded."""
STOP_FILE = "STOP"
"""A run stops at its next step, with a checkpoint, when this file appears in its output directory."""
CONFIG_NAME = "config.resolved.yaml"
PREVIEW_NAME = "preview.txt"
EVALUATIONS = "evaluations"
"""Folder with the results of `finetuning evaluate`, a JSON file for each."""
_OLD_PREVIEW_NAME = "first_rows.txt"  # old name
# The first is what export/merge/verification.py writes, the second what older versions wrote.
_MERGE_VERIFICATION_NAMES = ("merge_verification.json", "merge_certificate.json")
# Keys that earlier versions wrote into `run.json`, and their current names.
_RENAMED_KEYS = {
    "told": "summary",  # old name
    "controlled": "controller_actions",
    "trackers_that_failed": "tracker_errors",
    "trained": "training_started",
    "copied": "uploaded_checkpoints",
    "not_copied": "upload_errors",
}
_RENAMED_NESTED_KEYS = {
    "data": {"ledger": "statistics"},  # old name
    "memory": {"divisions": "oom_retries"},
}
_RENAMED_STATISTICS_KEYS = {"part": "split", "lost_to_faults": "invalid_rows", "noticed": "warnings"}
_MOST_BYTES = 2_000_000


@dataclass(frozen=True)
class Span:
    """One span of telemetry. Times are seconds since its job began."""

    name: str
    start_s: float
    end_s: float
    depth: int


@dataclass(frozen=True)
class RunData:
    """One run, as recorded in its output directory."""

    folder: Path
    record: JsonRecord
    series: Series
    config: str
    rows: tuple[PreviewRow, ...]
    jobs: tuple[tuple[Span, ...], ...]
    """The recorded spans of each job, oldest job first."""
    merge_checks: JsonRecord
    """The results of verified merges of this run's adapter, by file."""
    evaluations: tuple[JsonRecord, ...] = ()
    """What `finetuning evaluate` found, by name."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def command(self) -> str:
        """The command that started the last job."""
        words = (self.record.get("jobs") or [{}])[-1].get("command") or []
        return shlex.join([Path(words[0]).name, *words[1:]]) if words else ""

    @property
    def seconds(self) -> float | None:
        """From the start of the last job to its end; None while it runs."""
        job = (self.record.get("jobs") or [{}])[-1]
        began, ended = parse_time(job.get("started")), parse_time(job.get("ended"))
        return (ended - began).total_seconds() if began and ended else None

    def last(self, name: str) -> float | None:
        """The last value of a series."""
        points = self.series.get(name)
        return points[-1][1] if points else None


def read_run(folder: Path) -> RunData:
    """Read the run in an output directory.

    Raises:
        ConfigError: it holds no run.
    """
    record = read_run_record(folder)
    if record is None:
        raise ConfigError(
            f"holds no {RECORD_NAME}: this is not the output directory of a run", location=Location(str(folder))
        )
    return RunData(
        folder=folder,
        record=record,
        series=read_series(folder),
        config=_read_text(folder / CONFIG_NAME),
        rows=read_preview(folder),
        jobs=_spans(folder),
        merge_checks=_merge_checks(folder),
        evaluations=tuple(
            values
            for path in sorted((folder / EVALUATIONS).glob("*.json"))
            if isinstance(values := _read_json(path), dict) and isinstance(values.get("results"), list)
        ),
    )


def files_read(folder: Path) -> list[Path]:
    """Return the files of a run that are read here and by the run list, as far as they exist."""
    names = (RECORD_NAME, METRICS_LOG_NAME, LOSS_LOG_NAME, CONFIG_NAME, PREVIEW_NAME, _OLD_PREVIEW_NAME)
    patterns = (f"{EVALUATIONS}/*.json", "checkpoint-*/trainer_state.json", "telemetry/*/rank0.jsonl")
    patterns += tuple(f"*/{name}" for name in _MERGE_VERIFICATION_NAMES)
    paths = [folder / name for name in names if (folder / name).exists()]
    return paths + [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def read_run_record(folder: Path) -> JsonRecord | None:
    """Return the contents of `run.json` in an output directory, or None when it is missing or not readable.

    Keys that older versions wrote are returned under their current names.
    """
    record = _read_json(folder / RECORD_NAME)
    if not isinstance(record, dict):
        return None
    record = _rename_keys(record, _RENAMED_KEYS)
    for section, renamed in _RENAMED_NESTED_KEYS.items():
        if isinstance(record.get(section), dict):
            record[section] = _rename_keys(record[section], renamed)
    data = record.get("data")
    if isinstance(data, dict) and isinstance(data.get("statistics"), list):
        splits = [_rename_keys(split, _RENAMED_STATISTICS_KEYS) for split in data["statistics"]]
        record["data"] = {**data, "statistics": splits}
    return record


def _rename_keys(values: Mapping[str, Value], renamed: Mapping[str, str]) -> dict[str, Value]:
    return {renamed.get(key, key): value for key, value in values.items()}


def parse_time(text: object) -> datetime | None:
    """A time of the record, in UTC."""
    try:
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _read_json(path: Path) -> object:
    # Opening a pipe would wait for a writer.
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MOST_BYTES)
    except OSError:
        return ""


def read_preview(folder: Path) -> tuple[PreviewRow, ...]:
    """Return the first training rows, as the model has seen them; none if the run has no preview."""
    from finetuning.data.preview import parse_text

    return tuple(parse_text(_read_text(folder / PREVIEW_NAME) or _read_text(folder / _OLD_PREVIEW_NAME)))


def _spans(folder: Path) -> tuple[tuple[Span, ...], ...]:
    """The spans of rank 0 of each job, but those that telemetry does not write by default."""
    if not (folder / "telemetry").is_dir():
        return ()
    from finetuning.telemetry.goodput import job_files, read_job
    from finetuning.telemetry.names import SHORT_SPANS

    jobs = [job for path in job_files(folder) if (job := read_job(path))]
    timelines = []
    for job in jobs:
        parents = {span.span_id: span.parent_id for span in job.spans}
        timelines.append(
            tuple(
                Span(
                    span.name,
                    (span.start_ns - job.start_ns) / 1e9,
                    (span.end_ns - job.start_ns) / 1e9,
                    _depth(span.span_id, parents),
                )
                for span in sorted(job.spans, key=lambda span: span.start_ns)
                if span.name not in SHORT_SPANS
            )
        )
    return tuple(timelines)


def _depth(span_id: str, parents: Mapping[str, str]) -> int:
    depth = 0
    while (span_id := parents.get(span_id, "")) in parents and depth < 20:
        depth += 1
    return depth


def _merge_checks(folder: Path) -> JsonRecord:
    """Read the merge verification files in the folders of an output directory."""
    paths = sorted(path for name in _MERGE_VERIFICATION_NAMES for path in folder.glob(f"*/{name}"))
    return {str(path.relative_to(folder)): check for path in paths if isinstance(check := _read_json(path), dict)}
