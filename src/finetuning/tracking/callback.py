"""The transformers callback that sends a trainer's events to trackers, and the throughput it measures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetuning.tracking.tracker import EventKind, LogEvent, StepMetrics, TrackerGroup

_WINDOWS = 10


class ThroughputMeter:
    """Measures throughput from readings of a clock (in seconds) and of the token count.

    The first step (compilation, allocation, cold caches) and pauses (evaluation, saving) are excluded.
    """

    def __init__(self, now: float):
        self._started = now
        self._paused_s = 0.0
        self._marks: deque[tuple[int, float, int | None]] = deque(maxlen=_WINDOWS + 1)
        self.first_step_s: float | None = None

    def finish_first_step(self, step: int, now: float, tokens: int | None) -> None:
        """Record the end of the first step: throughput is measured from then on."""
        self.first_step_s = now - self._started
        self._marks.append((step, now - self._paused_s, tokens))

    def add_pause(self, seconds: float) -> None:
        """Exclude this many seconds from the throughput."""
        self._paused_s += seconds

    def elapsed_s(self, now: float) -> float:
        """Return the seconds since the training loop began."""
        return now - self._started

    def close_window(self, step: int, now: float, tokens: int | None) -> float | None:
        """Return the tokens per second since the last window, which ends here; None for the first window."""
        busy = now - self._paused_s
        if not self._marks or step <= self._marks[-1][0]:
            return None
        _, since, tokens_then = self._marks[-1]
        self._marks.append((step, busy, tokens))
        if tokens is None or tokens_then is None or busy <= since:
            return None
        return (tokens - tokens_then) / (busy - since)

    def seconds_left(self, step: int, max_steps: int) -> float | None:
        """Estimate the remaining seconds from the last ten windows."""
        if len(self._marks) < 2:
            return None
        (first, start_s, _), (last, end_s, _) = self._marks[0], self._marks[-1]
        return max(max_steps - step, 0) * (end_s - start_s) / (last - first)


class TrackerCallback(transformers.TrainerCallback):
    """Sends a trainer's events to a group of trackers, on the main process.

    Args:
        trackers: receives the events.
        count_tokens: returns the tokens (without padding) that all processes have trained on since this job began. It
            is called on every process, after the first step and at each training log, so that it may gather over the
            processes and synchronize the device.
        clock: returns seconds, and never goes backward.
    """

    def __init__(
        self,
        trackers: TrackerGroup,
        *,
        count_tokens: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._trackers = trackers
        self._count_tokens = count_tokens
        self._clock = clock
        self._throughput = ThroughputMeter(clock())
        self._last = StepMetrics(step=0, max_steps=0)
        self._busy_until = clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._throughput = ThroughputMeter(self._clock())
        self._send(state, "on_train_begin", self._metrics(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._busy_until = self._clock()
        if self._throughput.first_step_s is None:
            self._throughput.finish_first_step(state.global_step, self._busy_until, self._count_tokens())
        self._send(state, "on_step_end", self._metrics(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        values = numeric_values(logs or {})
        kind = _event_kind(values)
        metrics = self._metrics(state)
        if kind == "training":
            tokens = self._count_tokens()
            rate = self._throughput.close_window(state.global_step, self._clock(), tokens)
            metrics = replace(
                metrics,
                loss=values.get("loss"),
                learning_rate=values.get("learning_rate"),
                grad_norm=values.get("grad_norm"),
                tokens_seen=tokens,
                tokens_per_s=self._last.tokens_per_s if rate is None else rate,
                seconds_left=self._throughput.seconds_left(state.global_step, state.max_steps),
            )
            self._last = metrics
        # Not through `_send`: a logged loss reaches a tracker's queue in four calls.
        if state.is_world_process_zero:
            self._trackers.call("log", LogEvent(kind, metrics, values))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._add_pause()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._add_pause()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self._send(state, "on_save", state.global_step, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._send(state, "on_train_end", self._metrics(state))

    def _add_pause(self) -> None:
        """Exclude the time since the last step or pause, which went into evaluating or saving."""
        now = self._clock()
        self._throughput.add_pause(now - self._busy_until)
        self._busy_until = now

    def _send(self, state: TrainerState, method: str, *arguments: object) -> None:
        if state.is_world_process_zero:
            self._trackers.call(method, *arguments)

    def _metrics(self, state: TrainerState) -> StepMetrics:
        return replace(
            self._last,
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            elapsed_s=self._throughput.elapsed_s(self._clock()),
            first_step_s=self._throughput.first_step_s,
            seconds_left=self._throughput.seconds_left(state.global_step, state.max_steps),
        )


class LogLastStep(transformers.TrainerCallback):
    """Has the last step logged, whether or not `logging_steps` divides its number. Must be the last callback."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The Trainer logs a step once.
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if is_last and args.logging_strategy != "no":
            control.should_log = True


def numeric_values(logs: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers among a trainer's logs, one-element tensors included."""
    numbers: dict[str, float] = {}
    for key, value in logs.items():
        item = getattr(value, "item", None)
        try:
            number = item() if callable(item) else value
        except (ValueError, RuntimeError):  # more than one element
            continue
        if isinstance(number, int | float) and not isinstance(number, bool):
            numbers[key] = float(number)
    return numbers


def _event_kind(values: Mapping[str, float]) -> EventKind:
    if "train_runtime" in values or "train_loss" in values:
        return "summary"
    return "training" if "loss" in values else "validation"
