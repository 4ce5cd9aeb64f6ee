"""Restart a job after the loss of a process or machine, and wait for its machines to rendezvous."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

from finetuning.errors import EXIT_INTERNAL, InternalError

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0
_CONNECT_TIMEOUT_S = 65.0
"""Longer than torch tries to connect to the rendezvous store; a longer attempt did complete its rendezvous."""


def run_with_restarts(attempt: Callable[[], int], restarts: int, log: Callable[[str], None]) -> int:
    """Run a job, restarting it after internal errors, and return the exit code of the last attempt.

    Only exit code 203 is restarted: a process was killed, or failed for a reason that the user cannot fix. An invalid
    config, a stopped guard, a signal or a time limit would end a new attempt the same way.
    """
    for number in range(1, restarts + 1):
        code = attempt()
        if code != EXIT_INTERNAL:
            return code
        log(f"a process or machine of the job was lost: restart {number} of {restarts}")
        time.sleep(_PAUSE_S)
    return attempt()


def retry_rendezvous(attempt: Callable[[], int], timeout_s: float) -> int:
    """Run a job until its machines rendezvous, and return its exit code.

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
