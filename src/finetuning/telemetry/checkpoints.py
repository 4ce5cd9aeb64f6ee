"""Checkpoints as telemetry sees them: attempts, successes, what they cost, and what they preserve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetuning.telemetry.config import Strategy
from finetuning.telemetry.meters import Spread


@dataclass(frozen=True)
class Preserved:
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
        self.times = Spread()
        self.preserved: dict[int, Preserved] = {}
        self._first_success: float | None = None

    def began(self, preserved: Preserved, strategy: Strategy) -> dict[str, Any]:
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
