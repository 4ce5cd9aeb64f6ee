"""Counting what happens in a loop: cheap at each step, formed into attributes now and then."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuning.telemetry.names import DATA_LOADING, MODEL_BACKWARD, MODEL_FORWARD, OPTIMIZER_UPDATE, ZERO_GRAD

PROGRESS = struct.Struct("<4q4d")
"""Step of the start, finished step, a time in ns since 1970, checkpointed step; seconds of iterations, of data loading,
of the first iteration, and of iterations up to the checkpoint."""

TIMED = {
    DATA_LOADING: "dataloader",
    MODEL_FORWARD: "forward",
    MODEL_BACKWARD: "backward",
    OPTIMIZER_UPDATE: "optimizer",
    ZERO_GRAD: "zero_grad",
}
"""The parts of an iteration, and the words that they have in attributes."""


class Spread:
    """Count, total, smallest and largest of what was added."""

    __slots__ = ("count", "largest", "smallest", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.smallest = float("inf")
        self.largest = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        if value < self.smallest:
            self.smallest = value
        if value > self.largest:
            self.largest = value

    def take(self, other: Spread) -> None:
        """Adds all that was added to another."""
        self.count += other.count
        self.total += other.total
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)

    def attributes(self, what: str) -> dict[str, float]:
        """`avg_…`, `min_…`, `max_…` and `total_…`; none before anything was added."""
        if not self.count:
            return {}
        return {
            f"avg_{what}": self.total / self.count,
            f"min_{what}": self.smallest,
            f"max_{what}": self.largest,
            f"total_{what}": self.total,
        }


class IterationMeter:
    """Times of iterations and of their parts, of the whole job and since the last update. All in seconds."""

    def __init__(self) -> None:
        self.job = Spread()
        self.window = Spread()
        self.parts: dict[str, float] = dict.fromkeys(TIMED, 0.0)
        self.window_parts: dict[str, float] = dict.fromkeys(TIMED, 0.0)
        self.first: float | None = None
        self.first_finished_at: float | None = None
        self.last_finished_at: float | None = None

    def finished(self, seconds: float, at_ns: int) -> None:
        """One iteration is done."""
        self.window.add(seconds)
        if self.first is None:
            self.first = seconds
            self.first_finished_at = at_ns / 1e9
        self.last_finished_at = at_ns / 1e9

    def part(self, name: str, seconds: float) -> None:
        """So much of the present iteration went into this part."""
        if name in self.window_parts:
            self.window_parts[name] += seconds

    @property
    def total(self) -> float:
        return self.job.total + self.window.total

    @property
    def count(self) -> int:
        return self.job.count + self.window.count

    def part_total(self, name: str) -> float:
        return self.parts[name] + self.window_parts[name]

    def close_window(self) -> tuple[Spread, dict[str, float]]:
        """What has been since the last call; it goes into the job's totals."""
        window, parts = self.window, self.window_parts
        self.job.take(window)
        for name, seconds in parts.items():
            self.parts[name] += seconds
        self.window, self.window_parts = Spread(), dict.fromkeys(TIMED, 0.0)
        return window, parts


class ProgressFile:
    """A few numbers on disk, written over at each step: what a killed job had done.

    It takes at most about one part in a hundred of the time, however slow the disk.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._next = 0.0

    def write(self, *values: float, force: bool = False) -> None:
        """The values of `PROGRESS`.

        Raises:
            OSError: they cannot be written.
        """
        began = time.perf_counter()
        if began < self._next and not force:
            return
        os.pwrite(self._descriptor, PROGRESS.pack(*values), 0)
        ended = time.perf_counter()
        self._next = ended + 100 * (ended - began)

    def close(self) -> None:
        os.close(self._descriptor)


def read_progress(path: Path) -> Mapping[str, Any] | None:
    """What a job had done at its last step; None where nothing was written."""
    names = ("start", "step", "time_ns", "saved", "iterations_s", "data_s", "first_s", "saved_s")
    try:
        return dict(zip(names, PROGRESS.unpack(path.read_bytes()[: PROGRESS.size]), strict=True))
    except (OSError, struct.error):
        return None


def folder_bytes(folder: Path) -> int | None:
    """Bytes of the files in a folder; None where there is none."""
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
