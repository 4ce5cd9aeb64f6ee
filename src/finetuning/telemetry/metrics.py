"""Measures iterations and checkpoints, and turns the measurements into attributes of One Logger's events.

Measuring happens at each step and is cheap; attributes are made at each update (every N steps).
"""

from __future__ import annotations

import operator
import os
import resource
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.telemetry.config import AttributeValues, ProcessTotals, ResolvedTrainingConfig, Strategy
from finetuning.telemetry.names import DATA_LOADING, MODEL_FORWARD, PHASE_NAMES

if TYPE_CHECKING:
    import torch

SAMPLE_FIELDS = ("iteration", "dataloader", "forward", "tokens", "window_tokens", "flops")
"""What processes exchange at an update: mean seconds of the window's iterations, of data loading and of forward passes;
tokens of the job and of the window; FLOPs of the job. -1 for what is not known."""
_RANK_TIMES = SAMPLE_FIELDS[:3]

LOOP_NOT_STARTED, RUNNING, COMPLETED, FAILED = range(4)
"""States of the training loop and of the application in a progress file."""
CATEGORIES = ("checkpoint_save", "checkpoint_load", "evaluation", "publication")
"""What a job spends time on outside of its steps."""


class RunningStats:
    """Count, total, minimum and maximum of the values added so far."""

    __slots__ = ("count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.minimum = float("inf")
        self.maximum = 0.0

    def add(self, value: float) -> None:
        """Add one value, which must not be negative."""
        self.count += 1
        self.total += value
        if value < self.minimum:
            self.minimum = value
        if value > self.maximum:
            self.maximum = value

    def merge(self, stats: RunningStats) -> None:
        """Add all values of another object."""
        self.count += stats.count
        self.total += stats.total
        self.minimum = min(self.minimum, stats.minimum)
        self.maximum = max(self.maximum, stats.maximum)

    def attributes(self, name: str) -> dict[str, float]:
        """Return `avg_NAME`, `min_NAME`, `max_NAME` and `total_NAME`; nothing before a value was added."""
        if not self.count:
            return {}
        return {
            f"avg_{name}": self.total / self.count,
            f"min_{name}": self.minimum,
            f"max_{name}": self.maximum,
            f"total_{name}": self.total,
        }


class IterationMeter:
    """Seconds of iterations and of their phases: of the job up to the last update, and of the window since then."""

    def __init__(self) -> None:
        self.job = RunningStats()
        self.window = RunningStats()
        self.phases: dict[str, float] = {}
        self.window_phases: dict[str, float] = {}
        self.first: float | None = None
        self.first_finished_at: float | None = None
        self.last_finished_at: float | None = None

    def add_iteration(self, seconds: float, finished_ns: int) -> None:
        """Add an iteration that ended at a time in ns since 1970."""
        self.window.add(seconds)
        if self.first is None:
            self.first = seconds
            self.first_finished_at = finished_ns / 1e9
        self.last_finished_at = finished_ns / 1e9

    def add_phase(self, name: str, seconds: float) -> None:
        """Add time to a phase of the current iteration. Names that are not phases are ignored."""
        if name in PHASE_NAMES:
            self.window_phases[name] = self.window_phases.get(name, 0.0) + seconds

    @property
    def total(self) -> float:
        """Seconds of all iterations."""
        return self.job.total + self.window.total

    @property
    def count(self) -> int:
        """The number of iterations."""
        return self.job.count + self.window.count

    def phase_total(self, name: str) -> float | None:
        """Return the seconds that all iterations spent in a phase; None if it was never measured."""
        if name not in self.phases and name not in self.window_phases:
            return None
        return self.phases.get(name, 0.0) + self.window_phases.get(name, 0.0)

    def close_window(self) -> tuple[RunningStats, dict[str, float]]:
        """Return the times of iterations and phases since the last call, and add them to the job's."""
        window, phases = self.window, self.window_phases
        self.job.merge(window)
        for name, seconds in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds
        self.window, self.window_phases = RunningStats(), {}
        return window, phases


@dataclass
class JobProgress:
    """What a job has done, whether or not it is exported. Steps count from 0 over all jobs; `_s` are seconds.

    The first eight fields are all that earlier versions wrote. NaN is a time that was not measured.
    """

    start: int = 0
    step: int = 0
    time_ns: int = 0
    """When the process was last alive, in ns since 1970."""
    saved: int = -1
    iterations_s: float = 0.0
    data_s: float = float("nan")
    first_s: float = 0.0
    saved_s: float = 0.0
    process_start_ns: int = 0
    """When the operating system started the process; 0 if it does not say."""
    application_start_ns: int = 0
    loop_start_ns: int = 0
    """When the first training loop began."""
    marked_ns: int = 0
    """When the job last began or ended something."""
    loop_state: int = LOOP_NOT_STARTED
    application_state: int = RUNNING
    open_category: int = -1
    """Index in `CATEGORIES` of what was going on when this was written; -1 for none."""
    open_since_ns: int = 0
    earlier_steps: int = 0
    """Steps of the training loops that this process ran before the present one, and which it built on."""
    earlier_lost_steps: int = 0
    earlier_s: float = 0.0
    earlier_lost_s: float = 0.0
    initial_load_s: float = 0.0
    """The part of `checkpoint_load_s` before the training loop."""
    checkpoint_save_s: float = 0.0
    checkpoint_load_s: float = 0.0
    evaluation_s: float = 0.0
    publication_s: float = 0.0

    @property
    def is_completed(self) -> bool:
        """Whether the training loop and then the application ended without an error."""
        return self.loop_state == COMPLETED and self.application_state == COMPLETED

    def pack(self) -> bytes:
        """Return the content of a progress file."""
        return _PROGRESS.pack(*_PROGRESS_VALUES(self))


_PROGRESS = struct.Struct("<" + "".join("d" if item.type == "float" else "q" for item in fields(JobProgress)))
_PROGRESS_VALUES = operator.attrgetter(*(item.name for item in fields(JobProgress)))
_EARLIER_PROGRESS = struct.Struct("<4q4d")
_TIME_OFFSET = 16


class ProgressFile:
    """A `JobProgress` on disk, overwritten after steps: what a killed job had done.

    Writing takes at most about 1 % of the time, however slow the disk is. A thread writes the time, so that a process
    that hangs is known to have been alive until it was killed.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.time_ns, *, interval_s: float = 2.0):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._next_write = 0.0
        self._now_ns = now_ns
        self._closed = threading.Event()
        self._heartbeat = threading.Thread(target=self._write_time, args=(interval_s,), daemon=True)
        self._heartbeat.start()

    def write(self, progress: JobProgress, *, force: bool = False) -> None:
        """Write the progress, unless the last write was too recent and `force` is not set.

        Raises:
            OSError: it cannot be written.
        """
        started = time.perf_counter()
        if started < self._next_write and not force:
            return
        progress.time_ns = progress.marked_ns = self._now_ns()
        os.pwrite(self._descriptor, progress.pack(), 0)
        ended = time.perf_counter()
        self._next_write = ended + 100 * (ended - started)

    def _write_time(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            try:
                # Not before the first complete record.
                if os.fstat(self._descriptor).st_size >= _PROGRESS.size:
                    os.pwrite(self._descriptor, struct.pack("<q", self._now_ns()), _TIME_OFFSET)
            except OSError:
                return

    def close(self) -> None:
        """Close the file."""
        self._closed.set()
        self._heartbeat.join(1.0)
        os.close(self._descriptor)


def read_progress(path: Path) -> JobProgress | None:
    """Read a progress file; None if there is none or it is not complete."""
    try:
        content = path.read_bytes()
        if len(content) >= _PROGRESS.size:
            return JobProgress(*_PROGRESS.unpack(content[: _PROGRESS.size]))
        return JobProgress(*_EARLIER_PROGRESS.unpack(content[: _EARLIER_PROGRESS.size]))
    except (OSError, struct.error):
        return None


_ended_jobs_ns: list[int] = []
"""When the jobs of this process ended. A process may run several, with a telemetry each."""


def job_ended(now_ns: int) -> None:
    """Remember that this process's job ended: the next one does not begin with the process."""
    _ended_jobs_ns.append(now_ns)


def process_start_ns(now_ns: int) -> int:
    """Return when this process started, or its last job ended, in ns since 1970; 0 if the system does not say."""
    try:
        # Field 22 of the line; the second is a name that may contain spaces.
        fields_after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields_after_name[19]) / os.sysconf("SC_CLK_TCK")
        process_ns = now_ns - round((time.clock_gettime(time.CLOCK_BOOTTIME) - started_s) * 1e9)
        return max([process_ns, *_ended_jobs_ns[-1:]])
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


