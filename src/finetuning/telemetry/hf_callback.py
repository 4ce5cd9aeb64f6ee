"""Telemetry of a transformers Trainer by a callback.

A trainer's phases, turned into spans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers import TrainerControl as Control
from transformers import TrainingArguments as Args

from finetuning.telemetry import names
from finetuning.telemetry.error_guard import guarded
from finetuning.telemetry.telemetry import Telemetry

Gather = Callable[[list[float]], Sequence[Sequence[float]]]
"""Gives the samples of all processes, in the order of their ranks; every process calls it at the same steps."""


class TelemetryCallback(TrainerCallback):
    """Records the training loop, its steps, evaluations and saves.

    Without phases it knows of evaluations and saves only when they are over, and dates their spans back to the end of
    what came before; data loading is then what lies between them and the step. `gather` is used every N steps, on
    every process; `tell` is given the figures that people follow, and the step.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        gather: Gather | None = None,
        tell: Callable[[Mapping[str, float], int], None] | None = None,
        with_phases: bool = False,
    ):
        self.faults = telemetry.faults
        self._telemetry = telemetry
        self._gather = gather
        self._tell = tell
        self._with_phases = with_phases
        self._free_since = 0

    @guarded
    def on_train_begin(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        self._telemetry.on_train_start(state.global_step, train_iterations_target=state.max_steps)
        self._free()

    @guarded
    def on_step_begin(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        if not self._with_phases:
            self._telemetry.on_training_single_iteration_start(self._free_since)

    @guarded
    def on_pre_optimizer_step(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        self._telemetry.part_began(names.OPTIMIZER_UPDATE)

    @guarded
    def on_optimizer_step(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        self._telemetry.part_ended(names.OPTIMIZER_UPDATE)
        self._telemetry.part_began(names.ZERO_GRAD)

    def on_step_end(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        self._telemetry.part_ended(names.ZERO_GRAD)
        self._telemetry.on_training_single_iteration_end(update=False)
        if state.global_step % self._telemetry.config.log_every_n_train_iterations == 0:
            self._update(state.global_step)
        self._free()

    @guarded
    def on_log(
        self, args: Args, state: TrainerState, control: Control, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        if logs and isinstance(logs.get("loss"), float):
            self._telemetry.latest_loss = logs["loss"]

    @guarded
    def on_evaluate(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        if not self._with_phases:
            self._telemetry.validated_since(self._free_since)
            self._free()

    @guarded
    def on_save(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        if not self._with_phases:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            self._telemetry.saved_since(self._free_since, state.global_step, folder)
            self._free()

    def on_train_end(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
        self._telemetry.drop_iteration()
        if state.global_step % self._telemetry.config.log_every_n_train_iterations:
            self._update(state.global_step)
        self._telemetry.on_train_end()

    def _update(self, step: int) -> None:
        rows: Sequence[Sequence[float]] = ()
        if self._gather is not None:
            # Every process gathers, whatever became of its own telemetry, or the others would wait for ever.
            rows = self._gather(self._telemetry.sample() or [-1.0] * 6)
        figures = self._telemetry.update_training_metrics(rows)
        if figures and self._tell is not None:
            self._tell(figures, step)

    def _free(self) -> None:
        self._free_since = self._telemetry.recorder.clock.now_ns()


_CHECKPOINT_SAVE = "checkpoint_save"
_NO_ROWS = "no_rows"
_EVALUATIONS = {
    names.VALIDATION_SINGLE_ITERATION: names.VALIDATION_LOOP,
    names.TESTING_SINGLE_ITERATION: names.TESTING_LOOP,
}
_LOOPS = frozenset(_EVALUATIONS.values())


class TrainerPhases:
    """What a trainer with phases tells, turned into spans.

    `folder_of` gives the folder of the checkpoint that is being saved, `step` the trainer's step. Nothing here raises:
    a phase stands in the middle of a step, and on one process of several.
    """

    def __init__(self, telemetry: Telemetry, step: Callable[[], int], folder_of: Callable[[int], Path | None]):
        self.faults = telemetry.faults
        self._telemetry = telemetry
        self._step = step
        self._folder_of = folder_of

    @guarded
    def begin(self, name: str) -> None:
        telemetry = self._telemetry
        if name == names.DATA_LOADING:
            telemetry.on_training_single_iteration_start()
        if name in names.INSIDE_A_STEP:
            telemetry.part_began(name)
        elif name in _EVALUATIONS:
            telemetry.on_validation_single_iteration_start(_EVALUATIONS[name])
        elif name in _LOOPS:
            telemetry.on_validation_start(name)
        elif name == _CHECKPOINT_SAVE:
            telemetry.on_save_checkpoint_start(self._step())
        else:
            telemetry.begin(name)

    @guarded
    def end(self, name: str) -> None:
        telemetry = self._telemetry
        if name in names.INSIDE_A_STEP:
            telemetry.part_ended(name)
        elif name in _EVALUATIONS:
            telemetry.on_validation_single_iteration_end(_EVALUATIONS[name])
        elif name in _LOOPS:
            telemetry.on_validation_end(name)
        elif name == _CHECKPOINT_SAVE:
            folder = self._folder_of(self._step())
            # A full disk leaves no checkpoint, and the run goes on. A rank that does not save has no folder to look at.
            if folder is not None and not folder.is_dir():
                telemetry.on_save_checkpoint_end(OSError(f"{folder.name} was not saved"))
                return
            telemetry.on_save_checkpoint_success(self._step(), folder)
            telemetry.on_save_checkpoint_end()
        elif name == _NO_ROWS:
            telemetry.drop_iteration()
        else:
            telemetry.end(name)

    @guarded
    def fail(self, name: str, error: BaseException) -> None:
        telemetry = self._telemetry
        if name in names.INSIDE_A_STEP:
            telemetry.part_ended(name, error)
        elif name in _LOOPS:
            telemetry.on_validation_end(name, error)
        elif name == _CHECKPOINT_SAVE:
            telemetry.on_save_checkpoint_end(error)
        else:
            telemetry.end(name, error)
