"""A sink in a thread of its own, for trackers that open connections and take their time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

from finetuning.tracking.sinks import LogEvent, Sink, StepMetrics

CLOSE_WAIT_S = 60.0
_MOST_WAITING = 10_000


class BackgroundSink(Sink):
    """Passes what it is told to another sink, in order, and waits for it only when it is closed.

    What goes wrong there is raised by the next call, here, where the guard of the sinks sees it.
    """

    def __init__(self, sink: Sink, close_wait_s: float = CLOSE_WAIT_S):
        self.name = sink.name
        self._sink = sink
        self._close_wait_s = close_wait_s
        self._waiting: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {self.name}")

    def begin(self, metrics: StepMetrics) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._put("begin", metrics)

    def log(self, event: LogEvent) -> None:
        self._put("log", event)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._put("figures", dict(values), step)

    def close(self) -> None:
        """Waits for what is under way.

        Raises:
            TimeoutError: the tracker did not come to an end.
        """
        if self._thread.ident is None:
            return
        if self._thread.is_alive():
            self._waiting.put(("close", ()), timeout=self._close_wait_s)
        self._thread.join(self._close_wait_s)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"it did not answer within {self._close_wait_s:.0f} s; what it had not sent is lost")

    def _put(self, method: str, *arguments: Any) -> None:
        self._raise()
        try:
            self._waiting.put_nowait((method, arguments))
        except queue.Full:
            raise TimeoutError(f"it does not answer, and {_MOST_WAITING} messages wait for it") from None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, arguments = self._waiting.get()
            try:
                getattr(self._sink, method)(*arguments)
            except Exception as error:  # noqa: BLE001  trackers fail in any way; told in the run's own thread
                self._error = error
                return