@dataclass
class TrainingProgress:
    """Progress of a training loop. Steps count from 0 over all jobs; `updated` is the step of the last update."""

    start: int = 0
    step: int = 0
    updated: int = 0
    samples_start: int | None = None
    last_totals: ProcessTotals = field(default_factory=ProcessTotals)
    flops_start: float | None = None
    """FLOPs of the steps before `start`, over all processes; estimated where the config does not say."""

    @property
    def steps_done(self) -> int:
        """Steps done in this job."""
        return self.step - self.start


@dataclass(frozen=True)
class Window:
    """Times since the last update, and the totals of the process now and then."""

    times: RunningStats
    phases: dict[str, float]
    totals: ProcessTotals
    previous: ProcessTotals

    @property
    def tokens(self) -> float | None:
        """Tokens of this process in the window."""
        return _difference(self.totals.tokens, self.previous.tokens)

    @property
    def flops(self) -> float | None:
        """FLOPs of this process in the window."""
        return _difference(self.totals.flops, self.previous.flops)


def sample_of(window: Window) -> list[float]:
    """Return the values of `SAMPLE_FIELDS` for this process."""
    count = max(window.times.count, 1)
    values = (
        window.times.total / count,
        _ratio(window.phases.get(DATA_LOADING), count),
        _ratio(window.phases.get(MODEL_FORWARD), count),
        window.totals.tokens,
        window.tokens,
        window.totals.flops,
    )
    return [-1.0 if value is None else float(value) for value in values]


