"""What goes wrong in telemetry itself: told once, marked in the record, never raised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from finetuning.errors import FinetuningError

logger = logging.getLogger(__name__)

MOST_FAULTS = 20
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Faults:
    """The faults of one telemetry. `messages` holds them, in order, without repeats."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.count = 0
        self._listener: Callable[[str], None] | None = None

    @property
    def too_many(self) -> bool:
        """Whether telemetry had better give up."""
        return self.count >= MOST_FAULTS

    def listen(self, listener: Callable[[str], None] | None) -> None:
        """Calls this with each new message, so that it is marked in what is recorded."""
        self._listener = listener

    def note(self, where: str, error: BaseException | str) -> None:
        """One fault. The first one is told to the user, the others are kept."""
        message = f"{where}: {error}" if isinstance(error, str) else f"{where}: {type(error).__name__}: {error}"
        self.count += 1
        if message in self.messages:
            return
        self.messages.append(message)
        if len(self.messages) == 1:
            logger.warning("telemetry is incomplete, training goes on: %s", message)
        listener, self._listener = self._listener, None
        if listener is None:
            return
        try:
            listener(message)
        except Exception as second:  # noqa: BLE001  the mark is worth less than the training
            self.messages.append(f"{where}: {type(second).__name__}: {second}")
        self._listener = listener

    def attempt(self, where: str, call: Callable[[], _R]) -> _R | None:
        """What the call gives; None, and a fault, where it raises. Errors that the user must mend go on."""
        try:
            return call()
        except FinetuningError:
            raise
        except Exception as error:  # noqa: BLE001  whatever telemetry does, training goes on
            self.note(where, error)
            return None


def guarded(method: Callable[_P, _R]) -> Callable[_P, _R | None]:
    """The method of an object with `faults`, with None for its outcome where it would raise."""

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        owner: Any = args[0]
        if owner.faults.too_many:
            return None
        try:
            return method(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever telemetry does, training goes on
            owner.faults.note(method.__name__, error)
            return None

    return call
