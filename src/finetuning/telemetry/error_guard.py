"""Errors in telemetry itself: reported once, marked in the recorded data, and never raised into training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from finetuning.config.redaction import redact_text
from finetuning.errors import FinetuningError

logger = logging.getLogger(__name__)

MAX_ERRORS = 20
"""After this many errors, telemetry stops recording."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


class TelemetryErrors:
    """Collects the errors of one telemetry. `messages` holds each distinct one, in order."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.count = 0
        self._listener: Callable[[str], None] | None = None

    @property
    def limit_reached(self) -> bool:
        """Whether telemetry should stop recording."""
        return self.count >= MAX_ERRORS

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Call `listener` with each new message, to mark it in the recorded data."""
        self._listener = listener

    def record(self, action: str, error: BaseException | str) -> None:
        """Record that `action` failed. Only the first error is logged as a warning."""
        text = f"{action}: {error}" if isinstance(error, str) else f"{action}: {type(error).__name__}: {error}"
        message = redact_text(text)
        self.count += 1
        if message in self.messages:
            return
        self.messages.append(message)
        if len(self.messages) == 1:
            logger.warning("telemetry is incomplete, training continues: %s", message)
        # The listener writes an event, and an error in that must not call it again.
        listener, self._listener = self._listener, None
        if listener is None:
            return
        try:
            listener(message)
        except Exception as second:  # noqa: BLE001  the mark is worth less than the training
            self.messages.append(f"{action}: {type(second).__name__}: {second}")
        self._listener = listener

    def attempt(self, action: str, function: Callable[[], _R]) -> _R | None:
        """Return the function's result, or None if it raises. Errors that the user must fix are raised."""
        try:
            return function()
        except FinetuningError:
            raise
        except Exception as error:  # noqa: BLE001  telemetry must not stop training
            self.record(action, error)
            return None


class HasErrors(Protocol):
    """An object whose methods can be `guarded`."""

    errors: TelemetryErrors


_Owner = TypeVar("_Owner", bound=HasErrors)


def guarded(method: Callable[Concatenate[_Owner, _P], _R]) -> Callable[Concatenate[_Owner, _P], _R | None]:
    """Make a method return None instead of raising. The error is recorded in the `errors` of its object."""

    @wraps(method)
    def call(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        if self.errors.limit_reached:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  telemetry must not stop training
            self.errors.record(method.__name__, error)
            return None

    return call