def training_attributes(
    progress: TrainingProgress,
    meter: IterationMeter,
    window: Window,
    config: ResolvedTrainingConfig,
    samples: Sequence[Sequence[float]],
    world_size: int = 1,
) -> AttributeValues:
    """Return the attributes of a `training_metrics_update` event. What was not measured is left out.

    Args:
        meter: the times of the job, with the window's already added.
        samples: the `SAMPLE_FIELDS` of every process, in the order of ranks; without them, all processes are taken to
            do as much as this one.
    """
    count, total = meter.count, meter.total
    attributes: AttributeValues = {
        "train_iterations_start": progress.start,
        "current_iteration": progress.step - 1,
        "num_iterations": count,
        "interval": progress.step - progress.updated,
        **meter.job.attributes("iteration_time_sec"),
        "window_avg_iteration_time_sec": _ratio(window.times.total, window.times.count),
        "window_min_iteration_time_sec": window.times.minimum if window.times.count else None,
        "window_max_iteration_time_sec": window.times.maximum if window.times.count else None,
        "first_iteration_time_sec": meter.first,
        # The first iteration includes compilation and allocation.
        "steady_avg_iteration_time_sec": _ratio(total - (meter.first or 0.0), count - 1),
        "first_logged_train_iterations_finish_timestamp_sec": meter.first_finished_at,
        "last_logged_train_iterations_finish_timestamp_sec": meter.last_finished_at,
        "latest_loss": window.totals.loss,
        "data_wait_share": _ratio(window.phases.get(DATA_LOADING), window.times.total),
        "avg_data_wait_share": _ratio(meter.phase_total(DATA_LOADING), total),
        **window.totals.memory,
    }
    for name, label in PHASE_NAMES.items():
        attributes[f"avg_{label}_time_sec"] = _ratio(meter.phase_total(name), count)
        attributes[f"total_{label}_time_sec"] = meter.phase_total(name)
        attributes[f"window_avg_{label}_time_sec"] = _ratio(window.phases.get(name), window.times.count)
    attributes |= _sample_counts(progress, count, config)
    attributes |= _throughput(progress, meter, window, config, samples, world_size)
    if len(samples) > 1:
        attributes |= straggler_metrics(samples)
    return {key: value for key, value in attributes.items() if value is not None}


