"""From counts and times to the attributes of `training_metrics_update`.

Counting what happens in a loop: cheap at each step, formed into attributes now and then.

Checkpoints as telemetry sees them: attempts, successes, what they cost, and what they preserve."""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning.telemetry.config import MeasuredConfig, Strategy, TrainingConfig
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


class RunningStats:
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

    def take(self, other: RunningStats) -> None:
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
        self.job = RunningStats()
        self.window = RunningStats()
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

    def close_window(self) -> tuple[RunningStats, dict[str, float]]:
        """What has been since the last call; it goes into the job's totals."""
        window, parts = self.window, self.window_parts
        self.job.take(window)
        for name, seconds in parts.items():
            self.parts[name] += seconds
        self.window, self.window_parts = RunningStats(), dict.fromkeys(TIMED, 0.0)
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


SAMPLE = ("iteration", "dataloader", "forward", "tokens", "window_tokens", "flops")
"""What processes tell each other at an update: mean seconds of the window's iterations, their data loading and their
forward passes; tokens of the job and of the window; FLOPs of the job."""

FIGURES = {
    "tokens_per_second_per_device": "tokens_per_second_per_device",
    "tokens_per_second": "tokens_per_second",
    "train_throughput_per_gpu": "tflops_per_device",
    "mfu": "mfu",
    "window_avg_iteration_time_sec": "step_time_s",
    "first_iteration_time_sec": "first_step_s",
    "data_wait_share": "data_wait_share",
    "peak_memory_allocated_bytes": "peak_memory_allocated_bytes",
    "peak_memory_reserved_bytes": "peak_memory_reserved_bytes",
    "peak_host_memory_bytes": "peak_host_memory_bytes",
    "straggler_ratio": "straggler_ratio",
}
"""Attributes that people follow while a run goes on, by their names as metrics."""


@dataclass
class TrainingProgress:
    """Where a training loop stands: steps are counted over all jobs, from 0; `updated` is that of the last update."""

    start: int = 0
    step: int = 0
    updated: int = 0
    samples_start: int | None = None
    last_work: MeasuredConfig = field(default_factory=MeasuredConfig)

    @property
    def done(self) -> int:
        """Steps done in this job."""
        return self.step - self.start


@dataclass(frozen=True)
class Window:
    """Times since the last update, and what was done in them."""

    times: RunningStats
    parts: dict[str, float]
    work: MeasuredConfig
    before: MeasuredConfig

    @property
    def tokens(self) -> float | None:
        return difference(self.work.tokens, self.before.tokens)

    @property
    def flops(self) -> float | None:
        return difference(self.work.flops, self.before.flops)


def difference(now: float | None, before: float | None) -> float | None:
    return None if now is None else now - (before or 0)


def sample_of(window: Window) -> list[float]:
    """This process's `SAMPLE`; -1 for what it does not know."""
    count = max(window.times.count, 1)
    known = (
        window.times.total / count,
        window.parts[DATA_LOADING] / count,
        window.parts[MODEL_FORWARD] / count,
        window.work.tokens,
        window.tokens,
        window.work.flops,
    )
    return [-1.0 if value is None else float(value) for value in known]


