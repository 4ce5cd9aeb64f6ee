"""The trainer's events, passed on to sinks. No sink can stop or fail the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.tracking.sinks import Kind, LogEvent, Pace, Sink, StepMetrics, numbers

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState
    from transformers import TrainerControl as Control
    from transformers import TrainingArguments as Args

logger = logging.getLogger(__name__)


class Sinks:
    """Sinks behind one guard: one that raises is told in one warning, closed and not called again.

    `failures` says why, by the sink's name; it belongs into the run's record.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)
        self.failures: dict[str, str] = {}

    def tell(self, method: str, *arguments: Any) -> None:
        """Calls this method of every sink that still works."""
        for sink in list(self._sinks):
            self._guarded(sink, method, arguments)

    def close(self) -> None:
        """Closes every sink; a second call does nothing."""
        self.tell("close")
        self._sinks.clear()

    def _guarded(self, sink: Sink, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            getattr(sink, method)(*arguments)
        except Exception as error:  # noqa: BLE001  whatever a sink does, training goes on
            if sink not in self._sinks:
                return
            self._sinks.remove(sink)
            self.failures[sink.name] = f"{type(error).__name__}: {error}"
            logger.warning("%s failed and is switched off: %s", sink.name, self.failures[sink.name])
            if method != "close":
                self._guarded(sink, "close", ())


class Teller:
    """Turns what a trainer's state says into what sinks are told, on the main process."""

    def __init__(self, sinks: Sinks, count_tokens: Callable[[], int | None], clock: Callable[[], float]):
        self._sinks = sinks
        self._count_tokens = count_tokens
        self._clock = clock
        self._pace = Pace(clock())
        self._last = StepMetrics(step=0, max_steps=0)
        self._mark = clock()

    def began(self, state: TrainerState) -> None:
        self._pace = Pace(self._clock())
        self._tell(state, "begin", self._metrics(state))

    def stepped(self, state: TrainerState) -> None:
        self._mark = self._clock()
        if self._pace.first_step_s is None:
            self._pace.first_step(state.global_step, self._mark, self._count_tokens())
        self._tell(state, "step", self._metrics(state))

    def logged(self, state: TrainerState, logs: dict[str, Any]) -> None:
        values = numbers(logs)
        kind = _kind(values)
        metrics = self._metrics(state)
        if kind == "training":
            tokens = self._count_tokens()
            rate = self._pace.window(state.global_step, self._clock(), tokens)
            metrics = replace(
                metrics,
                loss=values.get("loss"),
                learning_rate=values.get("learning_rate"),
                grad_norm=values.get("grad_norm"),
                tokens_seen=tokens,
                tokens_per_s=self._last.tokens_per_s if rate is None else rate,
                seconds_left=self._pace.seconds_left(state.global_step, state.max_steps),
            )
            self._last = metrics
        self._tell(state, "log", LogEvent(kind, metrics, values))

    def paused(self) -> None:
        """What has passed since the step ended, or since the last pause, went into evaluating or saving."""
        now = self._clock()
        self._pace.paused(now - self._mark)
        self._mark = now

    def saved(self, state: TrainerState, folder: Path) -> None:
        self.paused()
        if folder.is_dir():
            self._tell(state, "saved", state.global_step, folder)

    def ended(self, state: TrainerState) -> None:
        self._tell(state, "end", self._metrics(state))

    def _tell(self, state: TrainerState, method: str, *arguments: Any) -> None:
        if state.is_world_process_zero:
            self._sinks.tell(method, *arguments)

    def _metrics(self, state: TrainerState) -> StepMetrics:
        return replace(
            self._last,
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=state.epoch,
            elapsed_s=self._pace.elapsed(self._clock()),
            first_step_s=self._pace.first_step_s,
            seconds_left=self._pace.seconds_left(state.global_step, state.max_steps),
        )


def make_callback(
    sinks: Sinks, *, count_tokens: Callable[[], int | None] = lambda: None, clock: Callable[[], float] = time.monotonic
) -> TrainerCallback:
    """A transformers callback that tells the sinks, on the main process, what the trainer does.

    `count_tokens` gives the real tokens (padding left out) that all processes have trained on since this job began. It
    is asked on every process, after the first step and at each training log: it may gather, and synchronise a device.
    """
    from transformers import TrainerCallback

    teller = Teller(sinks, count_tokens, clock)

    class TrackingCallback(TrainerCallback):
        """See `make_callback`."""

        def on_train_begin(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
            teller.began(state)

        def on_step_end(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
            teller.stepped(state)

        def on_log(
            self, args: Args, state: TrainerState, control: Control, logs: dict[str, Any] | None = None, **more: Any
        ) -> None:
            teller.logged(state, logs or {})

        def on_evaluate(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
            teller.paused()

        def on_save(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
            teller.saved(state, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

        def on_train_end(self, args: Args, state: TrainerState, control: Control, **more: Any) -> None:
            teller.ended(state)

    return TrackingCallback()


def _kind(values: dict[str, float]) -> Kind:
    if "train_runtime" in values or "train_loss" in values:
        return "summary"
    return "training" if "loss" in values else "validation"