def samples_start(progress: TrainingProgress, config: ResolvedTrainingConfig) -> int | None:
    """Return the samples of the steps before this job's, over all processes."""
    if progress.samples_start is not None or not config.global_batch_size:
        return progress.samples_start
    return progress.start * config.global_batch_size


def _sample_counts(progress: TrainingProgress, count: int, config: ResolvedTrainingConfig) -> AttributeValues:
    counts: AttributeValues = {"train_samples_start": samples_start(progress, config)}
    if batch := config.global_batch_size:
        counts |= {"num_train_samples": count * batch, "avg_batch_size": float(batch)}
    return counts


def _throughput(
    progress: TrainingProgress,
    meter: IterationMeter,
    window: Window,
    config: ResolvedTrainingConfig,
    samples: Sequence[Sequence[float]],
    world_size: int,
) -> AttributeValues:
    """Return tokens, FLOPs and their rates: over all processes, and per device where the name says so."""
    world_size = len(samples) or world_size
    total, window_s = meter.total, window.times.total
    tokens = _sum(samples, "tokens") if samples else _times(window.totals.tokens, world_size)
    window_tokens = _sum(samples, "window_tokens") if samples else _times(window.tokens, world_size)
    flops = _sum(samples, "flops") if samples else _times(window.totals.flops, world_size)
    attributes: AttributeValues = {"train_tokens": _whole(tokens)}
    if not config.is_log_throughput_enabled:
        return attributes
    attributes |= {
        "tokens_per_second": _ratio(window_tokens, window_s),
        "tokens_per_second_per_device": _ratio(window.tokens, window_s),
        "avg_tokens_per_second": _ratio(tokens, total),
        "avg_tokens_per_second_per_device": _ratio(window.totals.tokens, total),
    }
    if flops is None or not meter.count:
        return attributes
    per_iteration = flops / meter.count
    attributes |= {
        "total_flops": _whole(flops),
        "completed_floating_point_operations_overall": _whole(flops_overall(progress, flops, config)),
        "train_throughput_per_gpu": _ratio(flops, total * 1e12 * world_size),
        "train_throughput_per_gpu_max": _ratio(per_iteration, meter.job.minimum * 1e12 * world_size),
        "train_throughput_per_gpu_min": _ratio(per_iteration, meter.job.maximum * 1e12 * world_size),
        "avg_tflops": _ratio(flops, total * 1e12),
    }
    if config.peak_tflops:
        peak = config.peak_tflops * 1e12
        attributes["mfu"] = _ratio(window.flops, window_s * peak)
        attributes["avg_mfu"] = _ratio(window.totals.flops, total * peak)
    return attributes


def flops_overall(progress: TrainingProgress, flops: float, config: ResolvedTrainingConfig) -> float:
    """Return the FLOPs of all jobs over all processes, given those of this one. It never falls within a job.

    Where the config does not say what a sample costs, the earlier steps count like the first ones of this job.
    """
    if progress.flops_start is None:
        samples = samples_start(progress, config)
        if config.flops_per_sample and samples is not None:
            progress.flops_start = samples * config.flops_per_sample
        elif progress.steps_done:
            progress.flops_start = progress.start * flops / progress.steps_done
    return flops + (progress.flops_start or 0.0)


def straggler_metrics(samples: Sequence[Sequence[float]]) -> AttributeValues:
    """Return minimum, median and maximum of each time over the processes, and the rank that has the maximum.

    A slow process shows in its data loading and forward pass only: the gradient all-reduce makes all processes wait
    for it in the backward pass. `straggler_ratio` is the maximum of both together divided by their median. Times that
    a process did not measure are left out.
    """
    attributes: AttributeValues = {}
    for index, name in enumerate(_RANK_TIMES):
        values = [sample[index] for sample in samples]
        if min(values) < 0:
            continue
        attributes[f"rank_{name}_time_min_sec"] = min(values)
        attributes[f"rank_{name}_time_median_sec"] = statistics.median(values)
        attributes[f"rank_{name}_time_max_sec"] = max(values)
        attributes[f"rank_{name}_time_slowest"] = values.index(max(values))
    if all(sample[1] >= 0 and sample[2] >= 0 for sample in samples):
        not_waiting = [sample[1] + sample[2] for sample in samples]
        attributes["slowest_rank"] = not_waiting.index(max(not_waiting))
        attributes["straggler_ratio"] = _ratio(max(not_waiting), statistics.median(not_waiting))
    return attributes


