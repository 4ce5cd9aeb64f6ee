"""Pass signals on to the processes of a job, and outlive them: once, however many of its processes are signaled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from finetuning.distributed import GRACE_VARIABLE, REPEAT_S
from finetuning.errors import EXIT_GUARD, EXIT_OK, EXIT_USER

MODULE = "finetuning.cli.main"
"""What the processes of a job run."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_REPORT_S = 5
"""How long before the scheduler does it the launcher kills processes, to report the end itself."""


class SignalForwarder:
    """Forward the first signal to the processes of the job; repeats within `REPEAT_S` are part of it.

    torch's agent waits for its processes only if its loop is interrupted, so the first signal raises its exception.
    """

    def __init__(self) -> None:
        self.received = 0
        self._time = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread.

        Raises:
            SignalException: the first signal, unless this process itself waits for the processes of the job.
        """
        now = time.monotonic()
        is_first, is_repeated = not self.received, now - self._time < REPEAT_S
        # A lost terminal sends SIGHUP more than once.
        if not is_first and (is_repeated or number == signal.SIGHUP):
            return
        self.received, self._time = self.received or number, now
        processes = processes_of_job()
        for pid in processes:
            os.kill(pid, number)
        if is_first and not any(_is_waited_for(pid) for pid in processes):
            from torch.distributed.elastic.multiprocessing.api import SignalException

            raise SignalException(f"received {signal.Signals(number).name}", signal.Signals(number))

    def exit_code(self, code: int) -> int:
        """Return the exit code of a job: that of the signal, unless the job completed or failed by itself."""
        return 128 + self.received if self.received and code not in (EXIT_OK, EXIT_USER, EXIT_GUARD) else code


@contextmanager
def forward_signals(grace_s: int, environ: MutableMapping[str, str] = os.environ) -> Iterator[SignalForwarder]:
    """Forward SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored, SIGHUP in the block.

    Args:
        grace_s: how long after its signal the scheduler kills the job.
    """
    forwarder = SignalForwarder()
    environ.update(
        {
            GRACE_VARIABLE: str(grace_s),
            # torch's agent would install its own handlers, which take a repeated signal for a second one.
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(grace_s - _REPORT_S, 1)),
        }
    )
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or not is_ignored]
    previous = {number: signal.signal(number, forwarder.handle) for number in numbers}
    try:
        yield forwarder
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def processes_of_job() -> list[int]:
    """Return the process ids of the processes of the job that this process has started."""
    children: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            children += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:
            # A thread that has ended.
            continue
    return [pid for pid in children if MODULE.encode() in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_waited_for(pid: int) -> bool:
    """Return whether this process waits for a child by itself. torch's agent starts each in a session of its own."""
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:
        return False
