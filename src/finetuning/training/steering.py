"""What steers a run while it trains: the user's rules, and the guard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.controller_file import read_controllers

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from finetuning.callbacks.controller.callback import Controllers


class Steering:
    """The trainer controller and the guard of one run, the same on every process."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._controllers: Controllers | None = None

    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer is to call.

        Raises:
            ConfigError: a controller cannot be made.
        """
        from finetuning.callbacks.loss_guard import guard_callback

        found: list[Any] = []
        section = read_controllers(self._experiment.trainer_controller)
        if section is not None and section.controllers:
            from finetuning.callbacks.controller.callback import controller_callback, make_controllers

            self._controllers = make_controllers(section)
            found.append(controller_callback(self._controllers))
        if self._experiment.guard.enabled:
            found.append(guard_callback(self._experiment.guard))
        return found

    def published(self, trainer: Trainer, folder: Path) -> None:
        """The tuned model is saved: the last `on_save`, which only this process sees."""
        if self._controllers is None:
            return
        from finetuning.callbacks.controller.event import Event

        extra = {"path": str(folder), "is_final": True}
        self._controllers.happened(Event("on_save", trainer.args, trainer.state, trainer.control, extra), agree=False)

    def taken(self) -> list[str]:
        """What rules did, one line a rule: what it did first, and how often it acted."""
        acted: dict[str, dict[tuple[int, str], list[str]]] = {}
        for action in self._controllers.taken if self._controllers else ():
            acted.setdefault(action.controller, {}).setdefault((action.step, action.event), []).append(action.action)
        told = []
        for controller, times in acted.items():
            (step, event), actions = next(iter(times.items()))
            again = f", and {len(times) - 1} times more" if len(times) > 1 else ""
            told.append(f'step {step}: rule "{controller}" held at {event}: {", ".join(actions)}{again}')
        return told
