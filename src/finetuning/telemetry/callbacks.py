"""One Logger's callbacks: a job calls them during training, and telemetry measures and records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.config import JobIdentity, ProcessTotals, ResolvedTrainingConfig, TrainingConfig
from finetuning.telemetry.error_guard import TelemetryErrors, guarded
from finetuning.telemetry.metrics import (
    CheckpointMeter,
    CheckpointProgress,
    IterationMeter,
    ProgressFile,
    RunningStats,
    TrainingProgress,
    Window,
    folder_size,
    sample_of,
    training_attributes,
)
from finetuning.telemetry.spans import OpenSpan, SpanRecorder, StandardSpans

_EVALUATION_ITERATIONS = {
    names.VALIDATION_LOOP: names.VALIDATION_SINGLE_ITERATION,
    names.TESTING_LOOP: names.TESTING_SINGLE_ITERATION,
}
_SUMMARY = (
    *names.TRACKED_METRICS,
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


class TelemetryCallbacks(StandardSpans):
    """Records a job by callbacks with One Logger's names.

    No method raises; errors are collected in `errors`. It is not thread-safe, except for `span`, `event` and
    `checkpoint_save_finalization`.

    Args:
        progress_file: where the progress is written after steps; None to not write it.
        close_exporters: called last, to send what is queued.
    """

    def __init__(
        self,
        recorder: SpanRecorder,
        identity: JobIdentity,
        errors: TelemetryErrors | None = None,
        progress_file: ProgressFile | None = None,
        close_exporters: Callable[[], object] = lambda: None,
    ):
        super().__init__(recorder, errors or TelemetryErrors())
        self.identity = identity
        self.config = ResolvedTrainingConfig()
        self.progress = TrainingProgress()
        self.checkpoints = CheckpointMeter()
        self.latest: dict[str, Any] = {}
        """The attributes of the last update."""
        self.latest_loss: float | None = None
        self._progress_file = progress_file
        self._close_exporters = close_exporters
        self._measure: Callable[[], ProcessTotals] | None = None
        self._tokens: float | None = None
        self._evaluations = {names.VALIDATION_LOOP: RunningStats(), names.TESTING_LOOP: RunningStats()}
        self._evaluated_at = {names.VALIDATION_LOOP: 0, names.TESTING_LOOP: 0}
        self._training_started_s: float | None = None
        # Step and iteration seconds of the last checkpoint.
        self._saved = (-1, 0.0)

    # Job

    @guarded
    def on_app_start(self, start_ns: int = 0) -> OpenSpan | None:
        """Begin the application, now or at a time in ns since 1970."""
        span = self.begin(names.APPLICATION, at_ns=start_ns)
        self.recorder.event(names.ONE_LOGGER_INITIALIZATION, self.identity.attributes(), span)
        self.errors.set_listener(self._mark_error)
        for message in self.errors.messages:
            self._mark_error(message)
        return span

    @guarded
    def on_app_end(self, error: BaseException | str | None = None) -> None:
        """End the application, and with an error every span that is still open."""
        if span := self.active(names.APPLICATION):
            if isinstance(error, BaseException):
                self.recorder.error(error, self.recorder.open_spans[-1])
            self.recorder.end(span, error=error)

    def close(self, error: BaseException | str | None = None) -> None:
        """End the application, and close files and connections. Call it once, last."""
        self.on_app_end(error)
        self._release()

    @guarded
    def set_training_config(self, config: TrainingConfig) -> None:
        """Set what the metrics need to know. It may be called again with a better config."""
        self.config = config.resolve()
        self.recorder.event(names.UPDATE_CONFIG, self.config.attributes(), self.active(names.APPLICATION))

    def summary(self) -> Mapping[str, Any]:
        """Return the last metrics, for the run record."""
        return {name: self.latest[name] for name in _SUMMARY if name in self.latest} | {
            "checkpoints_saved": self.checkpoints.successes,
            "checkpoint_time_sec": self.checkpoints.times.total,
        }

    # Training loop

    def measure_with(self, measure: Callable[[], ProcessTotals]) -> None:
        """Call `measure` at each update for what this process has done, instead of counting what is passed."""
        self._measure = measure

    @guarded
    def on_train_start(
        self, train_iterations_start: int = 0, train_samples_start: int | None = None, **attributes: Any
    ) -> OpenSpan | None:
        """Begin the training loop at this step. A loop that has not ended ends with an error."""
        config, self.meter = self.config, IterationMeter()
        self.progress = TrainingProgress(
            train_iterations_start, train_iterations_start, train_iterations_start, train_samples_start
        )
        self._saved = (-1, 0.0)
        self._evaluated_at = dict.fromkeys(self._evaluated_at, train_iterations_start)
        batch, samples = config.global_batch_size, train_samples_start
        if samples is None and batch:
            samples = train_iterations_start * batch
        target, flops = config.train_samples_target, config.flops_per_sample
        start_attributes = {
            "train_iterations_start": train_iterations_start,
            "train_samples_start": samples,
            "train_iterations_target": config.train_iterations_target,
            "train_samples_target": target,
            "train_tokens_target": config.seq_length * target if config.seq_length and target else None,
            "completed_floating_point_operations_overall": samples * flops if samples and flops else None,
        }
        self._training_started_s = self.recorder.clock.now_ns() / 1e9
        span = self.begin(names.TRAINING_LOOP, start_attributes | attributes)
        self._write_progress(force=True)
        return span

    @guarded
    def on_train_end(self, error: BaseException | str | None = None) -> None:
        """End the training loop. Steps since the last update get an update first."""
        if error is None and self.progress.step > self.progress.updated:
            self.update_training_metrics()
        self._write_progress(force=True)
        self.end(names.TRAINING_LOOP, error)

    @guarded
    def on_training_single_iteration_start(self, start_ns: int = 0) -> None:
        """Begin an optimizer step.

        Args:
            start_ns: when data loading began, in ns since 1970; the time since then counts as data loading. 0 if it
                is still to come.
        """
        now = self.recorder.clock.now_ns()
        started = self._started_ns[names.TRAINING_SINGLE_ITERATION] = start_ns or now
        if self._exported[names.TRAINING_SINGLE_ITERATION]:
            self.begin(names.TRAINING_SINGLE_ITERATION, at_ns=started)
        self.meter.add_phase(names.DATA_LOADING, (now - started) / 1e9)

    @guarded
    def on_training_single_iteration_end(
        self, *, tokens: float | None = None, loss: float | None = None, update: bool = True
    ) -> None:
        """End an optimizer step.

        Args:
            tokens: the tokens of the step in this process.
            update: whether to emit an update every N steps; otherwise the caller does.
        """
        started = self._started_ns.pop(names.TRAINING_SINGLE_ITERATION, None)
        if started is None:
            return
        now = self.recorder.clock.now_ns()
        self.meter.add_iteration((now - started) / 1e9, now)
        if self._exported[names.TRAINING_SINGLE_ITERATION]:
            self.end(names.TRAINING_SINGLE_ITERATION, at_ns=now)
        self.progress.step += 1
        if tokens is not None:
            self._tokens = (self._tokens or 0.0) + tokens
        if loss is not None:
            self.latest_loss = loss
        self._write_progress()
        if update and self.progress.step % self.config.log_every_n_train_iterations == 0:
            self.update_training_metrics()

    @guarded
    def discard_iteration(self) -> None:
        """Discard the iteration that has begun: the data ended before it had a row."""
        self._started_ns.pop(names.TRAINING_SINGLE_ITERATION, None)
        if span := self.active(names.TRAINING_SINGLE_ITERATION):
            self.recorder.end(span, error="no rows were left")

    @guarded
    def fail_iteration(self, error: BaseException) -> None:
        """End the iteration with an error."""
        self._started_ns.pop(names.TRAINING_SINGLE_ITERATION, None)
        self.recorder.error(error)
        self.end(names.TRAINING_SINGLE_ITERATION, error)

    @guarded
    def sample(self) -> list[float]:
        """Return what this process shares with the others at an update; see `metrics.SAMPLE_FIELDS`."""
        return sample_of(self._window(self.meter.window, self.meter.window_phases))

    @guarded
    def update_training_metrics(self, samples: Sequence[Sequence[float]] = ()) -> dict[str, float]:
        """Emit `training_metrics_update` and return the metrics for trackers.

        Args:
            samples: the result of `sample` of every process, in the order of ranks.
        """
        times, phases = self.meter.close_window()
        window = self._window(times, phases)
        attributes = training_attributes(self.progress, self.meter, window, self.config, samples)
        self.recorder.event(names.TRAINING_METRICS_UPDATE, attributes, self.active(names.TRAINING_LOOP))
        self.progress = replace(self.progress, updated=self.progress.step, last_totals=window.totals)
        self.latest = attributes
        return {metric: attributes[name] for name, metric in names.TRACKED_METRICS.items() if name in attributes}

    # Validation and testing

    @guarded
    def on_validation_start(self, loop: str = names.VALIDATION_LOOP) -> OpenSpan | None:
        """Begin a validation loop, or the testing loop."""
        return self.begin(loop)

    @guarded
    def on_validation_end(
        self, loop: str = names.VALIDATION_LOOP, error: BaseException | None = None, **attributes: Any
    ) -> None:
        """End the loop. Without an error its metrics are emitted."""
        span = self.active(loop)
        if span is None:
            return
        is_validation = loop == names.VALIDATION_LOOP
        event = names.VALIDATION_METRICS_UPDATE if is_validation else names.TESTING_METRICS_UPDATE
        loop_attributes = {
            "current_iteration": max(self.progress.step - 1, 0),
            "interval": self.progress.step - self._evaluated_at[loop],
            **self._evaluations[loop].attributes("iteration_time_sec"),
        }
        self._evaluated_at[loop] = self.progress.step
        if error is None:
            self.recorder.event(event, loop_attributes | attributes, span)
        self.end(loop, error)

    def on_testing_start(self) -> OpenSpan | None:
        """Begin the testing loop."""
        return self.on_validation_start(names.TESTING_LOOP)

    def on_testing_end(self, error: BaseException | None = None, **attributes: Any) -> None:
        """End the testing loop."""
        self.on_validation_end(names.TESTING_LOOP, error, **attributes)

    @guarded
    def on_validation_single_iteration_start(self, loop: str = names.VALIDATION_LOOP) -> None:
        """Begin a batch of a validation or testing loop."""
        name = _EVALUATION_ITERATIONS[loop]
        now = self._started_ns[name] = self.recorder.clock.now_ns()
        if self._exported[name]:
            self.begin(name, at_ns=now)

    @guarded
    def on_validation_single_iteration_end(self, loop: str = names.VALIDATION_LOOP) -> None:
        """End a batch of a validation or testing loop."""
        name = _EVALUATION_ITERATIONS[loop]
        if (started := self._started_ns.pop(name, None)) is not None:
            now = self.recorder.clock.now_ns()
            self._evaluations[loop].add((now - started) / 1e9)
            if self._exported[name]:
                self.end(name, at_ns=now)

    @guarded
    def record_validation(self, start_ns: int) -> None:
        """Record a validation that ran from `start_ns` (ns since 1970) until now."""
        self.begin(names.VALIDATION_LOOP, at_ns=start_ns)
        self.on_validation_end()

    # Checkpoints

    @guarded
    def on_save_checkpoint_start(self, global_step: int | None = None, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin to save a checkpoint; with the async strategy, the part of it that blocks training."""
        step = self.progress.step if global_step is None else global_step
        flops, batch = self._totals().flops, self.config.global_batch_size
        per_step = flops / max(self.progress.steps_done, 1) if flops else None
        progress = CheckpointProgress(
            step,
            self.meter.total,
            self._evaluations[names.VALIDATION_LOOP].total,
            samples=step * batch if batch else None,
            tflops=per_step * step * self.identity.world_size / 1e12 if per_step else None,
        )
        strategy = self.config.save_checkpoint_strategy
        return self.begin(self._save_span, self.checkpoints.start_save(progress, strategy), at_ns=at_ns)

    @guarded
    def on_save_checkpoint_success(
        self, global_step: int | None = None, directory: Path | str | None = None, size: int | None = None
    ) -> None:
        """Record that the checkpoint is complete on disk. Without `size` (bytes) the files of `directory` are added."""
        step = self.progress.step if global_step is None else global_step
        if directory is not None and size is None:
            size = folder_size(Path(directory))
        strategy = self.config.save_checkpoint_strategy
        progress = self.checkpoints.progress.get(step)
        attributes = self.checkpoints.finish_save(
            step,
            strategy,
            self.recorder.clock.now_ns(),
            self._training_started_s,
            size,
            None if directory is None else str(directory),
        )
        span = self.active(names.CHECKPOINT_SAVE_SYNC if strategy == "sync" else names.APPLICATION)
        self.recorder.event(names.SAVE_CHECKPOINT_SUCCESS, attributes, span)
        self._saved = (step, progress.train_s if progress else self.meter.total)
        self._write_progress(force=True)

    @guarded
    def on_save_checkpoint_end(self, error: BaseException | None = None) -> None:
        """End what blocks training in saving a checkpoint."""
        if span := self.active(self._save_span):
            now = self.recorder.clock.now_ns()
            attributes = self.checkpoints.add_blocking_time((now - span.start_ns) / 1e9)
            self.recorder.event(names.SYNC_CHECKPOINT_METRICS_UPDATE, attributes, span, at_ns=now)
            self.end(self._save_span, error, at_ns=now)

    @guarded
    def record_checkpoint(self, start_ns: int, global_step: int, directory: Path) -> None:
        """Record a checkpoint that was saved from `start_ns` (ns since 1970) until now."""
        self.on_save_checkpoint_start(global_step, at_ns=start_ns)
        self.on_save_checkpoint_success(global_step, directory)
        self.on_save_checkpoint_end()

    @property
    def _save_span(self) -> str:
        is_sync = self.config.save_checkpoint_strategy == "sync"
        return names.CHECKPOINT_SAVE_SYNC if is_sync else names.CHECKPOINT_SAVE_ASYNC

    # Internals

    def _window(self, times: RunningStats, phases: dict[str, float]) -> Window:
        return Window(times, phases, self._totals(), self.progress.last_totals)

    def _totals(self) -> ProcessTotals:
        """Return what this process has done: measured where possible, else computed from the config."""
        totals = self._measure() if self._measure else ProcessTotals(tokens=self._tokens)
        config, samples = self.config, None
        if config.global_batch_size:
            samples = self.progress.steps_done * config.global_batch_size / self.identity.world_size
        tokens, flops = totals.tokens, totals.flops
        if tokens is None and samples is not None and config.seq_length:
            tokens = samples * config.seq_length
        if flops is None and config.flops_per_sample and samples is not None:
            flops = samples * config.flops_per_sample
        if flops is None and config.flops_per_token and tokens is not None:
            flops = tokens * config.flops_per_token
        loss = self.latest_loss if totals.loss is None else totals.loss
        return replace(totals, tokens=tokens, flops=flops, loss=loss)

    def _write_progress(self, force: bool = False) -> None:
        if self._progress_file is None:
            return
        meter, progress = self.meter, self.progress
        saved_step, saved_s = self._saved
        values = (
            *(progress.start, progress.step, self.recorder.clock.now_ns(), saved_step),
            *(meter.total, meter.phase_total(names.DATA_LOADING), meter.first or 0.0, saved_s),
        )
        try:
            self._progress_file.write(*values, force=force)
        except OSError as error:
            self._progress_file = None
            self.errors.record("writing the progress file", error)

    def _mark_error(self, message: str) -> None:
        attributes = {"telemetry_data_error_type": "incomplete_telemetry_data", "error_message": message}
        self.recorder.event(names.TELEMETRY_DATA_ERROR, attributes, self.active(names.APPLICATION))

    @guarded
    def _release(self) -> None:
        self.errors.set_listener(None)
        if self._progress_file is not None:
            self._progress_file.close()
            self._progress_file = None
        self._close_exporters()
        self.recorder.shut_down()
