"""One job's telemetry: callbacks by One Logger's names, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.config import JobIdentity, TrainingConfig
from finetuning.telemetry.error_guard import TelemetryErrors, guarded
from finetuning.telemetry.metrics import (
    FIGURES,
    CheckpointMeter,
    PreservedProgress,
    ProgressFile,
    RunningStats,
    folder_bytes,
)
from finetuning.telemetry.spans import OpenSpan, SpanRecorder
from finetuning.telemetry.training_loop import TrainingCallbacks


class Telemetry(TrainingCallbacks):
    """Told what a job does, by callbacks (`on_…`) or by blocks (`with telemetry.training_loop(): …`).

    Nothing here raises: what goes wrong is in `faults`. Not for several threads at once, but for
    `checkpoint_save_finalization`, `span` and `event`.
    """

    def __init__(
        self,
        recorder: SpanRecorder,
        identity: JobIdentity,
        faults: TelemetryErrors | None = None,
        progress_file: ProgressFile | None = None,
        close_links: Callable[[], None] = lambda: None,
    ):
        super().__init__(recorder, identity, faults or TelemetryErrors(), progress_file)
        self.checkpoints = CheckpointMeter()
        self._close_links = close_links
        self._evaluations = {names.VALIDATION_LOOP: RunningStats(), names.TESTING_LOOP: RunningStats()}

    # The job

    @guarded
    def on_app_start(self, start_ns: int = 0) -> OpenSpan:
        """The application begins, or began at that time."""
        span = self.begin(names.APPLICATION, at_ns=start_ns)
        self.recorder.event(names.ONE_LOGGER_INITIALIZATION, self.identity.attributes(), span)
        self.faults.listen(self._mark_fault)
        for message in self.faults.messages:
            self._mark_fault(message)
        return span

    @guarded
    def on_app_end(self, error: BaseException | str | None = None) -> None:
        """The application ends; whatever is still open ends with it, marked."""
        if span := self.active(names.APPLICATION):
            if isinstance(error, BaseException):
                self.recorder.error(error, self.recorder.open_spans[-1])
            self.recorder.end(span, error=error)

    def close(self, error: BaseException | str | None = None) -> None:
        """Ends the application and lets go of files and links. Call it once, last."""
        self.on_app_end(error)
        self._let_go()

    @guarded
    def set_training_config(self, config: TrainingConfig) -> None:
        """Tells what the training is like; at any time after the application began, also once more."""
        self.config = config.resolved()
        self.recorder.event(names.UPDATE_CONFIG, self.config.attributes(), self.active(names.APPLICATION))

    # Validation and testing

    @guarded
    def on_validation_start(self, loop: str = names.VALIDATION_LOOP) -> OpenSpan:
        """A validation loop begins; `on_testing_start` is its like."""
        return self.begin(loop)

    @guarded
    def on_validation_end(
        self, loop: str = names.VALIDATION_LOOP, error: BaseException | None = None, **attributes: Any
    ) -> None:
        """The loop ends, and its metrics are told."""
        span = self.active(loop)
        if span is None:
            return
        is_validation = loop == names.VALIDATION_LOOP
        event = names.VALIDATION_METRICS_UPDATE if is_validation else names.TESTING_METRICS_UPDATE
        told = {
            "current_iteration": max(self.progress.step - 1, 0),
            "interval": self.progress.step - self._evaluated_at[loop],
            **self._evaluations[loop].attributes("iteration_time_sec"),
        }
        self._evaluated_at[loop] = self.progress.step
        if error is None:
            self.recorder.event(event, told | attributes, span)
        self.end(loop, error)

    def on_testing_start(self) -> OpenSpan | None:
        return self.on_validation_start(names.TESTING_LOOP)

    def on_testing_end(self, error: BaseException | None = None, **attributes: Any) -> None:
        self.on_validation_end(names.TESTING_LOOP, error, **attributes)

    @guarded
    def on_validation_single_iteration_start(self, loop: str = names.VALIDATION_LOOP) -> None:
        name = _EVALUATION_STEPS[loop]
        now = self.began[name] = self.recorder.clock.now_ns()
        if self.writes(name):
            self.begin(name, at_ns=now)

    @guarded
    def on_validation_single_iteration_end(self, loop: str = names.VALIDATION_LOOP) -> None:
        name = _EVALUATION_STEPS[loop]
        if (began := self.began.pop(name, None)) is not None:
            now = self.recorder.clock.now_ns()
            self._evaluations[loop].add((now - began) / 1e9)
            if self.writes(name):
                self.end(name, at_ns=now)

    # Checkpoints

    @guarded
    def on_save_checkpoint_start(self, global_step: int | None = None, *, at_ns: int = 0) -> OpenSpan:
        """Saving begins; under the async strategy, the part of it that blocks training."""
        step = self.progress.step if global_step is None else global_step
        flops, batch = self._measured().flops, self.config.global_batch_size
        preserved = PreservedProgress(
            step,
            self.meter.total,
            self._evaluations[names.VALIDATION_LOOP].total,
            samples=step * batch if batch else None,
            tflops=flops / max(self.progress.done, 1) * step * self.identity.world_size / 1e12 if flops else None,
        )
        strategy = self.config.save_checkpoint_strategy
        name = names.CHECKPOINT_SAVE_SYNC if strategy == "sync" else names.CHECKPOINT_SAVE_ASYNC
        return self.begin(name, self.checkpoints.began(preserved, strategy), at_ns=at_ns)

    @guarded
    def on_save_checkpoint_success(
        self, global_step: int | None = None, directory: Path | str | None = None, size: int | None = None
    ) -> None:
        """The checkpoint is safe on disk. Its size is counted where only its folder is told."""
        step = self.progress.step if global_step is None else global_step
        if directory is not None and size is None:
            size = folder_bytes(Path(directory))
        strategy = self.config.save_checkpoint_strategy
        preserved = self.checkpoints.preserved.get(step)
        told = self.checkpoints.succeeded(
            step,
            strategy,
            self.recorder.clock.now_ns(),
            self._training_started,
            size,
            None if directory is None else str(directory),
        )
        span = self.active(names.CHECKPOINT_SAVE_SYNC if strategy == "sync" else names.APPLICATION)
        self.recorder.event(names.SAVE_CHECKPOINT_SUCCESS, told, span)
        self._saved = (step, preserved.train_s if preserved else self.meter.total)
        self._note_progress(force=True)

    @guarded
    def on_save_checkpoint_end(self, error: BaseException | None = None) -> None:
        """Saving no longer blocks training."""
        strategy = self.config.save_checkpoint_strategy
        name = names.CHECKPOINT_SAVE_SYNC if strategy == "sync" else names.CHECKPOINT_SAVE_ASYNC
        if span := self.active(name):
            now = self.recorder.clock.now_ns()
            told = self.checkpoints.took((now - span.start_ns) / 1e9)
            self.recorder.event(names.SYNC_CHECKPOINT_METRICS_UPDATE, told, span, at_ns=now)
            self.end(name, error, at_ns=now)

    # What is told only when it is over

    @guarded
    def validated_since(self, start_ns: int) -> None:
        """A validation ran from that time until now."""
        self.begin(names.VALIDATION_LOOP, at_ns=start_ns)
        self.on_validation_end()

    @guarded
    def saved_since(self, start_ns: int, global_step: int, directory: Path) -> None:
        """A checkpoint was saved from that time until now."""
        self.on_save_checkpoint_start(global_step, at_ns=start_ns)
        self.on_save_checkpoint_success(global_step, directory)
        self.on_save_checkpoint_end()

    # What is kept

    def summary(self) -> Mapping[str, Any]:
        """The last figures, for a record of the run."""
        wanted = [*FIGURES, *_SUMMARY]
        return {name: self.latest[name] for name in wanted if name in self.latest} | {
            "checkpoints_saved": self.checkpoints.successes,
            "checkpoint_time_sec": self.checkpoints.times.total,
        }

    def _mark_fault(self, message: str) -> None:
        told = {"telemetry_data_error_type": "incomplete_telemetry_data", "error_message": message}
        self.recorder.event(names.TELEMETRY_DATA_ERROR, told, self.active(names.APPLICATION))

    @guarded
    def _let_go(self) -> None:
        self.faults.listen(None)
        if self._progress_file is not None:
            self._progress_file.close()
            self._progress_file = None
        self._close_links()
        self.recorder.shut_down()


_EVALUATION_STEPS = {
    names.VALIDATION_LOOP: names.VALIDATION_SINGLE_ITERATION,
    names.TESTING_LOOP: names.TESTING_SINGLE_ITERATION,
}
_SUMMARY = (
    "avg_iteration_time_sec",
    "steady_avg_iteration_time_sec",
    "avg_data_wait_share",
    "avg_tokens_per_second",
    "avg_tokens_per_second_per_device",
    "avg_mfu",
    "train_tokens",
    "total_flops",
    "slowest_rank",
)
