"""Telemetry of a transformers Trainer by a callback."""

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
