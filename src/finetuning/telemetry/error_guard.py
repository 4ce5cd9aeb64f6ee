"""What goes wrong in telemetry itself: told once, marked in the record, never raised.

Time that never runs backwards, and ids that draw on no seeded generator."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from opentelemetry.sdk.trace.id_generator import IdGenerator

from finetuning.errors import FinetuningError

logger = logging.getLogger(__name__)

MOST_FAULTS = 20
_P = ParamSpec("_P")
_R = TypeVar("_R")


class TelemetryErrors:
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


class Clock:
    """Nanoseconds since 1970, read once from the wall clock and from then on counted by the monotonic one."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, counter_ns: Callable[[], int] = time.perf_counter_ns):
        self._counter_ns = counter_ns
        self._offset = wall_ns() - counter_ns()

    def now_ns(self) -> int:
        return self._offset + self._counter_ns()


class SystemIds(IdGenerator):
    """Ids from the operating system. The SDK's own draw from `random`: after `set_seed` every run would get the same
    ones, and training would get other random numbers than without telemetry."""

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8), "big") or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(os.urandom(16), "big") or 1
