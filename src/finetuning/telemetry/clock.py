"""Time that never runs backwards, and ids that draw on no seeded generator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from opentelemetry.sdk.trace.id_generator import IdGenerator


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
