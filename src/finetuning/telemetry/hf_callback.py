"""Telemetry of a transformers Trainer: a callback, and the finer phases that our trainers report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.telemetry import names
from finetuning.telemetry.error_guard import guarded
from finetuning.telemetry.metrics import SAMPLE_FIELDS
from finetuning.telemetry.telemetry import Telemetry

Gather = Callable[[list[float]], Sequence[Sequence[float]]]
"""Returns the samples of all processes, in the order of ranks. Every process calls it at the same steps."""

_CHECKPOINT_SAVE = "checkpoint_save"
_NO_ROWS = "no_rows"
_EVALUATION_LOOPS = {
    names.VALIDATION_SINGLE_ITERATION: names.VALIDATION_LOOP,
    names.TESTING_SINGLE_ITERATION: names.TESTING_LOOP,
}
_LOOPS = frozenset(_EVALUATION_LOOPS.values())


class TelemetryCallback(TrainerCallback):
    """Records the training loop, its steps, evaluations and checkpoints.

    Args:
        telemetry: by default that of `one_logger.TrainingTelemetryProvider`.
        gather: gathers samples over the processes every N steps; None for a single process.
        log_metrics: called with the metrics for trackers, and the step.
        with_phases: whether the trainer reports its phases to `TrainerPhases`. Otherwise evaluations and saves are
            known only when they are over. An evaluation begins as long ago as the trainer says that it took, a save
            where the last step or pause ended; all time between that and the next step counts as data loading.
    """

    def __init__(
        self,
        telemetry: Telemetry | None = None,
        *,
        gather: Gather | None = None,
        log_metrics: Callable[[Mapping[str, float], int], None] | None = None,
        with_phases: bool = False,
    ):
        if telemetry is None:
            from finetuning.telemetry.one_logger.provider import TrainingTelemetryProvider

            telemetry = TrainingTelemetryProvider.instance().telemetry
        self.errors = telemetry.errors
        self._telemetry = telemetry
        self._gather = gather
        self._log_metrics = log_metrics
        self._with_phases = with_phases
        self._idle_since_ns = 0

    @guarded
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._telemetry.on_train_start(state.global_step, train_iterations_target=state.max_steps)
        self._mark_idle()

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self._with_phases:
            self._telemetry.on_training_single_iteration_start(self._idle_since_ns)

    @guarded
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._telemetry.begin_phase(names.OPTIMIZER_UPDATE)

    @guarded
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._telemetry.end_phase(names.OPTIMIZER_UPDATE)
        self._telemetry.begin_phase(names.ZERO_GRAD)

    # Not guarded, like on_train_end: a process whose telemetry has failed must still take part in the gathering.
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._telemetry.end_phase(names.ZERO_GRAD)
        self._telemetry.on_training_single_iteration_end(update=False)
        if state.global_step % self._telemetry.config.log_every_n_train_iterations == 0:
            self._update(state.global_step)
        self._mark_idle()

    @guarded
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        loss = (logs or {}).get("loss")
        if isinstance(loss, float):
            self._telemetry.latest_loss = loss

    @guarded
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        self._record_evaluation(metrics, names.VALIDATION_LOOP)

    @guarded
    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        self._record_evaluation(metrics, names.TESTING_LOOP)

    def _record_evaluation(self, metrics: Mapping[str, object] | None, loop: str) -> None:
        if self._with_phases:
            return
        now = self._telemetry.recorder.clock.now_ns()
        runtimes = {key: value for key, value in (metrics or {}).items() if key.endswith("_runtime")}
        for key, seconds in runtimes.items():
            if isinstance(seconds, int | float):
                loop = names.TESTING_LOOP if key.startswith("test") else loop
                self._telemetry.record_validation(now - round(seconds * 1e9), loop)
                break
        else:
            # A trainer of the user's own that does not say how long it took.
            is_training = self._telemetry.active(names.TRAINING_LOOP) is not None
            self._telemetry.record_validation(self._idle_since_ns if is_training else now, loop)
        self._mark_idle()

    @guarded
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if not self._with_phases:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            self._telemetry.record_checkpoint(self._idle_since_ns, state.global_step, folder)
            self._mark_idle()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._telemetry.discard_iteration()
        if state.global_step % self._telemetry.config.log_every_n_train_iterations:
            self._update(state.global_step)
        self._telemetry.on_train_end()

    def _update(self, step: int) -> None:
        samples: Sequence[Sequence[float]] = ()
        if self._gather is not None:
            # Every process gathers, even if its own telemetry has failed; otherwise the others would wait forever.
            samples = self._gather(self._telemetry.sample() or [-1.0] * len(SAMPLE_FIELDS))
        metrics = self._telemetry.update_training_metrics(samples)
        if metrics and self._log_metrics is not None:
            self._log_metrics(metrics, step)

    def _mark_idle(self) -> None:
        self._idle_since_ns = self._telemetry.recorder.clock.now_ns()


class TrainerPhases:
    """Records the phases that a trainer reports, as spans. No method raises: a phase is in the middle of a step, and on
    one process of several.

    Args:
        step: returns the trainer's step.
        checkpoint_folder: returns the folder of the checkpoint of a step; None on a process that does not save.
    """

    def __init__(self, telemetry: Telemetry, step: Callable[[], int], checkpoint_folder: Callable[[int], Path | None]):
        self.errors = telemetry.errors
        self._telemetry = telemetry
        self._step = step
        self._checkpoint_folder = checkpoint_folder

    @guarded
    def begin(self, name: str) -> None:
        """Begin a phase: the name of a span, or `checkpoint_save`."""
        telemetry = self._telemetry
        if name == names.DATA_LOADING:
            # The trainer fetches the rows of all micro-batches first: an iteration begins with that.
            telemetry.on_training_single_iteration_start()
        if name in names.ITERATION_PHASES:
            telemetry.begin_phase(name)
        elif name in _EVALUATION_LOOPS:
            telemetry.on_validation_single_iteration_start(_EVALUATION_LOOPS[name])
        elif name in _LOOPS:
            telemetry.on_validation_start(name)
        elif name == _CHECKPOINT_SAVE:
            telemetry.on_save_checkpoint_start(self._step())
        else:
            telemetry.begin(name)

    @guarded
    def end(self, name: str) -> None:
        """End a phase. The name `no_rows` discards the iteration that has begun."""
        telemetry = self._telemetry
        if name in names.ITERATION_PHASES:
            telemetry.end_phase(name)
        elif name in _EVALUATION_LOOPS:
            telemetry.on_validation_single_iteration_end(_EVALUATION_LOOPS[name])
        elif name in _LOOPS:
            telemetry.on_validation_end(name)
        elif name == _CHECKPOINT_SAVE:
            self._end_checkpoint()
        elif name == _NO_ROWS:
            telemetry.discard_iteration()
        else:
            telemetry.end(name)

    @guarded
    def fail(self, name: str, error: BaseException) -> None:
        """End a phase with an error."""
        telemetry = self._telemetry
        if name in names.ITERATION_PHASES:
            telemetry.end_phase(name, error)
        elif name in _LOOPS:
            telemetry.on_validation_end(name, error)
        elif name == _CHECKPOINT_SAVE:
            telemetry.on_save_checkpoint_end(error)
        else:
            telemetry.end(name, error)

    def _end_checkpoint(self) -> None:
        folder = self._checkpoint_folder(self._step())
        # On a full disk the trainer skips the checkpoint and goes on.
        if folder is not None and not folder.is_dir():
            self._telemetry.on_save_checkpoint_end(OSError(f"{folder.name} was not saved"))
            return
        self._telemetry.on_save_checkpoint_success(self._step(), folder)
        self._telemetry.on_save_checkpoint_end()