def _times(value: float | None, factor: int) -> float | None:
    return None if value is None else value * factor


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None else now - (before or 0)


def _sum(samples: Sequence[Sequence[float]], name: str) -> float | None:
    values = [sample[SAMPLE_FIELDS.index(name)] for sample in samples]
    return None if min(values) < 0 else sum(values)


def _ratio(value: float | None, by: float) -> float | None:
    return None if value is None or by <= 0 else value / by


@dataclass(frozen=True)
class CheckpointProgress:
    """What a checkpoint contains, measured when saving began: steps and samples of all jobs, seconds of this one."""

    step: int
    train_s: float
    validation_s: float | None
    samples: int | None = None
    tflops: float | None = None


class CheckpointMeter:
    """Counts and times the checkpoints of a job."""

    def __init__(self) -> None:
        self.attempts = 0
        self.successes = 0
        self.times = RunningStats()
        self.progress: dict[int, CheckpointProgress] = {}
        self._first_success_s: float | None = None

    def start_save(self, step: int, progress: CheckpointProgress, strategy: Strategy) -> AttributeValues:
        """Return the attributes of the save's span."""
        self.attempts += 1
        # The entry of a save that fails is never removed; a job has few of them.
        self.progress[step] = progress
        return {
            "checkpoint_strategy": strategy,
            "current_iteration": step,
            "save_checkpoint_attempt_count": self.attempts,
        }

    def finish_save(
        self,
        step: int,
        strategy: Strategy,
        finished_ns: int,
        training_started_s: float | None,
        size: int | None,
        folder: str | None,
    ) -> AttributeValues:
        """Return the attributes of the `save_checkpoint_success` event; `size` is in bytes."""
        self.successes += 1
        self._first_success_s = self._first_success_s or finished_ns / 1e9
        attributes: AttributeValues = {
            "checkpoint_strategy": strategy,
            "current_iteration": step,
            "first_successful_save_checkpoint_timestamp_sec": self._first_success_s,
            "latest_successful_save_checkpoint_timestamp_sec": finished_ns / 1e9,
            "save_checkpoint_success_count": self.successes,
            "training_start_timestamp_sec": training_started_s,
            "checkpoint_size": size,
            "checkpoint_directory": folder,
        }
        progress = self.progress.pop(step, None)
        if progress is not None:
            attributes |= {
                "productive_train_iterations": progress.step,
                "productive_train_samples": progress.samples,
                "productive_train_iterations_sec": progress.train_s,
                "productive_validation_iterations_sec": progress.validation_s,
                "productive_train_tflops": progress.tflops,
            }
        return attributes

    def add_blocking_time(self, seconds: float) -> AttributeValues:
        """Add the time that a save blocked training. Return the attributes of `sync_checkpoint_metrics_update`."""
        self.times.add(seconds)
        return {
            "save_checkpoint_sync_time_total_sec": self.times.total,
            "save_checkpoint_sync_time_avg_sec": self.times.total / self.times.count,
            "save_checkpoint_sync_time_min_sec": self.times.minimum,
            "save_checkpoint_sync_time_max_sec": self.times.maximum,
        }


def folder_size(folder: Path) -> int | None:
    """Return the bytes of all files below a folder, or of a single file; None if it does not exist."""
    if folder.is_file():
        return folder.stat().st_size
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def device_name(device: torch.device) -> str:
    """Return the hardware name of a CUDA device; the device type of any other."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory in bytes since the job began, by attribute name.

    It includes this process's host memory, and on CUDA the device's allocated, reserved and total memory.
    """
    import torch

    # getrusage reports kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        memory["peak_memory_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        memory["peak_memory_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        memory["memory_total_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return memory
