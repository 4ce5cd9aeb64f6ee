"""The numbers of a run over its steps, from whichever file holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetuning.tracking import local_files as loss_log
from finetuning.tracking import metrics_log

Series = dict[str, list[tuple[int, float]]]
"""For each name, (step, value) with rising steps."""

_NO_VALUES = frozenset({"step", "kind", "time", "epoch"})


def read_series(folder: Path) -> Series:
    """All numbers that a run has logged: from `metrics.jsonl`, else from the newest checkpoint's state, and the losses
    of `training_logs.jsonl` where neither has any. What a later job did again replaces what was there."""
    series = _collect(_rows(folder / metrics_log.FILE_NAME))
    if not series:
        series = _collect(_state_rows(folder))
    return series or _collect(_loss_rows(folder / loss_log.FILE_NAME))


def thinned(points: list[tuple[int, float]], most: int = 600) -> list[tuple[int, float]]:
    """At most so many points, and a few more: of each group of neighbours the lowest and the highest, so that no peak
    is lost; the first and the last always."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: dict[int, float] = {points[0][0]: points[0][1]}
    for start in range(0, len(points), size):
        group = points[start : start + size]
        for step, value in sorted([min(group, key=_value), max(group, key=_value)]):
            kept[step] = value
    kept[points[-1][0]] = points[-1][1]
    return list(kept.items())


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; none when it is not there. A torn line is left out."""
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with stream:
        for line in stream:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _collect(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Series:
    by_name: dict[str, dict[int, float]] = {}
    for step, values in rows:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                by_name.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in by_name.items()}


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for row in read_json_lines(path):
        if isinstance(row.get("step"), int):
            yield row["step"], {key: value for key, value in row.items() if key not in _NO_VALUES}


def _state_rows(folder: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _number(path.parent) >= 0]
    for path in sorted(states, key=lambda path: _number(path.parent))[-1:]:
        try:
            history = json.loads(path.read_text(encoding="utf-8")).get("log_history") or []
        except (OSError, ValueError):
            return
        for entry in history:
            yield int(entry.get("step", 0)), {key: value for key, value in entry.items() if key not in _NO_VALUES}


def _loss_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    names = {"training_loss": "loss", "validation_loss": "eval_loss"}
    for row in read_json_lines(path):
        data = row.get("data")
        if isinstance(data, dict) and row.get("name") in names and isinstance(data.get("step"), int):
            yield data["step"], {names[row["name"]]: data.get("value")}


def _number(folder: Path) -> int:
    name = folder.name.rpartition("-")[2]
    return int(name) if name.isdecimal() else -1
