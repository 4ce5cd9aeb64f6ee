"""Restart a job after the loss of a process or machine, and wait for its machines to rendezvous."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from finetuning.errors import EXIT_INTERNAL, InternalError

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0
_CONNECT_TIMEOUT_S = 65.0
"""Longer than torch tries to connect to the rendezvous store; a longer attempt did complete its rendezvous."""


@dataclass(frozen=True)
class JobEnd:
    """How the processes of a job ended on this machine."""

    exit_code: int
    killed: str | None = None
    """Which process a signal killed, on which host; None if each ended by itself."""
    error: str | None = None
    """What a process reported as its own error; None if it lost a connection or was killed."""
    is_transient: bool = True
    """Whether another attempt may end otherwise, by the kind of that error."""


def run_with_restarts(attempt: Callable[[], JobEnd], restarts: int, log: Callable[[str], None]) -> JobEnd:
    """Run a job, restarting it after internal errors, and return the end of the last attempt.

    Only exit code 203 is restarted, if another attempt may succeed: a process was killed, hung, or lost a connection.
    An invalid config, a stopped guard, a signal, a time limit, too little memory or a bug would end it the same way; so
    would an error that two attempts in a row report.
    """
    previous_error = None
    for number in range(1, restarts + 1):
        end = attempt()
        if end.exit_code != EXIT_INTERNAL:
            return end
        if not end.is_transient or (end.error is not None and end.error == previous_error):
            log("the job is not restarted: its error would end another attempt the same way")
            return end
        previous_error = end.error
        log(f"{end.killed or 'a process or machine of the job was lost'}: restart {number} of {restarts}")
        time.sleep(_PAUSE_S)
    return attempt()


def retry_rendezvous(attempt: Callable[[], JobEnd], timeout_s: float) -> JobEnd:
    """Run a job until its machines rendezvous, and return how it ended.

    The machine that hosts the rendezvous store may start later than the others, or be restarted.

    Raises:
        InternalError: the other machines did not join in time.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

    waiting_since = time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return attempt()
        except RendezvousTimeoutError as error:
            raise _rendezvous_failed(timeout_s, error) from error
        except (RendezvousError, DistError) as error:
            now = time.monotonic()
            if now - started > _CONNECT_TIMEOUT_S:
                waiting_since = now
            if now - waiting_since > timeout_s:
                raise _rendezvous_failed(timeout_s, error) from error
        logger.warning("waiting for the other machines of the job, for %.0f s so far", now - waiting_since)
        # torch keeps the last attempt's store alive in a reference cycle; the next attempt would reuse it.
        gc.collect()
        time.sleep(_PAUSE_S)


def _rendezvous_failed(timeout_s: float, error: Exception) -> InternalError:
    return InternalError(
        f"the machines of the job did not rendezvous within {timeout_s:.0f} s: {type(error).__name__}: {error}",
        hint="Start each machine with the same --main-address, reachable from all; raise --meet-within to wait longer.",
    )