def training_attributes(
    progress: TrainingProgress,
    meter: IterationMeter,
    window: Window,
    config: TrainingConfig,
    rows: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Attributes of one `training_metrics_update`; `meter` is that of the job, the window's times included."""
    count, total = meter.count, meter.total
    told: dict[str, Any] = {
        "train_iterations_start": progress.start,
        "current_iteration": progress.step - 1,
        "num_iterations": count,
        "interval": progress.step - progress.updated,
        **meter.job.attributes("iteration_time_sec"),
        "window_avg_iteration_time_sec": _ratio(window.times.total, window.times.count),
        "window_min_iteration_time_sec": window.times.smallest if window.times.count else None,
        "window_max_iteration_time_sec": window.times.largest if window.times.count else None,
        "first_iteration_time_sec": meter.first,
        "steady_avg_iteration_time_sec": _ratio(total - (meter.first or 0.0), count - 1),
        "first_logged_train_iterations_finish_timestamp_sec": meter.first_finished_at,
        "last_logged_train_iterations_finish_timestamp_sec": meter.last_finished_at,
        "latest_loss": window.work.loss,
        "data_wait_share": _ratio(window.parts[DATA_LOADING], window.times.total),
        "avg_data_wait_share": _ratio(meter.part_total(DATA_LOADING), total),
        **window.work.memory,
    }
    for name, word in TIMED.items():
        told[f"avg_{word}_time_sec"] = _ratio(meter.part_total(name), count)
        told[f"total_{word}_time_sec"] = meter.part_total(name)
        told[f"window_avg_{word}_time_sec"] = _ratio(window.parts[name], window.times.count)
    told |= _samples(progress, count, config)
    told |= _work(progress, meter, window, config, rows)
    if len(rows) > 1:
        told |= stragglers(rows)
    return {key: value for key, value in told.items() if value is not None}


def _samples(progress: TrainingProgress, count: int, config: TrainingConfig) -> dict[str, Any]:
    batch = config.global_batch_size
    if not batch:
        return {"train_samples_start": progress.samples_start}
    start = progress.start * batch if progress.samples_start is None else progress.samples_start
    return {
        "train_samples_start": start,
        "num_train_samples": count * batch,
        "avg_batch_size": float(batch),
    }


def _work(
    progress: TrainingProgress,
    meter: IterationMeter,
    window: Window,
    config: TrainingConfig,
    rows: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Tokens and FLOPs: of this device, and, with every process's sample, of all."""
    world = max(len(rows), 1)
    total, busy = meter.total, window.times.total
    tokens = _sum(rows, "tokens") if rows else window.work.tokens
    window_tokens = _sum(rows, "window_tokens") if rows else window.tokens
    flops = _sum(rows, "flops") if rows else window.work.flops
    told = {
        "train_tokens": tokens,
        "tokens_per_second": _ratio(window_tokens, busy),
        "tokens_per_second_per_device": _ratio(window.tokens, busy),
        "avg_tokens_per_second": _ratio(tokens, total),
        "avg_tokens_per_second_per_device": _ratio(window.work.tokens, total),
    }
    if flops is None or not config.is_log_throughput_enabled or not meter.count:
        return told
    each = flops / meter.count
    told |= {
        "total_flops": flops,
        "completed_floating_point_operations_overall": flops + progress.start * each,
        "train_throughput_per_gpu": _ratio(flops, total * 1e12 * world),
        "train_throughput_per_gpu_max": _ratio(each, meter.job.smallest * 1e12 * world),
        "train_throughput_per_gpu_min": _ratio(each, meter.job.largest * 1e12 * world),
        "avg_tflops": _ratio(flops, total * 1e12),
    }
    if config.peak_tflops:
        peak = config.peak_tflops * 1e12
        told["mfu"] = _ratio(window.flops, busy * peak)
        told["avg_mfu"] = _ratio(window.work.flops, total * peak)
    return told


def stragglers(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Least, median and most of each time over the processes, and which process has the most.

    A slow process shows in its data loading and forward pass: in the backward pass all wait for it. The
    `straggler_ratio` is the most of both together, by the median.
    """
    told: dict[str, Any] = {}
    for index, name in enumerate(SAMPLE[:3]):
        values = [row[index] for row in rows]
        told[f"rank_{name}_time_min_sec"] = min(values)
        told[f"rank_{name}_time_median_sec"] = statistics.median(values)
        told[f"rank_{name}_time_max_sec"] = max(values)
        told[f"rank_{name}_time_slowest"] = values.index(max(values))
    own = [row[1] + row[2] for row in rows]
    told["slowest_rank"] = own.index(max(own))
    told["straggler_ratio"] = _ratio(max(own), statistics.median(own))
    return told


def _sum(rows: Sequence[Sequence[float]], name: str) -> float | None:
    values = [row[SAMPLE.index(name)] for row in rows]
    return None if min(values) < 0 else sum(values)


def _ratio(value: float | None, by: float) -> float | None:
    return None if value is None or by <= 0 else value / by


@dataclass(frozen=True)
class PreservedProgress:
    """What a checkpoint holds, read when saving it began: steps and samples of all jobs, seconds of this one."""

    step: int
    train_s: float
    validation_s: float
    samples: int | None = None
    tflops: float | None = None


class CheckpointMeter:
    """Counts and times of all saves of a job."""

    def __init__(self) -> None:
        self.attempts = 0
        self.successes = 0
        self.times = RunningStats()
        self.preserved: dict[int, PreservedProgress] = {}
        self._first_success: float | None = None

    def began(self, preserved: PreservedProgress, strategy: Strategy) -> dict[str, Any]:
        """Attributes of the save's span."""
        self.attempts += 1
        # A save that never came to an end leaves its entry behind; a job has few of them.
        self.preserved[preserved.step] = preserved
        return {
            "checkpoint_strategy": strategy,
            "current_iteration": preserved.step,
            "save_checkpoint_attempt_count": self.attempts,
        }

    def succeeded(
        self, step: int, strategy: Strategy, at_ns: int, started_s: float | None, size: int | None, folder: str | None
    ) -> dict[str, Any]:
        """Attributes of `save_checkpoint_success`."""
        self.successes += 1
        self._first_success = self._first_success or at_ns / 1e9
        told: dict[str, Any] = {
            "checkpoint_strategy": strategy,
            "current_iteration": step,
            "first_successful_save_checkpoint_timestamp_sec": self._first_success,
            "latest_successful_save_checkpoint_timestamp_sec": at_ns / 1e9,
            "save_checkpoint_success_count": self.successes,
            "training_start_timestamp_sec": started_s,
            "checkpoint_size": size,
            "checkpoint_directory": folder,
        }
        preserved = self.preserved.pop(step, None)
        if preserved is not None:
            told |= {
                "productive_train_iterations": preserved.step,
                "productive_train_samples": preserved.samples,
                "productive_train_iterations_sec": preserved.train_s,
                "productive_validation_iterations_sec": preserved.validation_s,
                "productive_train_tflops": preserved.tflops,
            }
        return told

    def took(self, seconds: float) -> dict[str, Any]:
        """Attributes of `sync_checkpoint_metrics_update`, after the loop was blocked for so long."""
        self.times.add(seconds)
        return {
            "save_checkpoint_sync_time_total_sec": self.times.total,
            "save_checkpoint_sync_time_avg_sec": self.times.total / self.times.count,
            "save_checkpoint_sync_time_min_sec": self.times.smallest,
            "save_checkpoint_sync_time_max_sec": self.times.largest,
        }
