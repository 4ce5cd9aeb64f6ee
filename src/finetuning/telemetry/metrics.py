"""From counts and times to the attributes of `training_metrics_update`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetuning.telemetry.config import Measured, TrainingConfig
from finetuning.telemetry.meters import TIMED, IterationMeter, Spread
from finetuning.telemetry.names import DATA_LOADING, MODEL_FORWARD

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
class Progress:
    """Where a training loop stands: steps are counted over all jobs, from 0; `updated` is that of the last update."""

    start: int = 0
    step: int = 0
    updated: int = 0
    samples_start: int | None = None
    last_work: Measured = field(default_factory=Measured)

    @property
    def done(self) -> int:
        """Steps done in this job."""
        return self.step - self.start


@dataclass(frozen=True)
class Window:
    """Times since the last update, and what was done in them."""

    times: Spread
    parts: dict[str, float]
    work: Measured
    before: Measured

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
    progress: Progress, meter: IterationMeter, window: Window, config: TrainingConfig, rows: Sequence[Sequence[float]]
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


def _samples(progress: Progress, count: int, config: TrainingConfig) -> dict[str, Any]:
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
    progress: Progress, meter: IterationMeter, window: Window, config: TrainingConfig, rows: Sequence[Sequence[float]]
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
