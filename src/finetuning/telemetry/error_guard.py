"""Errors in telemetry itself: reported once, marked in the recorded data, and never raised into training.

An error of the caller is none of these: a wrong argument or an unknown name is raised where it was written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from finetuning.config.redaction import redact_text
from finetuning.errors import FinetuningError

logger = logging.getLogger(__name__)

_MAX_MESSAGES = 100
"""More distinct messages than that are only counted."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


class TelemetryUsageError(ValueError):
    """Telemetry is used wrongly: an unknown span, an impossible value, a call out of order."""


class TelemetryErrors:
    """Collects the errors of one telemetry. `messages` holds each distinct one, in order."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.count = 0
        self._listener: Callable[[str], None] | None = None
        self._reported: set[str] = set()
        # The exporters report from their threads.
        self._lock = threading.RLock()
        self._is_marking = False

    def set_listener(self, listener: Callable[[str], None] | None) -> None:
        """Call `listener` with each new message, to mark it in the recorded data."""
        self._listener = listener

    def record(self, action: str, error: BaseException | str, *, kind: str | None = None) -> None:
        """Record that `action` failed. The first error of each kind is logged as a warning and marked.

        Args:
            kind: what distinguishes errors; by default the action and the type of the exception.
        """
        text = f"{action}: {error}" if isinstance(error, str) else f"{action}: {type(error).__name__}: {error}"
        self.count += 1
        self.report(kind or f"{action}: {type(error).__name__}", f"telemetry is incomplete, training continues: {text}")

    def report(self, kind: str, text: str, *, level: int = logging.WARNING) -> None:
        """Log a message and mark it in the recorded data, once for each kind."""
        with self._lock:
            message = redact_text(text)
            is_new = kind not in self._reported
            self._reported.add(kind)
            stored = message.removeprefix("telemetry is incomplete, training continues: ")
            if stored not in self.messages and len(self.messages) < _MAX_MESSAGES:
                self.messages.append(stored)
            if is_new:
                logger.log(level, "%s", message)
                self._mark(stored)

    def _mark(self, message: str) -> None:
        # The listener writes an event, and an error in that must not call it again.
        if self._listener is None or self._is_marking:
            return
        self._is_marking = True
        try:
            self._listener(message)
        except Exception as error:  # noqa: BLE001  the mark is worth less than the training
            self.messages.append(f"marking an error: {type(error).__name__}: {error}")
        finally:
            self._is_marking = False

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
    """Make a method return None instead of raising. The error is recorded in the `errors` of its object.

    A `TelemetryUsageError` is raised, and a `TypeError` because the method does not take these arguments.
    """

    @wraps(method)
    def call(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        try:
            return method(self, *args, **kwargs)
        except TelemetryUsageError:
            raise
        except Exception as error:
            # Without a frame below this one, the call itself failed: its arguments do not fit.
            if isinstance(error, TypeError) and error.__traceback__ and error.__traceback__.tb_next is None:
                raise
            self.errors.record(method.__name__, error)
            return None

    return call
