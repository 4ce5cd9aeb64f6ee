"""The guard: a run whose loss has exploded is stopped, and its last good checkpoint stays the last."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.controller import LossGuardConfig
from finetuning.errors import GuardStopped

if TYPE_CHECKING:
    from transformers import TrainerCallback

WINDOW = 50
"""Logged losses that a new one is measured by."""
MARGIN = 1.0
"""What a loss must be above the median at least: a loss near 0 doubles without meaning anything."""


@dataclass(frozen=True)
class LossSpike:
    """The losses at the end of a run that are all exploded, oldest first, and what they were measured by."""

    losses: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    median: float = 0.0
    limit: float = 0.0
    before: int = 0
    """The step of the last log before the streak."""

    def __len__(self) -> int:
        return len(self.losses)


def find_loss_spike(losses: Sequence[tuple[int, float]], factor: float) -> LossSpike:
    """The exploded losses that the run ends with; empty when the last one is ordinary.

    A loss has exploded when it is above each of the last 50 losses before the streak, above their median m by
    (factor - 1) * |m|, and above it by 1. A streak that ends by itself counts as ordinary afterwards, so that rows
    that differ much among themselves widen what is ordinary.

    Args:
        losses: (step, loss) of each training log, oldest first. Only the end is looked at.

    >>> calm = [(step, 2.0) for step in range(10)]
    >>> exploded_streak([*calm, (10, 9.0), (11, 9.5)], 3.0).losses
    (9.0, 9.5)
    >>> len(exploded_streak([*calm, (10, 9.0), (11, 2.1)], 3.0))
    0
    """
    streak: list[tuple[int, float]] = []
    ordinary: list[float] = []
    median = limit = 0.0
    before = last = 0
    for step, loss in losses[-3 * WINDOW :]:
        window = ordinary[-WINDOW:]
        if window:
            median = statistics.median(window)
            limit = max(max(window), median + max((factor - 1) * abs(median), MARGIN))
        if window and loss > limit:
            before = before if streak else last
            streak.append((step, loss))
        else:
            ordinary += [one for _, one in streak] + [loss]
            streak = []
        last = step
    return LossSpike(tuple(one for _, one in streak), tuple(step for step, _ in streak), median, limit, before)


def guard_callback(guard: LossGuardConfig) -> TrainerCallback:
    """The callback that raises GuardStopped when the loss has exploded.

    The logged loss is the mean of all processes, so that they stop alike. While a streak lasts no checkpoint is saved:
    the newest one stays from before it. A checkpoint that a signal or a rule asks for at the end is saved.
    """
    from transformers import TrainerCallback

    class GuardCallback(TrainerCallback):
        """See `guard_callback`."""

        def __init__(self) -> None:
            self._streak = LossSpike()

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            recent = state.log_history[-6 * WINDOW :]
            losses = [(entry.get("step", 0), float(entry["loss"])) for entry in recent if "loss" in entry]
            self._streak = find_loss_spike(losses, guard.explode_factor)
            self._hold_back(state, control)
            if len(self._streak) >= guard.patience:
                raise GuardStopped(_message(self._streak, Path(args.output_dir), guard), hint=_hint(guard))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            # A log of this very step comes first, and may end the streak.
            if not control.should_log:
                self._hold_back(state, control)

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self._hold_back(state, control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self._hold_back(state, control)

        def _hold_back(self, state: Any, control: Any) -> None:
            if self._streak and not control.should_training_stop and state.global_step < state.max_steps:
                control.should_save = False

    return GuardCallback()


def _message(streak: LossSpike, output_dir: Path, guard: LossGuardConfig) -> str:
    values = ", ".join(f"{loss:.4g} at step {step}" for step, loss in zip(streak.steps, streak.losses, strict=True))
    return (
        f"step {streak.steps[-1]}: the loss has exploded: {values}, where the median was {streak.median:.4g} and"
        f" {streak.limit:.4g} the most that is let pass. {_last_good(streak, output_dir)}"
    )


def _last_good(streak: LossSpike, output_dir: Path) -> str:
    """Which checkpoint to go on from. One between the last ordinary loss and the first exploded one may be bad."""
    names = [path.name.rpartition("-")[2] for path in output_dir.glob("checkpoint-*")]
    numbers = sorted(int(name) for name in names if name.isdecimal())
    good = [number for number in numbers if number <= streak.before]
    if not good:
        return f"There is no checkpoint from step {streak.before}, the last good one, or before."
    doubtful = [f"checkpoint-{number}" for number in numbers if number > streak.before]
    text = f"Nothing was saved since; checkpoint-{good[-1]} is good"
    return text + (f", {', '.join(doubtful)} may not be." if doubtful else ".")


def _hint(guard: LossGuardConfig) -> str:
    return (
        "Lower the learning rate, warm up longer or look at the rows of these steps; guard.explode_factor"
        f" ({guard.explode_factor:g}), guard.patience ({guard.patience}) and guard.enabled say when a run is stopped."
    )
