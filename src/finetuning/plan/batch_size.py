"""From the batch that the optimizer shall see to what each process computes at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetuning.config.sections.training import BatchSizeConfig
from finetuning.errors import ConfigError, Location, Problem

AUTO_ROWS = 16
"""Most rows that `auto` plans with."""
_KEY = "batchsize_conf.total_train_batch_size"


@dataclass(frozen=True)
class BatchPlan:
    """world_size x per_device x accumulation == total, in rows; per_device_eval in rows a device in evaluation."""

    total: int
    world_size: int
    per_device: int
    accumulation: int
    per_device_eval: int
    reason: str
    warning: str | None = None


def plan_batches(config: BatchSizeConfig, world_size: int, place: Location | None = None) -> BatchPlan:
    """The largest per-device batch within the maximum that reaches the total batch size exactly.

    Raises:
        ConfigError: the total is not a multiple of the world size; the message names the nearest totals that are.

    >>> plan = plan_batches(BatchsizeConfig(total_train_batch_size=512, max_per_device_train_batch_size=4), 8)
    >>> plan.per_device, plan.accumulation
    (4, 16)
    """
    total, wanted = config.total_train_batch_size, config.max_per_device_train_batch_size
    maximum = AUTO_ROWS if wanted == "auto" else wanted
    if total % world_size:
        below = total - total % world_size
        nearest = " and ".join(str(candidate) for candidate in (below, below + world_size) if candidate)
        raise ConfigError(
            [
                Problem(
                    f"{total} rows cannot be divided among {world_size} processes;"
                    f" the nearest total{'s that can are' if below else ' that can is'} {nearest}",
                    place or Location(key=_KEY),
                )
            ]
        )
    rows = total // world_size
    per_device = _largest_divisor(rows, maximum)
    accumulation = rows // per_device
    return BatchPlan(
        total=total,
        world_size=world_size,
        per_device=per_device,
        accumulation=accumulation,
        per_device_eval=config.per_device_eval_batch_size or per_device,
        reason=f"the largest divisor of {total} / {world_size} = {rows} that is at most {maximum}"
        + (", to be halved on a GPU until the longest rows fit" if wanted == "auto" else ""),
        warning=_awkward(total, world_size, per_device, accumulation, maximum),
    )


def _largest_divisor(number: int, maximum: int) -> int:
    return next(size for size in range(min(number, maximum), 0, -1) if number % size == 0)


def _awkward(total: int, world_size: int, per_device: int, accumulation: int, maximum: int) -> str | None:
    """Why this total is a slow choice, and which neighbours are not: None when it is a fair one."""
    if accumulation < 2 * math.ceil(total / world_size / maximum):
        return None
    full = world_size * maximum
    below = total - total % full
    neighbours = " or ".join(
        f"{candidate} ({maximum} x {candidate // full})" for candidate in (below, below + full) if candidate
    )
    return (
        f"{total} rows make batches of only {per_device} row{'s' * (per_device > 1)} a device, {accumulation} times a"
        f" step, because {total // world_size} has no larger divisor up to {maximum}."
        f" Better totals: {neighbours}"
    )
