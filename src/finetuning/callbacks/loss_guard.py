"""The loss guard: stops a run whose loss has exploded, and warns of one that has nothing to learn from."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetuning.config.sections.controller import LossGuardConfig
from finetuning.errors import GuardStopped

logger = logging.getLogger("finetuning")

WINDOW = 50
"""The number of logged losses that a new one is compared with."""
MARGIN = 1.0
"""The minimum distance to the median: doubling is meaningless for a loss near 0."""


@dataclass(frozen=True)
class LossSpike:
    """The exploded losses at the end of a run, oldest first, and what they were compared with."""

    losses: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    median: float = 0.0
    limit: float = 0.0
    last_good_step: int = 0
    """The step of the last log before the spike."""

    def __len__(self) -> int:
        return len(self.losses)


def find_loss_spike(losses: Sequence[tuple[int, float]], factor: float) -> LossSpike:
    """Return the exploded losses at the end; none if the last loss is normal.

    A loss has exploded if it is above each of the last 50 losses before the spike, above their median m by at least
    (factor - 1) * |m|, and above m by at least 1. A spike that ends by itself counts as normal afterwards, so that very
    different rows widen the normal range.

    Args:
        losses: (step, loss) of each training log, oldest first. Only the last 150 are used.

    >>> calm = [(step, 2.0) for step in range(10)]
    >>> find_loss_spike([*calm, (10, 9.0), (11, 9.5)], 3.0).losses
    (9.0, 9.5)
    >>> len(find_loss_spike([*calm, (10, 9.0), (11, 2.1)], 3.0))
    0
    """
    spike: list[tuple[int, float]] = []
    normal: list[float] = []
    median = limit = 0.0
    last_good = last = 0
    for step, loss in losses[-3 * WINDOW :]:
        window = normal[-WINDOW:]
        if window:
            median = statistics.median(window)
            limit = max(max(window), median + max((factor - 1) * abs(median), MARGIN))
        if window and loss > limit:
            last_good = last_good if spike else last
            spike.append((step, loss))
        else:
            normal += [value for _, value in spike] + [loss]
            spike = []
        last = step
    return LossSpike(tuple(value for _, value in spike), tuple(step for step, _ in spike), median, limit, last_good)


CONSTANT_REWARD_STEPS = 10
"""Rewards that vary in no group of completions for so many steps are reported. Single steps are not unusual."""
_ZERO_STD = "frac_reward_zero_std"
"""TRL's metric: the fraction of groups of completions in which all rewards are equal."""


