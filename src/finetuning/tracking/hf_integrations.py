"""Callbacks of transformers for trackers that accelerate has no class for, isolated from the training loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from finetuning.config.redaction import redact_text

logger = logging.getLogger(__name__)


class GuardedCallback(TrainerCallback):
    """Forwards a trainer's events to another callback until that one raises; then it is disabled with a warning.

    Args:
        name: what to call the callback in messages.
        callback: receives the events.
        failures: is given the error under `name`; a callback whose name is in it is not called.
    """

    def __init__(self, name: str, callback: TrainerCallback, failures: dict[str, str]):
        self._name = name
        self._callback = callback
        self._failures = failures

    def _forward(self, event: str, *arguments: object, **kwargs: object) -> None:
        if self._name in self._failures:
            return
        try:
            getattr(self._callback, event)(*arguments, **kwargs)
        except Exception as error:  # noqa: BLE001  a tracker may raise anything, and training must continue
            self._failures[self._name] = redact_text(f"{type(error).__name__}: {error}")
            logger.warning("%s failed and is disabled: %s", self._name, self._failures[self._name])

    def on_train_begin(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_train_begin", *arguments, **kwargs)

    def on_step_begin(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_step_begin", *arguments, **kwargs)

    def on_pre_optimizer_step(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_pre_optimizer_step", *arguments, **kwargs)

    def on_optimizer_step(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_optimizer_step", *arguments, **kwargs)

    def on_step_end(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_step_end", *arguments, **kwargs)

    def on_log(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_log", *arguments, **kwargs)

    def on_evaluate(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_evaluate", *arguments, **kwargs)

    def on_predict(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_predict", *arguments, **kwargs)

    def on_save(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_save", *arguments, **kwargs)

    def on_train_end(self, *arguments: object, **kwargs: object) -> None:
        self._forward("on_train_end", *arguments, **kwargs)


def integration_callbacks(names: Sequence[str], failures: dict[str, str]) -> list[TrainerCallback]:
    """Return transformers' callbacks for these names of `report_to`. One that cannot be created is a failure."""
    callbacks: list[TrainerCallback] = []
    for name in names:
        [callback_class] = get_reporting_integration_callbacks([name])
        try:
            callbacks.append(GuardedCallback(name, callback_class(), failures))
        except Exception as error:  # noqa: BLE001  a tracker may raise anything, and training must continue
            failures[name] = redact_text(f"{type(error).__name__}: {error}")
            logger.warning("%s cannot be used: %s", name, failures[name])
    return callbacks
