"""The loss guard stops runs whose loss has exploded, and no others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from finetuning.callbacks.loss_guard import LossGuardCallback, find_loss_spike
from finetuning.config.sections.controller import LossGuardConfig
from finetuning.errors import EXIT_GUARD, GuardStopped


def first_stop(losses: list[float], guard: LossGuardConfig) -> int | None:
    """The index of the loss at which a run with these losses is stopped."""
    for end in range(1, len(losses) + 1):
        if len(find_loss_spike(list(enumerate(losses[:end])), guard.explode_factor)) >= guard.patience:
            return end - 1
    return None


def falling(count: int, start: float = 2.0) -> list[float]:
    return [start * 0.98**step for step in range(count)]


@pytest.mark.parametrize(
    ("losses", "stopped_at"),
    [
        ([*falling(30), 8.0, 9.0, 10.0, 11.0, 11.0], 34),
        ([2.0, *[11.0] * 6], 5),
        ([*falling(100), 11.0, 1.0, 11.0, 1.0, 11.0], None),
        ([*falling(30), 4.9, 4.8, 5.1, 5.0, 4.9], 34),
        ([*falling(30), 3.0, 3.1, 3.2, 3.3, 3.4, 3.5], None),
        ([0.001] * 30 + [0.01, 0.02, 0.03, 0.04, 0.05], None),
        ([0.69, 0.5, 0.2, 0.05, 3.0, 7.0, 20.0, 20.0, 20.0], 8),
        ([0.0, -0.1, 0.1, 0.05, -0.2, 0.4, 0.6, 0.7, 0.8, 0.8], None),
        (falling(50), None),
        ([2.0] * 50, None),
        ([2.0], None),
    ],
    ids=[
        *("a run that explodes", "at once", "single outliers", "three times the median", "a little rise"),
        *("a rise near zero", "a preference loss", "losses around zero", "falling", "flat", "one loss"),
    ],
)
def test_which_losses_count_as_exploded(losses: list[float], stopped_at: int | None) -> None:
    assert first_stop(losses, LossGuardConfig()) == stopped_at


def test_noise_does_not_stop_a_run() -> None:
    """Losses with heavy tails, which a factor alone would call explosions."""
    generator = random.Random(1)
    for _ in range(20):
        losses = [generator.lognormvariate(-0.7, 1.0) for _ in range(400)]
        assert first_stop(losses, LossGuardConfig()) is None


def test_factor_and_patience_are_configurable() -> None:
    losses = [*falling(30), 2.7, 2.8, 2.9, 3.0, 3.1]
    assert first_stop(losses, LossGuardConfig()) is None
    assert first_stop(losses, LossGuardConfig(explode_factor=1.5, patience=3)) == 32
    assert first_stop(losses, LossGuardConfig(explode_factor=1.5)) == 34


def test_the_run_stops_and_its_last_good_checkpoint_stays_the_newest(scripted_run: Callable) -> None:
    losses = [2.0, 1.9, 1.8, 1.7, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0]
    run = scripted_run(
        losses,
        [LossGuardCallback(LossGuardConfig(patience=3))],
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    assert isinstance(run.error, GuardStopped)
    assert run.error.exit_code == EXIT_GUARD
    assert run.state.global_step == 7
    assert run.checkpoints == ["checkpoint-3", "checkpoint-4"]
    message = str(run.error)
    assert "step 7: the loss has exploded: 9 at step 5, 10 at step 6, 11 at step 7" in message
    assert "the median before was 1.85" in message
    assert "checkpoint-4 is good" in message


def test_a_checkpoint_between_two_logs_is_reported_as_doubtful(scripted_run: Callable) -> None:
    losses = [2.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    run = scripted_run(
        losses, [LossGuardCallback(LossGuardConfig(patience=3))], logging_steps=2, save_strategy="steps", save_steps=1
    )
    assert isinstance(run.error, GuardStopped)
    assert "checkpoint-4 is good, checkpoint-5 may not be" in str(run.error)


def test_saving_continues_after_an_outlier(scripted_run: Callable) -> None:
    losses = [2.0, 1.9, 9.0, 1.8, 1.7]
    run = scripted_run(losses, [LossGuardCallback(LossGuardConfig())], save_strategy="steps", save_steps=1)
    assert run.error is None
    assert run.checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_a_resumed_run_keeps_its_normal_range() -> None:
    """The spike is computed from the trainer's log, which is part of a checkpoint."""
    before = list(enumerate(falling(30)))
    assert len(find_loss_spike([*before, (30, 9.0)], 3.0)) == 1
