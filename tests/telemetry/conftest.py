"""What telemetry wrote, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetuning.telemetry.config import JobIdentity
from finetuning.telemetry.error_guard import Clock
from finetuning.telemetry.names import export_all
from finetuning.telemetry.session import open_telemetry
from finetuning.telemetry.telemetry import Telemetry


@dataclass(frozen=True)
class Recorded:
    """One file's records: every line must be JSON."""

    records: list[dict[str, Any]]

    @property
    def resource(self) -> dict[str, Any]:
        return self.records[0]["attributes"]

    def spans(self, name: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.records if r["type"] == "span" and name in (None, r["name"])]

    def span(self, name: str) -> dict[str, Any]:
        [span] = self.spans(name)
        return span

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [r for r in self.records if r["type"] == "event" and name in (None, r["name"])]

    def event(self, name: str) -> dict[str, Any]:
        [event] = self.events(name)
        return event["attributes"]

    def updates(self, name: str = "training_metrics_update") -> list[dict[str, Any]]:
        return [event["attributes"] for event in self.events(name)]

    def parent(self, span: dict[str, Any]) -> str | None:
        names = {other["span_id"]: other["name"] for other in self.spans()}
        return names[span["parent_id"]] if span["parent_id"] else None

    def started(self) -> list[str]:
        """Names of the spans that began, whether they ended or not."""
        return [event["attributes"]["span_name"] for event in self.events("span_start")]


def read(path: Path) -> Recorded:
    return Recorded([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


@pytest.fixture
def recorded() -> Callable[..., Recorded]:
    """A function that reads the newest job's file of an output directory, or the one of a rank."""

    def read_newest(output_dir: Path, rank: int = 0, job: int = -1) -> Recorded:
        return read(sorted(output_dir.glob(f"telemetry/*/rank{rank}.jsonl"))[job])

    return read_newest


class Ticks:
    """A clock that only goes on when it is told to."""

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
    """A function that opens telemetry that writes every span into `tmp_path / "telemetry" / "job"`."""

    def make(exports: Any = None, *, clock: Clock | None = None, world_size: int = 1, **more: Any) -> Telemetry:
        identity = JobIdentity("test", "job", "session", world_size=world_size)
        return open_telemetry(identity, tmp_path / "telemetry" / "job", exports or export_all(), clock=clock, **more)

    return make
