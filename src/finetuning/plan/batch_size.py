"""Split the total batch size into per-device batch size and gradient accumulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetuning.config.sections.training import BatchSizeConfig
from finetuning.errors import ConfigError, Location, Problem

AUTO_ROWS = 16
"""Per-device batch size that `auto` starts from, before the memory check."""
_KEY = "batchsize_conf.total_train_batch_size"


@dataclass(frozen=True)
class BatchPlan:
    """Batch sizes in rows, with world_size x per_device x accumulation == total; per_device_eval is for evaluation."""

    total: int
    world_size: int
    per_device: int
    accumulation: int
    per_device_eval: int
    reason: str
    warning: str | None = None


def plan_batches(config: BatchSizeConfig, world_size: int, location: Location | None = None) -> BatchPlan:
    """Choose the largest per-device batch size within the maximum that gives exactly the total batch size.

    Raises:
        ConfigError: the total is not a multiple of the world size. The message suggests the nearest multiples.

    >>> plan = plan_batches(BatchSizeConfig(total_train_batch_size=512, max_per_device_train_batch_size=4), 8)
    >>> plan.per_device, plan.accumulation
    (4, 16)
    """
    total, requested = config.total_train_batch_size, config.max_per_device_train_batch_size
    maximum = AUTO_ROWS if requested == "auto" else requested
    if total % world_size:
        lower = total - total % world_size
        nearest = " and ".join(str(candidate) for candidate in (lower, lower + world_size) if candidate)
        raise ConfigError(
            [
                Problem(
                    f"{total} rows cannot be divided among {world_size} processes;"
                    f" the nearest total{'s that can are' if lower else ' that can is'} {nearest}",
                    location or Location(key=_KEY),
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
        + (", halved on a GPU until the longest rows fit into memory" if requested == "auto" else ""),
        warning=_warning(total, world_size, per_device, accumulation, maximum),
    )


def _largest_divisor(number: int, maximum: int) -> int:
    return next(size for size in range(min(number, maximum), 0, -1) if number % size == 0)


def _warning(total: int, world_size: int, per_device: int, accumulation: int, maximum: int) -> str | None:
    """Return why this total leads to small batches, and better totals; None if it does not."""
    # Small batches at least double the number of forward passes.
    if accumulation < 2 * math.ceil(total / world_size / maximum):
        return None
    full = world_size * maximum
    lower = total - total % full
    better = " or ".join(
        f"{candidate} ({maximum} x {candidate // full})" for candidate in (lower, lower + full) if candidate
    )
    return (
        f"a total of {total} rows leaves only {per_device} row{'s' * (per_device > 1)} per device with {accumulation}"
        f" accumulation steps, because {total // world_size} has no larger divisor up to {maximum}."
        f" Better totals: {better}"
    )
