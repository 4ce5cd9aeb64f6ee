"""The loss guard stops runs whose loss has exploded, and no others."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.callbacks.loss_guard import (
    CONSTANT_REWARD_STEPS,
    LossGuardCallback,
    NoSignalCallback,
    find_loss_spike,
    steps_of_equal_rewards,
)
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


def warnings_of(log: list[dict[str, float]], max_steps: int = 1000, *, fp16: bool = False) -> dict[str, str]:
    """The warnings of a run with these logged values, one log per step."""
    import transformers

    callback = NoSignalCallback()
    state = transformers.TrainerState(max_steps=max_steps)
    for step, values in enumerate(log, start=1):
        state.global_step = step
        state.log_history.append({**values, "step": step})
        callback.on_log(SimpleNamespace(fp16=fp16), state, None)
    return callback.warnings


def test_a_loss_that_collapses_to_0_is_reported_once_with_its_step(caplog: Any) -> None:
    log = [{"loss": 0.5, "grad_norm": 1.0}, {"loss": 0.0, "grad_norm": 1e-9}, {"loss": 0.0, "grad_norm": 1e-9}]
    with caplog.at_level(logging.WARNING, logger="finetuning"):
        warnings = warnings_of(log)
    assert list(warnings) == ["loss"]
    assert warnings["loss"].startswith("step 2: the loss is exactly 0.")
    assert "`finetuning preview`" in warnings["loss"]
    assert len(caplog.messages) == 1


def test_gradients_of_0_are_reported_once_with_their_step() -> None:
    log = [{"loss": 0.5, "grad_norm": 1.0}, {"loss": 0.4, "grad_norm": 0.0}, {"loss": 0.4, "grad_norm": 0.0}]
    warnings = warnings_of(log)
    assert list(warnings) == ["gradient"]
    assert warnings["gradient"].startswith("step 2: every gradient is exactly 0")
    assert "bf16" not in warnings["gradient"]
    assert "use bf16 instead of fp16" in warnings_of(log, fp16=True)["gradient"]


def rewarded(zero_std: float, loss: float = 0.0, grad_norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": grad_norm, "reward": 1.0, "frac_reward_zero_std": zero_std}


def test_rewards_that_never_vary_are_reported_with_the_step() -> None:
    warnings = warnings_of([rewarded(1.0, grad_norm=0.0)] * (CONSTANT_REWARD_STEPS + 3))
    assert list(warnings) == ["reward"], "a loss and gradients of 0 follow from equal rewards"
    assert warnings["reward"].startswith(
        "step 10: in the last 10 steps all completions of each prompt had equal rewards"
    )
    assert "grpo_args.rewards" in warnings["reward"]
    late = warnings_of([rewarded(0.5)] * 5 + [rewarded(1.0)] * CONSTANT_REWARD_STEPS)
    assert late["reward"].startswith("step 15:")
    assert warnings_of([rewarded(1.0)] * 3, max_steps=3)["reward"].startswith("step 3:")


def test_rewards_that_vary_now_and_then_are_no_reason_to_warn() -> None:
    assert warnings_of([rewarded(1.0)] * 9 + [rewarded(0.75)] + [rewarded(1.0)] * 9) == {}
    assert warnings_of([rewarded(1.0)] * 3) == {}
    without_generation = {"loss": 0.0, "grad_norm": 0.0}
    assert warnings_of([rewarded(0.5), without_generation, rewarded(0.0)]) == {}


def test_gradients_of_0_despite_varying_rewards_are_reported() -> None:
    assert list(warnings_of([rewarded(0.5, grad_norm=0.0)])) == ["gradient"]


def test_steps_between_logs_count() -> None:
    log = [{"step": 4, "frac_reward_zero_std": 0.9}, {"step": 5}, {"step": 16, "frac_reward_zero_std": 1.0}]
    assert steps_of_equal_rewards(log) == 12
    assert steps_of_equal_rewards([{"step": 3, "loss": 1.0}]) == 0


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_that_trains_nothing_is_reported_in_its_record(
    train: Any, sft_values: Any, dpo_values: Any, method: str
) -> None:
    """Of full training, whose gradients underflow. Weight decay moves the weights: they would fail verification."""
    import json
    from dataclasses import replace

    from finetuning.algorithms import ALGORITHMS

    algorithm = ALGORITHMS[method]

    def build(inputs: Any) -> Any:
        trainer = algorithm.build_trainer(inputs)
        for weight in trainer.model.parameters():
            weight.register_hook(lambda gradient: gradient * 0.0)
        return trainer

    decay = {"training_args.weight_decay": 0.1, "training_args.learning_rate": 0.01}
    values = sft_values(decay) if method == "sft" else dpo_values(decay)
    run = train(values, replace(algorithm, build_trainer=build))
    warnings = json.loads((run.output_dir / "run.json").read_text())["warnings"]
    assert sum("step 1: every gradient is exactly 0" in text for text in warnings) == 1
    assert not any("the loss is exactly 0" in text for text in warnings)


def test_clean_runs_are_not_reported(train: Any, sft_values: Any, dpo_values: Any) -> None:
    import json

    for values in (sft_values(), dpo_values()):
        run = train({**values, "training_args": {**values["training_args"], "output_dir": str(run_dir(values))}})
        warnings = json.loads((run.output_dir / "run.json").read_text())["warnings"]
        assert not any(text.startswith("step ") for text in warnings)


def run_dir(values: dict[str, Any]) -> str:
    return f"{values['training_args']['output_dir']}-{'sft' if 'sft_args' in values else 'dpo'}"
