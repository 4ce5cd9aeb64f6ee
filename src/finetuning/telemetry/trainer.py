"""A trainer's phases, turned into spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetuning.telemetry import names
from finetuning.telemetry.error_guard import guarded
from finetuning.telemetry.telemetry import Telemetry

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
