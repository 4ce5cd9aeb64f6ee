"""A job that goes on when one of its processes or machines is lost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from finetuning.errors import EXIT_INTERNAL, InternalError

_PAUSE_S = 1.0
_CONNECTING_S = 65.0
"""Longer than torch tries to reach the meeting point; an attempt that lasted longer has met."""


def run_with_restarts(attempt: Callable[[], int], restarts: int, tell: Callable[[str], None]) -> int:
    """The exit code of the last of some attempts.

    An attempt is repeated, so often as `restarts` says, when one of its processes was killed or failed for a reason
    that the user cannot mend (203); not when the config is wrong, a guard has stopped the run, or a signal or its time
    has ended it.
    """
    for made in range(1, restarts + 1):
        code = attempt()
        if code != EXIT_INTERNAL:
            return code
        tell(f"a process or a machine of the job was lost: restart {made} of {restarts}")
        time.sleep(_PAUSE_S)
    return attempt()


def rendezvous_ok(attempt: Callable[[], int], within_s: float) -> int:
    """The exit code of an attempt in which the machines of a job have met, whose meeting point may come up later than
    they, or be away for a while.

    Raises:
        InternalError: the others did not come within that time.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

    since = time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return attempt()
        except RendezvousTimeoutError as error:
            raise _not_met(within_s, error) from error
        except (RendezvousError, DistError) as error:
            now = time.monotonic()
            if now - started > _CONNECTING_S:
                since = now
            if now - since > within_s:
                raise _not_met(within_s, error) from error
        # What the last attempt holds of torch's meeting point would be taken for that of the next one.
        gc.collect()
        time.sleep(_PAUSE_S)


def _not_met(within_s: float, error: Exception) -> InternalError:
    return InternalError(
        f"the machines of the job did not meet within {within_s:.0f} s: {type(error).__name__}: {error}",
        hint="Start each with the same --main-address, which all can reach; --meet-within lets them wait longer.",
    )
