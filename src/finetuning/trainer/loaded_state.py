"""Verify that the optimizer, the learning rate schedule and the random number generators have a checkpoint's state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals


@runtime_checkable
class HasState(Protocol):
    """An optimizer or a learning rate schedule."""

    def state_dict(self) -> Mapping[str, object]: ...


OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
_PARAM_GROUPS = "param_groups"


def optimizer_differences(
    optimizer: HasState, scheduler: object, checkpoint: Path, *, settings_replaced: bool
) -> list[str]:
    """Return where the states of optimizer and scheduler differ from those in a checkpoint's files; [] if nowhere.

    Args:
        settings_replaced: whether the run's own settings replaced those of the parameter groups and of the schedule.
    """
    saved = _read(checkpoint / OPTIMIZER_FILE)
    state: Mapping[str, object] = optimizer.state_dict()
    if settings_replaced:
        saved, state = ({key: value for key, value in item.items() if key != _PARAM_GROUPS} for item in (saved, state))
    difference = first_difference(saved, state)
    differences = [] if difference is None else [f"{OPTIMIZER_FILE}{difference}"]
    if not settings_replaced:
        assert isinstance(scheduler, HasState)
        difference = first_difference(_read(checkpoint / SCHEDULER_FILE), scheduler.state_dict())
        differences += [] if difference is None else [f"{SCHEDULER_FILE}{difference}"]
    return differences


def rng_differences(file: Path) -> list[str]:
    """Return which random number generators of this process differ from the states in a file; [] if none does."""
    saved = _read(file)
    current = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    return [name for name, state in current.items() if first_difference(saved.get(name), state) is not None]


def first_difference(saved: object, loaded: object) -> str | None:
    """Return the path to the first value that differs, such as `[state][3][exp_avg]`; None if all are equal.

    Tensors are equal if dtype, shape and values are; sequences may have another type (a tuple for a list).
    """
    if isinstance(saved, torch.Tensor):
        return None if isinstance(loaded, torch.Tensor) and _equal(saved, loaded) else ""
    if isinstance(saved, Mapping):
        if not isinstance(loaded, Mapping):
            return ""
        if saved.keys() != loaded.keys():
            key = sorted(map(str, saved.keys() ^ loaded.keys()))[0]
            return f"[{key}] (on one side only)"
        items = ((key, saved[key], loaded[key]) for key in saved)
    elif isinstance(saved, np.ndarray):
        return None if np.array_equal(saved, np.asarray(loaded)) else ""
    elif isinstance(saved, Sequence) and not isinstance(saved, str | bytes):
        if not isinstance(loaded, Sequence) or len(saved) != len(loaded):
            return ""
        items = ((index, left, right) for index, (left, right) in enumerate(zip(saved, loaded, strict=True)))
    else:
        return None if saved == loaded or (saved != saved and loaded != loaded) else ""
    for key, left, right in items:
        difference = first_difference(left, right)
        if difference is not None:
            return f"[{key}]{difference}"
    return None


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if type(first) is not torch.Tensor and hasattr(first, "dequantize"):
        # Optimizer states of torchao are tensor subclasses that implement few operations.
        first, second = first.dequantize(), second.dequantize()
    return torch.equal(first, second.to(first.device))


def _read(file: Path) -> dict[str, object]:
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