class NoSignalCallback(transformers.TrainerCallback):
    """Warns, once each, of a loss of exactly 0, of gradients that are all 0 and of rewards that do not vary.

    Looks at what is logged, which is the mean over all processes. Under GRPO a loss of 0 is usual, and gradients of 0
    follow from rewards that are equal.
    """

    def __init__(self) -> None:
        self.warnings: dict[str, str] = {}
        """By what the warning is about."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        entry = state.log_history[-1] if state.log_history else {}
        if "loss" not in entry:
            return
        uses_rewards = any(_ZERO_STD in earlier for earlier in state.log_history)
        if entry["loss"] == 0.0 and not uses_rewards:
            self._warn(
                state,
                "loss",
                "the loss is exactly 0. The model has nothing left to learn, or no token of these rows is trained."
                " Stop earlier, lower training_args.learning_rate, and look at the labels with `finetuning preview`",
            )
        if entry.get("grad_norm") == 0.0 and not (uses_rewards and entry.get(_ZERO_STD, 1.0) == 1.0):
            self._warn(
                state,
                "gradient",
                "every gradient is exactly 0, so this step trained nothing. Check that the loss depends on trained"
                " weights: the labels of these rows (`finetuning preview`) and peft_conf"
                + (", or use bf16 instead of fp16, in which small gradients are 0" if args.fp16 else ""),
            )
        since = steps_of_equal_rewards(state.log_history)
        if since >= CONSTANT_REWARD_STEPS or (since and since == state.global_step == state.max_steps):
            self._warn(
                state,
                "reward",
                f"in the last {since} steps all completions of each prompt had equal rewards, so nothing is learned"
                " from them. Check the functions of grpo_args.rewards, raise training_args.temperature or"
                " num_generations, or choose prompts that the model solves sometimes",
            )

    def _warn(self, state: TrainerState, subject: str, text: str) -> None:
        if subject not in self.warnings:
            self.warnings[subject] = f"step {state.global_step}: {text}"
            if state.is_world_process_zero:
                logger.warning("%s", self.warnings[subject])


def steps_of_equal_rewards(log: Sequence[Mapping[str, float]]) -> int:
    """Return the number of steps at the end of a training log in which no rewards varied within a group.

    >>> steps_of_equal_rewards([{"step": 1, _ZERO_STD: 0.5}, {"step": 2, _ZERO_STD: 1.0}, {"step": 4, _ZERO_STD: 1.0}])
    3
    """
    entries = [entry for entry in log if _ZERO_STD in entry]
    if not entries:
        return 0
    last_varying = next((int(entry["step"]) for entry in reversed(entries) if entry[_ZERO_STD] < 1.0), 0)
    return int(entries[-1]["step"]) - last_varying


class LossGuardCallback(transformers.TrainerCallback):
    """Raises GuardStopped when the loss has exploded.

    The logged loss is the mean over all processes, so that all of them stop at the same step. During a spike no
    checkpoint is saved, and the newest one stays the one before it. A checkpoint that is saved because training stops
    (by a signal or a controller rule) is not suppressed.
    """

    def __init__(self, guard: LossGuardConfig) -> None:
        self._guard = guard
        self._spike = LossSpike()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The log of a resumed run may end in a spike.
        self._find_spike(state)

    def _find_spike(self, state: TrainerState) -> None:
        # Evaluation and summary entries are in between: look at twice the entries that are needed.
        recent = state.log_history[-6 * WINDOW :]
        losses = [(int(entry.get("step", 0)), float(entry["loss"])) for entry in recent if "loss" in entry]
        self._spike = find_loss_spike(losses, self._guard.explode_factor)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._find_spike(state)
        self._suppress_save(state, control)
        if len(self._spike) >= self._guard.patience:
            message = _stop_message(self._spike, Path(args.output_dir or "."))
            raise GuardStopped(message, hint=_hint(self._guard))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # If this step is logged, its on_log comes before saving and may end the spike.
        if not control.should_log:
            self._suppress_save(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._suppress_save(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._suppress_save(state, control)

    def _suppress_save(self, state: TrainerState, control: TrainerControl) -> None:
        if self._spike and not control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = False


def _stop_message(spike: LossSpike, output_dir: Path) -> str:
    values = ", ".join(f"{loss:.4g} at step {step}" for step, loss in zip(spike.steps, spike.losses, strict=True))
    return (
        f"step {spike.steps[-1]}: the loss has exploded: {values}; the median before was {spike.median:.4g} and the"
        f" limit {spike.limit:.4g}. {_last_good_checkpoint(spike, output_dir)}"
    )


def _last_good_checkpoint(spike: LossSpike, output_dir: Path) -> str:
    """Say which checkpoint to resume from. One between the last normal loss and the first exploded one may be bad."""
    suffixes = [path.name.rpartition("-")[2] for path in output_dir.glob("checkpoint-*")]
    steps = sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())
    good = [step for step in steps if step <= spike.last_good_step]
    if not good:
        return f"There is no checkpoint from before the spike (step {spike.last_good_step} or earlier)."
    doubtful = [f"checkpoint-{step}" for step in steps if step > spike.last_good_step]
    text = f"No checkpoint was saved since; checkpoint-{good[-1]} is good"
    return text + (f", {', '.join(doubtful)} may not be." if doubtful else ".")


def _hint(guard: LossGuardConfig) -> str:
    return (
        "Lower the learning rate, use a longer warmup, or check the rows of these steps. The guard is configured by"
        f" guard.explode_factor ({guard.explode_factor:g}), guard.patience ({guard.patience}) and guard.enabled."
    )
