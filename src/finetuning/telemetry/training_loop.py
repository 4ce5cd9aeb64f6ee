"""The training loop: its callbacks, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from finetuning.telemetry import names
from finetuning.telemetry.config import JobIdentity, MeasuredConfig, TrainingConfig
from finetuning.telemetry.error_guard import TelemetryErrors, guarded
from finetuning.telemetry.metrics import (
    FIGURES,
    IterationMeter,
    ProgressFile,
    RunningStats,
    TrainingProgress,
    Window,
    sample_of,
    training_attributes,
)
from finetuning.telemetry.span_contexts import SpanContexts
from finetuning.telemetry.spans import OpenSpan, SpanRecorder


class TrainingCallbacks(SpanContexts):
    """Told of a training loop and its steps."""

    def __init__(
        self, recorder: SpanRecorder, identity: JobIdentity, faults: TelemetryErrors, progress_file: ProgressFile | None
    ):
        super().__init__(recorder, faults)
        self.identity = identity
        self.config = TrainingConfig()
        self.meter = IterationMeter()
        self.progress = TrainingProgress()
        self.latest: dict[str, Any] = {}
        self.latest_loss: float | None = None
        self._progress_file = progress_file
        self._measure: Callable[[], MeasuredConfig] | None = None
        self._tokens: float | None = None
        self._evaluated_at = {names.VALIDATION_LOOP: 0, names.TESTING_LOOP: 0}
        self._training_started: float | None = None
        self._saved = (-1, 0.0)

    def watch(self, measure: Callable[[], MeasuredConfig]) -> None:
        """Asks this, at each update, for what the process has done so far, instead of counting what it is told."""
        self._measure = measure

    @guarded
    def on_train_start(
        self, train_iterations_start: int = 0, train_samples_start: int | None = None, **attributes: Any
    ) -> OpenSpan:
        """The training loop begins, at this step. A loop that never ended ends now, with an error."""
        config, self.meter = self.config, IterationMeter()
        self.progress = TrainingProgress(
            train_iterations_start, train_iterations_start, train_iterations_start, train_samples_start
        )
        self._saved = (-1, 0.0)
        self._evaluated_at = dict.fromkeys(self._evaluated_at, train_iterations_start)
        batch, samples = config.global_batch_size, train_samples_start
        if samples is None and batch:
            samples = train_iterations_start * batch
        target = config.train_samples_target
        flops = config.flops_per_sample
        told = {
            "train_iterations_start": train_iterations_start,
            "train_samples_start": samples,
            "train_iterations_target": config.train_iterations_target,
            "train_samples_target": target,
            "train_tokens_target": config.seq_length * target if config.seq_length and target else None,
            "completed_floating_point_operations_overall": samples * flops if samples and flops else None,
        }
        self._training_started = self.recorder.clock.now_ns() / 1e9
        span = self.begin(names.TRAINING_LOOP, told | attributes)
        self._note_progress(force=True)
        return span

    @guarded
    def on_train_end(self, error: BaseException | str | None = None) -> None:
        """The training loop ends. What no update has told yet is told before."""
        if error is None and self.progress.step > self.progress.updated:
            self.update_training_metrics()
        self._note_progress(force=True)
        self.end(names.TRAINING_LOOP, error)

    @guarded
    def on_training_single_iteration_start(self, start_ns: int = 0) -> None:
        """An optimizer step begins, with fetching its rows; or began at that time, and has its rows now."""
        now = self.recorder.clock.now_ns()
        began = self.began[names.TRAINING_SINGLE_ITERATION] = start_ns or now
        if self.writes(names.TRAINING_SINGLE_ITERATION):
            self.begin(names.TRAINING_SINGLE_ITERATION, at_ns=began)
        self.meter.part(names.DATA_LOADING, (now - began) / 1e9)

    @guarded
    def on_training_single_iteration_end(
        self, *, tokens: float | None = None, loss: float | None = None, update: bool = True
    ) -> None:
        """The step is done. Every N steps the metrics are told, unless the caller does it (`update=False`)."""
        began = self.began.pop(names.TRAINING_SINGLE_ITERATION, None)
        if began is None:
            return
        now = self.recorder.clock.now_ns()
        self.meter.finished((now - began) / 1e9, now)
        if self.writes(names.TRAINING_SINGLE_ITERATION):
            self.end(names.TRAINING_SINGLE_ITERATION, at_ns=now)
        self.progress.step += 1
        if tokens is not None:
            self._tokens = (self._tokens or 0.0) + tokens
        if loss is not None:
            self.latest_loss = loss
        self._note_progress()
        if update and self.progress.step % self.config.log_every_n_train_iterations == 0:
            self.update_training_metrics()

    @guarded
    def drop_iteration(self) -> None:
        """The iteration that has begun is none: there was no row left."""
        self.began.pop(names.TRAINING_SINGLE_ITERATION, None)
        if span := self.active(names.TRAINING_SINGLE_ITERATION):
            self.recorder.end(span, error="no rows were left")

    @guarded
    def sample(self) -> list[float]:
        """What this process tells the others at an update; see `figures.SAMPLE`."""
        return sample_of(self._window(self.meter.window, self.meter.window_parts))

    @guarded
    def update_training_metrics(self, rows: Sequence[Sequence[float]] = ()) -> dict[str, float]:
        """Tells `training_metrics_update`, and gives the figures that people follow. `rows` are all samples."""
        times, parts = self.meter.close_window()
        window = self._window(times, parts)
        told = training_attributes(self.progress, self.meter, window, self.config, rows)
        self.recorder.event(names.TRAINING_METRICS_UPDATE, told, self.active(names.TRAINING_LOOP))
        self.progress = replace(self.progress, updated=self.progress.step, last_work=window.work)
        self.latest = told
        return {metric: told[name] for name, metric in FIGURES.items() if name in told}

    def _window(self, times: RunningStats, parts: dict[str, float]) -> Window:
        return Window(times, parts, self._measured(), self.progress.last_work)

    def _measured(self) -> MeasuredConfig:
        work = self._measure() if self._measure else MeasuredConfig(tokens=self._tokens)
        config, samples = self.config, None
        if config.global_batch_size:
            samples = self.progress.done * config.global_batch_size / self.identity.world_size
        tokens, flops = work.tokens, work.flops
        if tokens is None and samples is not None and config.seq_length:
            tokens = samples * config.seq_length
        if flops is None and config.flops_per_sample and samples is not None:
            flops = samples * config.flops_per_sample
        if flops is None and config.flops_per_token and tokens is not None:
            flops = tokens * config.flops_per_token
        return replace(work, tokens=tokens, flops=flops, loss=self.latest_loss if work.loss is None else work.loss)

    def _note_progress(self, force: bool = False) -> None:
        if self._progress_file is None:
            return
        saved, saved_s = self._saved
        data_s, meter = self.meter.part_total(names.DATA_LOADING), self.meter
        first, now = meter.first or 0.0, self.recorder.clock.now_ns()
        try:
            self._progress_file.write(
                self.progress.start, self.progress.step, now, saved, meter.total, data_s, first, saved_s, force=force
            )
        except OSError as error:
            self._progress_file = None
            self.faults.note("noting progress", error)
