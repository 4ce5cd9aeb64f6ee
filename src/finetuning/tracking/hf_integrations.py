"""Callbacks of transformers for trackers that have no class of accelerate's, behind a guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def guarded_callback(name: str, callback: Any, failures: dict[str, str]) -> TrainerCallback:
    """A callback that passes every event on to another one, until that one fails: then it is told and left alone."""
    from transformers import TrainerCallback

    class Guarded(TrainerCallback):
        """See `guarded_callback`."""

        def _pass(self, event: str, *arguments: Any, **more: Any) -> None:
            if name in failures:
                return
            try:
                getattr(callback, event)(*arguments, **more)
            except Exception as error:  # noqa: BLE001  whatever a tracker does, training goes on
                failures[name] = f"{type(error).__name__}: {error}"
                logger.warning("%s failed and is switched off: %s", name, failures[name])

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_train_begin", *arguments, **more)

        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_step_begin", *arguments, **more)

        def on_pre_optimizer_step(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_pre_optimizer_step", *arguments, **more)

        def on_optimizer_step(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_optimizer_step", *arguments, **more)

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_step_end", *arguments, **more)

        def on_log(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_log", *arguments, **more)

        def on_evaluate(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_evaluate", *arguments, **more)

        def on_predict(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_predict", *arguments, **more)

        def on_save(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_save", *arguments, **more)

        def on_train_end(self, *arguments: Any, **more: Any) -> None:
            self._pass("on_train_end", *arguments, **more)

    return Guarded()


def integration_callbacks(names: Sequence[str], failures: dict[str, str]) -> list[TrainerCallback]:
    """transformers' own callbacks by the names of `report_to`; one that cannot be made is a failure."""
    from transformers.integrations import get_reporting_integration_callbacks

    made = []
    for name in names:
        [kind] = get_reporting_integration_callbacks([name])
        try:
            made.append(guarded_callback(name, kind(), failures))
        except Exception as error:  # noqa: BLE001  as above
            failures[name] = f"{type(error).__name__}: {error}"
            logger.warning("%s cannot be used: %s", name, failures[name])
    return made
