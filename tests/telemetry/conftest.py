"""Reads the files that telemetry has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.session import open_telemetry
from finetuning.telemetry.spans import Clock, export_all
from finetuning.telemetry.telemetry import Telemetry


@dataclass(frozen=True)
class Recorded:
    """One file's records: every line must be JSON."""

    lines: list[dict[str, Any]]

    @property
    def resource(self) -> dict[str, Any]:
        return self.lines[0]["attributes"]

    def spans(self, name: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.lines if r["type"] == "span" and name in (None, r["name"])]

    def span(self, name: str) -> dict[str, Any]:
        [span] = self.spans(name)
        return span

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.lines if r["type"] == "event" and name in (None, r["name"])]

    def event(self, name: str) -> dict[str, Any]:
        [event] = self.events(name)
        return event["attributes"]

    def updates(self, name: str = "training_metrics_update") -> list[dict[str, Any]]:
        return [event["attributes"] for event in self.events(name)]

    def parent(self, span: dict[str, Any]) -> str | None:
        names = {item["span_id"]: item["name"] for item in self.spans()}
        return names[span["parent_id"]] if span["parent_id"] else None

    def started(self) -> list[str]:
        """The names of all spans that were started."""
        return [event["attributes"]["span_name"] for event in self.events("span_start")]


def read(path: Path) -> Recorded:
    return Recorded([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


@pytest.fixture
def recorded() -> Callable[..., Recorded]:
    """A function that reads a rank's file of the newest job of an output directory."""

    def read_newest(output_dir: Path, rank: int = 0, job: int = -1) -> Recorded:
        return read(sorted(output_dir.glob(f"telemetry/*/rank{rank}.jsonl"))[job])

    return read_newest


class Ticks:
    """A clock that advances only in `sleep`."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    def clock(self) -> Clock:
        return Clock(wall_ns=lambda: 5_000_000_000, counter_ns=lambda: self.now_ns)


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def telemetry(tmp_path: Path) -> Callable[..., Telemetry]:
    """A function that opens telemetry that exports every span to `tmp_path / "telemetry" / "job"`."""

    def make(span_filter: Any = None, *, clock: Clock | None = None, world_size: int = 1, **kwargs: Any) -> Telemetry:
        identity = JobIdentity("test", "job", "session", world_size=world_size)
        return open_telemetry(
            identity, tmp_path / "telemetry" / "job", span_filter or export_all(), clock=clock, **kwargs
        )

    return make
