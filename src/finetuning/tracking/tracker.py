"""The trainer's events, passed on to sinks. No sink can stop or fail the run.

What the training loop tells, and the places that it is told to."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerState
    from transformers import TrainerControl as Control
    from transformers import TrainingArguments as Args

_WINDOWS_KEPT = 10
_KNOWN_ONCE = ("first_step_s", "goodput")
_LOSS_OF_TIME = "badput_"
_WORTH_TELLING = ("badput_lost_work_s", "badput_checkpoint_save_s")
_OF_THE_WHOLE = ("train_runtime", "train_loss")


@dataclass(frozen=True)
class StepMetrics:
    """Where training stands at a log: counts, the last values, and the pace.

    `tokens_seen` counts real tokens, padding left out, over all processes, since this job began. Times are seconds;
    `elapsed_s` is all time since the loop began, `first_step_s` the part of it until the first step was done, which no
    rate includes. Nor do the rates include evaluation and saving. None where a value is not known (yet).
    """

    step: int
    max_steps: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_seen: int | None = None
    elapsed_s: float = 0.0
    first_step_s: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None


Kind = Literal["training", "validation", "summary"]


@dataclass(frozen=True)
class LogEvent:
    """One log of the trainer: what it is about, every number in it by the trainer's names, and the step's metrics."""

    kind: Kind
    metrics: StepMetrics
    values: Mapping[str, float] = field(default_factory=dict)


class Tracker:
    """A place that is told what happens. Every method may be left as it is; one that raises is switched off."""

    name = "sink"

    def begin(self, metrics: StepMetrics) -> None:
        """The training loop begins; `metrics.step` is above 0 when it was resumed."""

    def step(self, metrics: StepMetrics) -> None:
        """An optimizer step was taken; only counts and times are filled in."""

    def log(self, event: LogEvent) -> None:
        """The trainer has logged."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Telemetry's figures at an optimizer step: how fast the run goes, what it waits for and what it holds."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint was published."""

    def end(self, metrics: StepMetrics) -> None:
        """The training loop has ended by itself."""

    def close(self) -> None:
        """Nothing more comes; called once, after a failure, too."""


class Pace:
    """How fast training goes, from readings of a clock and of the token count.

    The first step (compilation, allocation, warm caches) is kept apart, and pauses (evaluation, saving) are taken out.
    """

    def __init__(self, now: float):
        self._began = now
        self._paused = 0.0
        self._marks: deque[tuple[int, float, int | None]] = deque(maxlen=_WINDOWS_KEPT + 1)
        self.first_step_s: float | None = None

    def first_step(self, step: int, now: float, tokens: int | None) -> None:
        """The first step is done: from here on the pace is measured."""
        self.first_step_s = now - self._began
        self._marks.append((step, now - self._paused, tokens))

    def paused(self, seconds: float) -> None:
        """So many seconds went into something else."""
        self._paused += seconds

    def elapsed(self, now: float) -> float:
        """Seconds since the training loop began."""
        return now - self._began

    def window(self, step: int, now: float, tokens: int | None) -> float | None:
        """Tokens per second since the last window, which ends here; None before there is one."""
        busy = now - self._paused
        if not self._marks or step <= self._marks[-1][0]:
            return None
        _, since, tokens_then = self._marks[-1]
        self._marks.append((step, busy, tokens))
        if tokens is None or tokens_then is None or busy <= since:
            return None
        return (tokens - tokens_then) / (busy - since)

    def seconds_left(self, step: int, max_steps: int) -> float | None:
        """Seconds that the steps to come take at the pace of the last ten windows."""
        if len(self._marks) < 2:
            return None
        (first, began, _), (last, ended, _) = self._marks[0], self._marks[-1]
        return max(max_steps - step, 0) * (ended - began) / (last - first)


class MetricNames:
    """Names of telemetry's figures in a tracker: `telemetry/…` for curves, `totals/…` for what is known once.

    Of the places that time was lost to only the sum is told, and those that a person can do something about. What is
    known once is given once, and again only when it has changed.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = {}

    def of(self, values: Mapping[str, float]) -> dict[str, float]:
        """The figures to tell, by their names in the tracker."""
        lost = {name: value for name, value in values.items() if name.startswith(_LOSS_OF_TIME)}
        told = {f"telemetry/{name}": value for name, value in values.items() if name not in {*lost, *_KNOWN_ONCE}}
        once = {name: values[name] for name in _KNOWN_ONCE if name in values}
        once |= {name: value for name, value in lost.items() if name in _WORTH_TELLING and value}
        if lost:
            once["badput_s"] = sum(lost.values())
        told |= {f"totals/{name}": value for name, value in once.items() if self._given.get(name) != value}
        self._given |= once
        return told


def totals(values: Mapping[str, float]) -> dict[str, float]:
    """Of the trainer's summary what says something of the whole run, by its name in a tracker."""
    return {f"totals/{name}": value for name, value in values.items() if name in _OF_THE_WHOLE}


def numbers(logs: Mapping[str, object]) -> dict[str, float]:
    """The numbers among what a trainer has logged, one-element tensors included, by their names."""
    found: dict[str, float] = {}
    for key, value in logs.items():
        try:
            number = value.item() if hasattr(value, "item") else value
        except (ValueError, RuntimeError):  # more than one element
            continue
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[key] = float(number)
    return found


logger = logging.getLogger(__name__)


class TrackerGroup:
    """Sinks behind one guard: one that raises is told in one warning, closed and not called again.

    `failures` says why, by the sink's name; it belongs into the run's record.
    """

    def __init__(self, sinks: Sequence[Tracker]):
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

    def _guarded(self, sink: Tracker, method: str, arguments: tuple[Any, ...]) -> None:
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


class TrackerCallback:
    """Turns what a trainer's state says into what sinks are told, on the main process."""

    def __init__(self, sinks: TrackerGroup, count_tokens: Callable[[], int | None], clock: Callable[[], float]):
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
    sinks: TrackerGroup,
    *,
    count_tokens: Callable[[], int | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainerCallback:
    """A transformers callback that tells the sinks, on the main process, what the trainer does.

    `count_tokens` gives the real tokens (padding left out) that all processes have trained on since this job began. It
    is asked on every process, after the first step and at each training log: it may gather, and synchronise a device.
    """
    from transformers import TrainerCallback

    teller = TrackerCallback(sinks, count_tokens, clock)

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
