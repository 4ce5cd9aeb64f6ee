"""One Logger's callbacks: a job calls them during training, and telemetry measures and records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.config import (
    Attributes,
    AttributeValues,
    JobIdentity,
    ProcessTotals,
    ResolvedTrainingConfig,
    TrainingConfig,
)
from finetuning.telemetry.error_guard import TelemetryErrors, guarded
from finetuning.telemetry.metrics import (
    CATEGORIES,
    COMPLETED,
    FAILED,
    LOOP_NOT_STARTED,
    RUNNING,
    CheckpointMeter,
    CheckpointProgress,
    IterationMeter,
    JobProgress,
    ProgressFile,
    RunningStats,
    TrainingProgress,
    Window,
    flops_overall,
    folder_size,
    job_ended,
    process_start_ns,
    sample_of,
    samples_start,
    training_attributes,
)
from finetuning.telemetry.spans import OpenSpan, SpanRecorder, StandardSpans

_EVALUATION_ITERATIONS = {
    names.VALIDATION_LOOP: names.VALIDATION_SINGLE_ITERATION,
    names.TESTING_LOOP: names.TESTING_SINGLE_ITERATION,
}
_SPAN_CATEGORIES = {
    names.CHECKPOINT_SAVE_SYNC: "checkpoint_save",
    names.CHECKPOINT_SAVE_ASYNC: "checkpoint_save",
    names.CHECKPOINT_LOAD: "checkpoint_load",
    names.VALIDATION_LOOP: "evaluation",
    names.TESTING_LOOP: "evaluation",
    names.MODEL_PUBLICATION: "publication",
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

    Faults of telemetry are collected in `errors` and not raised. What the caller does wrong is raised: a wrong
    argument, an unknown span, an impossible value. It is not thread-safe, except for `span`, `event` and
    `checkpoint_save_finalization`. Times `at_ns` are ns since 1970; 0 is now.

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
        self.latest: AttributeValues = {}
        """The attributes of the last update."""
        self.latest_loss: float | None = None
        self._progress_file = progress_file
        self._close_exporters = close_exporters
        self._measure: Callable[[], ProcessTotals] | None = None
        self._measured_before = ProcessTotals()
        self._tokens: float | None = None
        self._evaluations = {names.VALIDATION_LOOP: RunningStats(), names.TESTING_LOOP: RunningStats()}
        self._evaluated_at = {names.VALIDATION_LOOP: 0, names.TESTING_LOOP: 0}
        self._has_unmeasured_validation = False
        self._training_config = TrainingConfig()
        self._training_started_s: float | None = None
        self._application: OpenSpan | None = None
        self._work = JobProgress(process_start_ns=process_start_ns(recorder.clock.now_ns()))
        self._category_span: OpenSpan | None = None
        # Step and iteration seconds of the last checkpoint.
        self._saved = (-1, 0.0)
        recorder.on_span = self._on_span

    # Job

    @guarded
    def on_app_start(self, start_ns: int = 0) -> OpenSpan | None:
        """Begin the application, now or at a time in ns since 1970."""
        span = self._application = self.begin(names.APPLICATION, at_ns=start_ns)
        attributes = self.identity.attributes()
        if span is not None and (started_ns := self._work.process_start_ns):
            attributes["process_start_timestamp_sec"] = started_ns / 1e9
            attributes["process_startup_time_sec"] = max(span.start_ns - started_ns, 0) / 1e9
        self.recorder.event(names.ONE_LOGGER_INITIALIZATION, attributes, span, at_ns=start_ns)
        self.errors.set_listener(self._mark_error)
        for message in self.errors.messages:
            self._mark_error(message)
        return span

    @guarded
    def on_app_end(self, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """End the application, and with an error every span that is still open."""
        if span := self.active(names.APPLICATION):
            if isinstance(error, BaseException):
                self.recorder.error(error, self.recorder.open_spans[-1])
            self.recorder.end(span, error=error, at_ns=at_ns)
            job_ended(span.end_ns)

    def close(self, error: BaseException | str | None = None) -> None:
        """End the application, and close files and connections. Call it once, last."""
        self.on_app_end(error)
        self._release()

    @guarded
    def set_identity(self, identity: JobIdentity) -> None:
        """Set what was not known of the job when it started, such as its world size."""
        self.identity = identity
        attributes = identity.attributes()
        self.recorder.event(names.ONE_LOGGER_INITIALIZATION, attributes, self.active(names.APPLICATION))

    @guarded
    def set_training_config(self, config: TrainingConfig) -> None:
        """Set what the metrics need to know. It may be called again with a better config.

        A function in it that fails now is called again when training starts.

        Raises:
            TelemetryUsageError: a value is impossible.
        """
        self._training_config = config
        self._apply(config.resolve(is_complete=False))

    def _apply(self, config: ResolvedTrainingConfig) -> None:
        self.config = config
        self.recorder.event(names.UPDATE_CONFIG, config.attributes(), self.active(names.APPLICATION))

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
        self,
        train_iterations_start: int = 0,
        train_samples_start: int | None = None,
        *,
        train_iterations_target: int | None = None,
        train_samples_target: int | None = None,
        attributes: Attributes | None = None,
        at_ns: int = 0,
    ) -> OpenSpan | None:
        """Begin the training loop at this step. A loop that has not ended ends with an error.

        Args:
            train_iterations_target: the step at which training is complete; by default the config's.
            train_samples_target: the sample at which training is complete; by default the config's.
            attributes: more attributes of the span.

        Raises:
            TelemetryUsageError: a function of the config raises, or its value is impossible.
        """
        # One that was left open, for example by a retry after running out of memory, ends before its times are reset.
        self.end(names.TRAINING_LOOP, "started again before it had ended", at_ns=at_ns)
        config = self._training_config.resolve()
        if config != self.config:
            self._apply(config)
        self._leave_earlier_loop(train_iterations_start)
        self.meter, self._tokens, self.latest_loss = IterationMeter(), None, None
        self._measured_before = self._measured()
        self.progress = TrainingProgress(
            train_iterations_start, train_iterations_start, train_iterations_start, train_samples_start
        )
        self._saved = (-1, 0.0)
        self._evaluated_at = dict.fromkeys(self._evaluated_at, train_iterations_start)
        samples, flops = samples_start(self.progress, config), config.flops_per_sample
        target = config.train_samples_target if train_samples_target is None else train_samples_target
        iterations = config.train_iterations_target if train_iterations_target is None else train_iterations_target
        start_attributes = {
            "train_iterations_start": train_iterations_start,
            "train_samples_start": samples,
            "train_iterations_target": iterations,
            "train_samples_target": target,
            "train_tokens_target": config.seq_length * target if config.seq_length and target else None,
            "completed_floating_point_operations_overall": samples * flops
            if flops and samples is not None and config.is_log_throughput_enabled
            else None,
        }
        started_ns = at_ns or self.recorder.clock.now_ns()
        self._training_started_s = started_ns / 1e9
        self._work.loop_start_ns = self._work.loop_start_ns or started_ns
        self._work.loop_state = RUNNING
        span = self.begin(names.TRAINING_LOOP, {**start_attributes, **(attributes or {})}, at_ns=at_ns)
        self._write_progress(force=True)
        return span

    @guarded
    def on_train_end(self, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """End the training loop. Steps since the last update get an update first."""
        if error is None and self.progress.step > self.progress.updated and self.active(names.TRAINING_LOOP):
            self.update_training_metrics()
        self.end(names.TRAINING_LOOP, error, at_ns=at_ns)

    @guarded
    def on_training_single_iteration_start(self, start_ns: int = 0, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin an optimizer step.

        Args:
            start_ns: when data loading began, in ns since 1970; the time since then counts as data loading. 0 if it
                is still to come.
        """
        now = at_ns or self.recorder.clock.now_ns()
        started = self._started_ns[names.TRAINING_SINGLE_ITERATION] = start_ns or now
        if start_ns:
            self.meter.add_phase(names.DATA_LOADING, (now - started) / 1e9)
        if self._exported[names.TRAINING_SINGLE_ITERATION] and self.config.is_train_iterations_enabled:
            return self.begin(names.TRAINING_SINGLE_ITERATION, at_ns=started)
        return None

    @guarded
    def on_training_single_iteration_end(
        self, *, tokens: float | None = None, loss: float | None = None, update: bool = True, at_ns: int = 0
    ) -> None:
        """End an optimizer step.

        Args:
            tokens: the tokens of the step in this process.
            loss: the loss of the step in this process.
            update: whether to emit an update every N steps; otherwise the caller does.
        """
        started = self._started_ns.pop(names.TRAINING_SINGLE_ITERATION, None)
        if started is None:
            return
        now = at_ns or self.recorder.clock.now_ns()
        self.meter.add_iteration(max(now - started, 0) / 1e9, now)
        if self.active(names.TRAINING_SINGLE_ITERATION):
            self.end(names.TRAINING_SINGLE_ITERATION, at_ns=now)
        self.progress.step += 1
        if tokens is not None:
            self._tokens = (self._tokens or 0.0) + float(tokens)
        if loss is not None:
            self.latest_loss = float(loss)
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
        world_size = self.identity.world_size
        attributes = training_attributes(self.progress, self.meter, window, self.config, samples, world_size)
        self.progress = replace(self.progress, updated=self.progress.step, last_totals=window.totals)
        self.latest = attributes
        if not self.config.is_train_iterations_enabled:
            return {}
        self.recorder.event(names.TRAINING_METRICS_UPDATE, attributes, self.active(names.TRAINING_LOOP))
        return {metric: attributes[name] for name, metric in names.TRACKED_METRICS.items() if name in attributes}

    # Validation and testing

    @guarded
    def on_validation_start(self, loop: str = names.VALIDATION_LOOP, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin a validation loop, or the testing loop."""
        return self.begin(loop, at_ns=at_ns)

    @guarded
    def on_validation_end(
        self,
        loop: str = names.VALIDATION_LOOP,
        error: BaseException | str | None = None,
        *,
        attributes: Attributes | None = None,
        at_ns: int = 0,
    ) -> None:
        """End the loop. Without an error its metrics are emitted, and `attributes` with them."""
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
        if is_validation and not self._evaluations[loop].count:
            self._has_unmeasured_validation = True
        if error is None and self._measures(loop):
            self.recorder.event(event, {**loop_attributes, **(attributes or {})}, span)
        self.end(loop, error, at_ns=at_ns)

    def _measures(self, loop: str) -> bool:
        config = self.config
        is_validation = loop == names.VALIDATION_LOOP
        return config.is_validation_iterations_enabled if is_validation else config.is_test_iterations_enabled

    def on_testing_start(self, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin the testing loop."""
        return self.on_validation_start(names.TESTING_LOOP, at_ns=at_ns)

    def on_testing_end(
        self,
        error: BaseException | str | None = None,
        *,
        attributes: Attributes | None = None,
        at_ns: int = 0,
    ) -> None:
        """End the testing loop."""
        self.on_validation_end(names.TESTING_LOOP, error, attributes=attributes, at_ns=at_ns)

    @guarded
    def on_validation_single_iteration_start(
        self, loop: str = names.VALIDATION_LOOP, *, at_ns: int = 0
    ) -> OpenSpan | None:
        """Begin a batch of a validation or testing loop."""
        if not self._measures(loop):
            return None
        name = _EVALUATION_ITERATIONS[loop]
        now = self._started_ns[name] = at_ns or self.recorder.clock.now_ns()
        return self.begin(name, at_ns=now) if self._exported[name] else None

    @guarded
    def on_validation_single_iteration_end(
        self,
        loop: str = names.VALIDATION_LOOP,
        *,
        error: BaseException | str | None = None,
        at_ns: int = 0,
    ) -> None:
        """End a batch of a validation or testing loop."""
        name = _EVALUATION_ITERATIONS[loop]
        if (started := self._started_ns.pop(name, None)) is not None:
            now = at_ns or self.recorder.clock.now_ns()
            self._evaluations[loop].add(max(now - started, 0) / 1e9)
            if self._exported[name]:
                self.end(name, error, at_ns=now)

    @guarded
    def record_validation(self, start_ns: int, loop: str = names.VALIDATION_LOOP) -> None:
        """Record a validation or test that ran from `start_ns` (ns since 1970) until now."""
        self.begin(loop, at_ns=max(start_ns, self._parent_start_ns()))
        self.on_validation_end(loop)

    # Checkpoints

    @guarded
    def on_save_checkpoint_start(self, global_step: int | None = None, *, at_ns: int = 0) -> OpenSpan | None:
        """Begin to save a checkpoint; with the async strategy, the part of it that blocks training."""
        if not self.config.is_save_checkpoint_enabled:
            return self.begin(self._save_span, at_ns=at_ns)
        step, done = self.progress.step if global_step is None else global_step, self.progress.step
        config, flops = self.config, self._totals().flops
        samples = samples_start(self.progress, config)
        if samples is not None and config.global_batch_size:
            samples += self.progress.steps_done * config.global_batch_size
        if flops is not None and config.is_log_throughput_enabled:
            flops = flops_overall(self.progress, flops * self.identity.world_size, config) / 1e12
        validation = self._evaluations[names.VALIDATION_LOOP]
        progress = CheckpointProgress(
            done or step,
            self.meter.total,
            None if self._has_unmeasured_validation and not validation.count else validation.total,
            samples=samples,
            tflops=flops if config.is_log_throughput_enabled else None,
        )
        strategy = config.save_checkpoint_strategy
        return self.begin(self._save_span, self.checkpoints.start_save(step, progress, strategy), at_ns=at_ns)

    @guarded
    def on_save_checkpoint_success(
        self,
        global_step: int | None = None,
        directory: Path | str | None = None,
        size: int | None = None,
        *,
        at_ns: int = 0,
    ) -> None:
        """Record that the checkpoint is complete on disk. Without `size` (bytes) the files of `directory` are added."""
        step = self.progress.step if global_step is None else global_step
        if directory is not None and size is None:
            size = folder_size(Path(directory))
        strategy = self.config.save_checkpoint_strategy
        progress = self.checkpoints.progress.get(step)
        self._saved = (step, progress.train_s if progress else self.meter.total)
        self._write_progress(force=True)
        if not self.config.is_save_checkpoint_enabled:
            return
        now = at_ns or self.recorder.clock.now_ns()
        folder = None if directory is None else str(directory)
        attributes = self.checkpoints.finish_save(step, strategy, now, self._training_started_s, size, folder)
        span = self.active(names.CHECKPOINT_SAVE_SYNC if strategy == "sync" else names.APPLICATION)
        self.recorder.event(names.SAVE_CHECKPOINT_SUCCESS, attributes, span, at_ns=at_ns)

    @guarded
    def on_save_checkpoint_end(self, error: BaseException | str | None = None, *, at_ns: int = 0) -> None:
        """End what blocks training in saving a checkpoint."""
        if span := self.active(self._save_span):
            now = at_ns or self.recorder.clock.now_ns()
            if self.config.is_save_checkpoint_enabled:
                attributes = self.checkpoints.add_blocking_time(max(now - span.start_ns, 0) / 1e9)
                self.recorder.event(names.SYNC_CHECKPOINT_METRICS_UPDATE, attributes, span, at_ns=now)
            self.end(self._save_span, error, at_ns=now)

    @guarded
    def record_checkpoint(self, start_ns: int, global_step: int, directory: Path) -> None:
        """Record a checkpoint that was saved from `start_ns` (ns since 1970) until now."""
        self.on_save_checkpoint_start(global_step, at_ns=max(start_ns, self._parent_start_ns()))
        self.on_save_checkpoint_success(global_step, directory)
        self.on_save_checkpoint_end()

    @property
    def _save_span(self) -> str:
        is_sync = self.config.save_checkpoint_strategy == "sync"
        return names.CHECKPOINT_SAVE_SYNC if is_sync else names.CHECKPOINT_SAVE_ASYNC

    def _parent_start_ns(self) -> int:
        parent = self.recorder.current
        return parent.start_ns if parent else 0

    # Internals

    def _window(self, times: RunningStats, phases: dict[str, float]) -> Window:
        return Window(times, phases, self._totals(), self.progress.last_totals)

    def _measured(self) -> ProcessTotals:
        totals = self.errors.attempt("measuring", self._measure) if self._measure else None
        return totals or ProcessTotals()

    def _totals(self) -> ProcessTotals:
        """Return what this process has done in this loop: measured where possible, else computed from the config."""
        config, before, samples = self.config, self._measured_before, None
        totals = self._measured() if self._measure else ProcessTotals(tokens=self._tokens)
        if config.global_batch_size:
            samples = self.progress.steps_done * config.global_batch_size / self.identity.world_size
        tokens = None if totals.tokens is None else totals.tokens - (before.tokens or 0)
        flops = None if totals.flops is None else totals.flops - (before.flops or 0)
        if tokens is None and samples is not None and config.seq_length:
            tokens = samples * config.seq_length
        if flops is None and config.flops_per_sample and samples is not None:
            flops = samples * config.flops_per_sample
        if flops is None and config.flops_per_token and tokens is not None:
            flops = tokens * config.flops_per_token
        loss = self.latest_loss if totals.loss is None else totals.loss
        return replace(totals, tokens=tokens, flops=flops, loss=loss)

    def _on_span(self, span: OpenSpan, error: BaseException | str | None) -> None:
        """Keep account of a span that has begun or ended, whether or not it is exported."""
        work, category = self._work, _SPAN_CATEGORIES.get(span.name)
        state = RUNNING if not span.ended else COMPLETED if error is None else FAILED
        if span.name == names.APPLICATION:
            work.application_start_ns, work.application_state = span.start_ns, state
        elif span.name == names.TRAINING_LOOP:
            work.loop_state = state
        elif category and not span.ended and self._category_span is None:
            self._category_span = span
            work.open_category, work.open_since_ns = CATEGORIES.index(category), span.start_ns
        elif category and span.ended and span is self._category_span:
            self._category_span, work.open_category = None, -1
            self._add_time(category, (span.end_ns - span.start_ns) / 1e9)
        else:
            return
        self._write_progress(force=True)

    def _add_time(self, category: str, seconds: float) -> None:
        work = self._work
        if category == "checkpoint_save":
            work.checkpoint_save_s += seconds
        elif category == "evaluation":
            work.evaluation_s += seconds
        elif category == "publication":
            work.publication_s += seconds
        else:
            work.checkpoint_load_s += seconds
            if not work.loop_start_ns:
                work.initial_load_s += seconds

    def _leave_earlier_loop(self, next_start: int) -> None:
        """Count the steps of the training loop before this one: lost are those that this one repeats."""
        work, done, total = self._work, self.progress.steps_done, self.meter.total
        if work.loop_state == LOOP_NOT_STARTED or done <= 0:
            return
        kept = done if work.loop_state == COMPLETED else min(max(next_start - self.progress.start, 0), done)
        saved_step, saved_s = self._saved
        is_saved = kept == saved_step - self.progress.start
        seconds = total if kept == done else saved_s if is_saved else total * kept / done
        work.earlier_steps += kept
        work.earlier_lost_steps += done - kept
        work.earlier_s += seconds
        work.earlier_lost_s += total - seconds

    def _write_progress(self, force: bool = False) -> None:
        if self._progress_file is None:
            return
        work, meter, progress = self._work, self.meter, self.progress
        data_s = meter.phase_total(names.DATA_LOADING)
        work.start, work.step = progress.start, progress.step
        work.saved, work.saved_s = self._saved
        work.iterations_s, work.first_s = meter.total, meter.first or 0.0
        work.data_s = math.nan if data_s is None else data_s
        try:
            self._progress_file.write(work, force=force)
        except OSError as error:
            self._progress_file = None
            self.errors.record("writing the progress file", error)

    def _mark_error(self, message: str) -> None:
        attributes = {"telemetry_data_error_type": "incomplete_telemetry_data", "error_message": message}
        self.recorder.event(names.TELEMETRY_DATA_ERROR, attributes, self._application)

    @guarded
    def _release(self) -> None:
        if self._progress_file is not None:
            self._progress_file.close()
            self._progress_file = None
        # What the exporters have lost is marked in the file, which closes last.
        self._close_exporters()
        self.errors.set_listener(None)
        self.recorder.shut_down()
